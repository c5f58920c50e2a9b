"""What a network returns, as losses look at it: a tensor, one that is named logits, or several; and their targets."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import SymBool, SymFloat, SymInt, Tensor, nn
from torch.utils import _pytree as pytree

from hawqfx.errors import DataError, LossError

Key = int | str  # of an output in a tuple or a mapping
_VALUES = (Tensor, bool, int, float, str, SymInt, SymFloat, SymBool)


def tensor_of(output: Any) -> Tensor:
    """The tensor that a loss of one output looks at: the output, or the entry `logits` of a mapping or object.

    Raises:
        LossError: if there is none.
    """
    named = _logits(output)
    tensor = output if named is None else named
    if not isinstance(tensor, Tensor) or tensor.ndim < 1:
        raise LossError(
            f"the default losses need a tensor, or one named logits; the model returned {type(output).__name__}: "
            "give loss="
        )
    return tensor


def logits_of(output: Any) -> Tensor:
    """The logits in an output: a tensor of two dimensions or more, or the entry `logits` of a mapping or object.

    Raises:
        LossError: if there are none.
    """
    tensor = tensor_of(output)
    if tensor.ndim < 2:
        raise LossError(
            f"cross-entropy needs logits (N, classes, ...), the model returned {written(tensor)}: give loss="
        )
    return tensor


def entries(value: Any) -> dict[Key, Any]:
    """The entries of a tuple or list by number, or of a mapping by name; none for anything else."""
    if isinstance(value, Mapping):
        return dict(value)
    return dict(enumerate(value)) if isinstance(value, (tuple, list)) else {}


def is_structured(output: Any) -> bool:
    """Whether an output is a tuple, a list or a mapping, and not judged by its `logits` alone."""
    return isinstance(output, (tuple, list, Mapping)) and _logits(output) is None


def counted(output: Any) -> dict[Key, Tensor]:
    """The outputs of a tuple, list or mapping that a loss is made of: its own floating-point tensors.

    What is nested deeper, such as the hidden states, attentions and caches of transformers, are by-products, and
    integers have no slope.

    Raises:
        LossError: if there is none.
    """
    found = {
        key: value
        for key, value in entries(output).items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0
    }
    if not found:
        raise LossError(
            f"the default losses need a tensor of floats; the model returned {type(output).__name__} without one of "
            "its own: give loss="
        )
    return found


def targets_by_output(target: Any, keys: Sequence[Key], counted: Sequence[Key]) -> dict[Key, Any]:
    """The target of each output that counts; None for one that has none.

    Args:
        target: a tuple or list with an entry for each output, or a mapping by their keys, which may leave some out;
            the bare target where one output counts; or None.
        keys: those of all outputs.
        counted: those of the outputs that a loss is made of.

    Raises:
        DataError: if the target has another structure.
    """
    given = entries(target)
    if target is None or (len(counted) == 1 and isinstance(target, Tensor)):
        return dict.fromkeys(counted, target)
    fits = set(given) <= set(keys) if isinstance(target, Mapping) else list(given) == list(keys)
    if not given or not fits or any(given[key] is not None for key in given if key not in counted):
        raise DataError(
            f"the model returns the outputs {', '.join(map(str, keys))}, of which {', '.join(map(str, counted))} have "
            f"a default loss, and the targets are {_described(target)}: give targets in the same structure, with None "
            "for an output that has none, or loss="
        )
    return {key: given.get(key) for key in counted}


def written(tensor: Tensor) -> str:
    """The shape in words, as in (N, 3)."""
    return f"({', '.join(['N', *map(str, tensor.shape[1:])])})"


@contextmanager
def without_objects(model: nn.Module, left_out: list[str]) -> Iterator[None]:
    """A context in which a model returns None in place of what is no value of a graph, such as the caches of
    transformers.

    Args:
        model: any module; it is the same again after the context.
        left_out: takes the names and types of what was left out.
    """

    def keep_values(module: nn.Module, inputs: Any, output: Any) -> Any:
        if all(leaf is None or isinstance(leaf, _VALUES) for leaf in pytree.tree_leaves(output)):
            return output  # also of classes whose fields have no names

        def value(path: tuple[Any, ...], leaf: Any) -> Any:
            if not path or leaf is None or isinstance(leaf, _VALUES):
                return leaf  # a whole output of an unknown class is what torch.export refuses by its name
            name = "_".join(map(_key, path))
            described = f"{name} ({type(leaf).__name__})"
            left_out.extend([described] * (described not in left_out))
            return None

        return pytree.tree_map_with_path(value, output)

    hook = model.register_forward_hook(keep_values)
    try:
        yield
    finally:
        hook.remove()


def _key(step: Any) -> str:
    """A step of a path through a structure: the key of a mapping, the field of an object or the number of an item."""
    return str(next(getattr(step, kind) for kind in ("key", "name", "idx") if hasattr(step, kind)))


def _logits(output: Any) -> Any:
    named = getattr(output, "logits", None)
    return output.get("logits") if named is None and isinstance(output, Mapping) else named


def _described(target: Any) -> str:
    if isinstance(target, Tensor):
        return f"one tensor {written(target)}"
    names = f" of {', '.join(map(str, entries(target)))}" if entries(target) else ""
    return f"a {type(target).__name__}{names}"
