"""What measuring needs from outside the program: batches, a loss, a device, a seed."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from hawqfx.errors import DataError, LossError

Loss = Callable[[Any, Any], Tensor]
Draw = Callable[[Any, torch.Generator], Any]
T = TypeVar("T")


class Progress(Protocol):
    """Told how far the work called `label` is, with a word on how well it goes."""

    def __call__(self, label: str, done: int, total: int, note: str = "") -> None: ...


log = logging.getLogger(__name__)

IGNORED_LABEL = -100  # torch's cross-entropy leaves these out of the mean


@dataclass(frozen=True)
class Batch:
    """The arguments of one call of the model, and what it should have answered (None: labels are sampled)."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Any = None

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor)]

    @property
    def size(self) -> int:
        return self.tensors[0].shape[0]

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda tensor: tensor.to(device))

    def split(self, most: int) -> list["Batch"]:
        """The batch in parts of at most so many samples."""
        return [self._part(start, start + most) for start in range(0, self.size, most)]

    def first(self, most: int) -> "Batch":
        """The first few samples."""
        return self._part(0, most)

    def last(self, most: int) -> "Batch":
        """The last few samples."""
        return self._part(self.size - most, self.size)

    def _part(self, start: int, stop: int) -> "Batch":
        size = self.size
        return self._map(lambda tensor: tensor[start:stop] if tensor.shape[:1] == (size,) else tensor)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        def leafwise(leaf: Any) -> Any:
            return change(leaf) if isinstance(leaf, Tensor) else leaf

        return Batch(*(pytree.tree_map(leafwise, part) for part in (self.args, dict(self.kwargs), self.target)))


def silent(label: str, done: int, total: int, note: str = "") -> None:
    """Progress that nobody wants to see."""


@dataclass(frozen=True)
class Context:
    """Batches on a device, a scalar loss of (output, target), and a seed.  Never stored in a Program.

    draw: gives a target for an output, drawn from the distribution that the loss is the negative logarithm of.
    batch: the most samples to measure at once; None: as memory allows.  cache: a folder for what was measured.
    """

    batches: tuple[Batch, ...]
    loss: Loss
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress = silent
    draw: Draw | None = None
    batch: int | None = None
    cache: Path | None = None

    @property
    def samples(self) -> int:
        return sum(batch.size for batch in self.batches)

    def track(self, items: Iterable[T], label: str, total: int) -> Iterator[T]:
        """Go through `items` and tell `progress` how far we are."""
        self.progress(label, 0, total)
        for done, item in enumerate(items, 1):
            yield item
            self.progress(label, done, total)

    def loss_of(self, output: Any, batch: Batch, index: int) -> Tensor:
        """The mean loss of a batch, a finite scalar."""
        target = batch.target
        if target is None:
            target = self.drawn(output, generator(self.seed, "labels", index, device=self.device))
        return self.loss_at(output, target, index)

    def drawn(self, output: Any, random: torch.Generator) -> Any:
        """A target drawn from the model's own output distribution: labels of a classifier, unless `draw` is given."""
        return self.draw(output, random) if self.draw else sample_labels(_logits(output), random)

    def draws(self, target: Any, index: int) -> int:
        """Over how many independent draws the loss of a drawn target is the mean: cross-entropy's over all labels,
        another loss's over the samples of the batch."""
        if self.loss is cross_entropy and isinstance(target, Tensor):
            return target.numel()
        return self.batches[index].size

    def loss_at(self, output: Any, target: Any, index: int) -> Tensor:
        """The loss of an output of batch `index`, a finite scalar."""
        value = self.loss(output, target)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise LossError(f"the loss must be a scalar, the mean over the batch; it returned {shape}")
        if not torch.isfinite(value):
            raise LossError(
                f"the loss of batch {index} is {value.item()}: check the data of that batch and the loss for overflow"
            )
        return value.reshape(())


def generator(*key: object, device: torch.device) -> torch.Generator:
    """A random stream that depends on `key` alone, so on no order and on no number of workers."""
    import hashlib

    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)


