"""Calibration data: batches of inputs and targets."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from hawqfx.errors import DataError, UsageError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """The arguments of one call of the model, and the target of its output.

    Args:
        args: positional inputs; dimension 0 of every tensor is the batch.
        kwargs: keyword inputs, likewise.
        target: the correct answer, as the loss takes it; None if the data have no targets
            (hawqfx.frontend.context.Context.target_of then makes one).
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Any = None

    @property
    def tensors(self) -> list[Tensor]:
        """All input tensors: positional inputs first, then keyword inputs."""
        return [leaf for leaf in pytree.tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor)]

    @property
    def size(self) -> int:
        """The number of samples."""
        return self.tensors[0].shape[0]

    @property
    def lacks_targets(self) -> bool:
        """Whether the target is None, or has None for one of several outputs."""
        return any(leaf is None for leaf in pytree.tree_leaves(self.target))

    def to(self, device: torch.device) -> "Batch":
        """The batch with inputs and target on a device."""
        return self.map(lambda tensor: tensor.to(device))

    def split(self, most: int) -> list["Batch"]:
        """The batch in parts of at most `most` samples, in order."""
        return [self._part(start, start + most) for start in range(0, self.size, most)]

    def first(self, most: int) -> "Batch":
        """The first `most` samples; all samples, if there are fewer."""
        return self._part(0, most)

    def last(self, most: int) -> "Batch":
        """The last `most` samples; `most` must not exceed the number of samples."""
        return self._part(self.size - most, self.size)

    def rows(self, numbers: Tensor) -> "Batch":
        """The samples of these numbers; a tensor without a batch dimension stays whole."""
        size = self.size
        return self.map(lambda tensor: tensor[numbers] if tensor.shape[:1] == (size,) else tensor)

    def _part(self, start: int, stop: int) -> "Batch":
        """The samples from `start` to `stop`; a tensor without a batch dimension stays whole."""
        size = self.size
        return self.map(lambda tensor: tensor[start:stop] if tensor.shape[:1] == (size,) else tensor)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with every tensor, of inputs and target, changed by a function."""

        def leafwise(leaf: Any) -> Any:
            return change(leaf) if isinstance(leaf, Tensor) else leaf

        return Batch(*(pytree.tree_map(leafwise, part) for part in (self.args, dict(self.kwargs), self.target)))


def sample_axis(tensor: Tensor, samples: int) -> int | None:
    """The dimension of a tensor that the batch is part of: the first whose size the number of samples divides; None if
    there is none."""
    return next((axis for axis, size in enumerate(tensor.shape) if size % samples == 0), None)


def gather(
    data: Iterable[Any], samples: int | None = None, varying: bool = False, name: str = "data"
) -> tuple[Batch, ...]:
    """The batches in `data`, checked.

    Args:
        data: a tensor, an array or a mapping, which is a single batch, or an iterable of batches, such as a DataLoader.
            A batch is a tensor, a list of one tensor, a pair (inputs, target), or a mapping of keyword inputs with or
            without `labels`, such as a BatchEncoding of transformers.  The inputs of a pair are a tensor, a tuple of
            tensors or a mapping.  NumPy arrays do for tensors.
        samples: the number of samples to take from the start; None takes all.  If there are fewer, all are taken, with
            a warning.
        varying: whether other dimensions than the batch may differ between batches.
        name: of the argument, for messages.

    Returns:
        At least one batch.  The shapes of all batches agree but for dimension 0 and what varies, numbers and texts
        among the inputs are the same in each, and all floats are finite.

    Raises:
        DataError: if `data` cannot give such batches.
        UsageError: if `samples` is below 1.
    """
    if isinstance(data, (Tensor, np.ndarray, Mapping)):
        data = [data]
    if samples is not None and samples < 1:
        raise UsageError(f"samples={samples}: at least one sample is needed")
    try:
        items = iter(data)
    except TypeError as error:
        raise DataError(f"{name} must be an iterable of batches, not {type(data).__name__}") from error
    batches: list[Batch] = []
    left = samples
    for index, item in enumerate(items):
        batch = _batch(item, index)
        _check(batch, batches[0] if batches else batch, index, varying)
        batches.append(batch if left is None else batch.first(left))
        left = None if left is None else left - batches[-1].size
        if left == 0:
            break
    if not batches:
        raise DataError(f"{name} is empty: give at least one batch of inputs")
    if left:
        assert samples is not None
        log.warning("samples=%d were asked for, and the data has %d: all of them are used", samples, samples - left)
    return tuple(batches)


def check_alike(batch: Batch, first: Batch, name: str) -> None:
    """Raise DataError if the data `name` have inputs of other kinds or shapes than those of calibration."""
    shapes, expected = ([(str(x.dtype), tuple(x.shape[1:])) for x in each.tensors] for each in (batch, first))
    if shapes != expected or batch.kwargs.keys() != first.kwargs.keys():
        raise DataError(
            f"{name} has inputs of type and shape {shapes} per sample, data of {expected}: both must be inputs of the "
            "model"
        )


def check_fits(batches: Sequence[Batch], inputs: Sequence[fx.Node], leaves: Callable[[Batch], list[Any]]) -> None:
    """Check batches against the inputs of a captured graph.

    Args:
        batches: the data.
        inputs: placeholders of the graph.
        leaves: the values of the placeholders in a batch.

    Raises:
        DataError: if a size that the graph was captured with differs; the message has both shapes.
    """
    for index, batch in enumerate(batches):
        for node, value in zip(inputs, leaves(batch), strict=True):
            taken = node.meta.get("val")
            if not isinstance(taken, Tensor) or not isinstance(value, Tensor):
                continue
            sizes = [(size, given) for size, given in zip(taken.shape, value.shape, strict=False)][1:]
            if taken.ndim != value.ndim or any(isinstance(size, int) and size != given for size, given in sizes):
                shape = ", ".join(str(size) if isinstance(size, int) else "any" for size in taken.shape)
                raise DataError(
                    f"batch {index} has {node.name} of shape {tuple(value.shape)}, and the model was captured with "
                    f"({shape}): give data of that shape, or name the dimensions that vary in dynamic_shapes="
                )


def _batch(item: Any, index: int) -> Batch:
    """An item of the data as a batch; `index` is for the error message."""
    if isinstance(item, (tuple, list)) and len(item) == 1:
        (item,) = item
    if isinstance(item, (Tensor, np.ndarray)):
        return Batch((_with_tensors(item, index),), {})
    if isinstance(item, Mapping):
        inputs = {name: _with_tensors(value, index) for name, value in item.items() if name != "labels"}
        return Batch((), inputs, _with_tensors(item.get("labels"), index))
    if isinstance(item, (tuple, list)) and len(item) == 2:
        inputs, target = (_with_tensors(part, index) for part in item)
        if isinstance(inputs, dict):
            return Batch((), inputs, target)
        return Batch(tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}, target)
    raise DataError(
        f"batch {index} is a {type(item).__name__}{f' of {len(item)}' if isinstance(item, (tuple, list)) else ''}: "
        "a batch is a tensor, a pair (inputs, target), or a dict of inputs; several inputs are a tuple in that pair"
    )


def _with_tensors(value: Any, index: int) -> Any:
    """A part of a batch with tensors in place of arrays, and dicts in place of other mappings."""
    if isinstance(value, Mapping):
        value = dict(value)

    def tensor(leaf: Any) -> Any:
        if isinstance(leaf, np.generic):
            return leaf.item()
        if not isinstance(leaf, np.ndarray):
            return leaf
        try:
            return torch.from_numpy(np.array(leaf))  # a copy: torch warns of arrays that are read-only
        except TypeError as error:
            raise DataError(f"batch {index} has an array of {leaf.dtype}, of which torch makes no tensor") from error

    return pytree.tree_map(tensor, value)


def _check(batch: Batch, first: Batch, index: int, varying: bool) -> None:
    """Raise DataError if a batch is empty, not finite, or of other shapes or numbers than the first batch."""
    shapes = [tuple(tensor.shape) for tensor in batch.tensors]
    expected = [tuple(tensor.shape) for tensor in first.tensors]
    if not shapes:
        raise DataError(
            f"batch {index} holds no tensors: make tensors of its lists, for example by torch.tensor, or by "
            "return_tensors='pt' of a tokenizer"
        )
    if any(not shape or shape[0] == 0 for shape in shapes):
        raise DataError(f"batch {index} is empty: every input needs a batch dimension 0 of at least one sample")
    agree = [len(shape) if varying else shape[1:] for shape in shapes] == [
        len(shape) if varying else shape[1:] for shape in expected
    ]
    if not agree:
        raise DataError(
            f"batch {index} has inputs of shape {shapes}, batch 0 of shape {expected}: all but dimension 0 must agree, "
            "and the dimensions that dynamic_shapes= names. (A single batch of inputs and targets is given as "
            "[(inputs, targets)].)"
        )
    constants, wanted = _constants(batch), _constants(first)
    if constants != wanted:
        raise DataError(
            f"batch {index} has {constants} among its inputs, and batch 0 {wanted}: what is no tensor becomes part of "
            "the network, and is the same for all batches; make tensors of numbers that vary"
        )
    for tensor in batch.tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"batch {index} holds NaN or infinity: clean the data")
    if (batch.target is None) != (first.target is None):
        raise DataError(f"batch {index} and batch 0: one has targets and the other none; give targets for all, or none")
    if isinstance(batch.target, Tensor):
        if batch.target.shape[:1] != (batch.size,):
            raise DataError(
                f"batch {index} has {batch.size} inputs and targets of shape {tuple(batch.target.shape)}: "
                "dimension 0 must agree"
            )
        if batch.target.is_floating_point() and not bool(torch.isfinite(batch.target).all()):
            raise DataError(f"the targets of batch {index} hold NaN or infinity: clean the data")


def _constants(batch: Batch) -> list[Any]:
    """The inputs that are no tensors."""
    return [leaf for leaf in pytree.tree_leaves((batch.args, dict(batch.kwargs))) if not isinstance(leaf, Tensor)]