def cross_entropy(output: Any, target: Any) -> Tensor:
    """The default loss: cross-entropy of logits (N, classes, ...) and integer labels (N, ...)."""
    logits = _logits(output)
    if not isinstance(target, Tensor) or target.dtype.is_floating_point:
        raise DataError("the default loss is cross-entropy and needs integer labels; give loss= for other targets")
    kept = target[target != IGNORED_LABEL]
    if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= logits.shape[1]):
        raise DataError(
            f"labels go from {int(kept.min())} to {int(kept.max())}, "
            f"but the model has {logits.shape[1]} classes, 0 to {logits.shape[1] - 1}"
        )
    return F.cross_entropy(logits, target.long())


def sample_labels(logits: Tensor, random: torch.Generator) -> Tensor:
    """Labels (N, ...) drawn from the model's own output distribution, softmax over dimension 1 of the logits.

    The expected Hessian of cross-entropy under these labels is the Gauss-Newton matrix, which is the Fisher
    information (Martens 2020, "New insights and perspectives on the natural gradient method", section 9).
    """
    probabilities = logits.detach().softmax(1).movedim(1, -1)
    drawn = torch.multinomial(probabilities.reshape(-1, logits.shape[1]), 1, generator=random)
    return drawn.reshape(probabilities.shape[:-1])


def _logits(output: Any) -> Tensor:
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None:
        found = output
    if not isinstance(found, Tensor) or found.ndim < 2:
        raise LossError(
            f"the default loss needs logits (N, classes, ...), the model returned {type(output).__name__}: give loss="
        )
    return found


def gather(data: Iterable[Any], samples: int | None = None) -> tuple[Batch, ...]:
    """The batches in `data`, checked: at least one, equal shapes but for dimension 0, every float finite.

    `samples`: how many to take; all, if there are fewer, with a warning.

    A batch is a tensor, a pair (inputs, target), or a dict of keyword inputs with or without `labels`.  The inputs of
    a pair are a tensor, a tuple of tensors or a dict.
    """
    if isinstance(data, Tensor):
        data = [data]
    if samples is not None and samples < 1:
        raise DataError(f"samples={samples}: at least one sample is needed")
    try:
        items = iter(data)
    except TypeError as error:
        raise DataError(f"data must be an iterable of batches, not {type(data).__name__}") from error
    batches: list[Batch] = []
    left = samples
    for index, item in enumerate(items):
        batch = _batch(item, index)
        _check(batch, batches[0] if batches else batch, index)
        batches.append(batch if left is None else batch.first(left))
        left = None if left is None else left - batches[-1].size
        if left == 0:
            break
    if not batches:
        raise DataError("data is empty: give at least one batch of calibration inputs")
    if left:
        assert samples is not None
        log.warning("samples=%d were asked for, and the data has %d: all of them are used", samples, samples - left)
    return tuple(batches)


def _batch(item: Any, index: int) -> Batch:
    if isinstance(item, Tensor):
        return Batch((item,), {})
    if isinstance(item, Mapping):
        inputs = {name: value for name, value in item.items() if name != "labels"}
        return Batch((), inputs, item.get("labels"))
    if isinstance(item, (tuple, list)) and len(item) == 2:
        inputs, target = item
        if isinstance(inputs, Mapping):
            return Batch((), dict(inputs), target)
        return Batch(tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}, target)
    raise DataError(
        f"batch {index} is a {type(item).__name__}: a batch is a tensor, a pair (inputs, target), or a dict of inputs"
    )


def _check(batch: Batch, first: Batch, index: int) -> None:
    shapes = [tuple(tensor.shape) for tensor in batch.tensors]
    expected = [tuple(tensor.shape) for tensor in first.tensors]
    if not shapes or any(not shape or shape[0] == 0 for shape in shapes):
        raise DataError(f"batch {index} is empty: every input needs a batch dimension 0 of at least one sample")
    if [shape[1:] for shape in shapes] != [shape[1:] for shape in expected]:
        raise DataError(
            f"batch {index} has inputs of shape {shapes}, batch 0 of shape {expected}: all but dimension 0 must agree. "
            "(A single batch of inputs and targets is given as [(inputs, targets)].)"
        )
    for tensor in batch.tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"batch {index} holds NaN or infinity: clean the data")
    if isinstance(batch.target, Tensor):
        if batch.target.shape[:1] != (batch.size,):
            raise DataError(
                f"batch {index} has {batch.size} inputs and targets of shape {tuple(batch.target.shape)}: "
                "dimension 0 must agree"
            )
        if batch.target.is_floating_point() and not bool(torch.isfinite(batch.target).all()):
            raise DataError(f"the targets of batch {index} hold NaN or infinity: clean the data")
