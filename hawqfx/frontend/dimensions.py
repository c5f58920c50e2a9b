"""Dimensions of inputs that vary from run to run: as torch.export is told of them, and their names in a file."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from inspect import Parameter
from typing import Any

from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from hawqfx.frontend.data import Batch
from hawqfx.ir.graph import symbol

Names = Mapping[str, Mapping[int, str]]  # of the dimensions that vary, by the input's name and the dimension's number

# (number of dimensions, dimension) -> its name, where the user has given none
_USUAL = {
    (2, 1): "sequence", (3, 1): "sequence", (3, 2): "length", (4, 2): "height", (4, 3): "width",
    (5, 2): "depth", (5, 3): "height", (5, 4): "width",
}  # fmt: skip


def shapes_to_capture(model: nn.Module, example: Batch, given: Any = None, batch: Any = Dim.DYNAMIC) -> Any:
    """The `dynamic_shapes` of torch.export for a model: dimension 0 of every input tensor varies, and what the user
    says beyond that.

    Args:
        model: to be captured.
        example: its inputs.
        given: `dynamic_shapes` as torch.export takes them; in a mapping by the names of inputs, tensors that are left
            out have a batch dimension that varies, and so have those whose own mapping leaves out dimension 0.
        batch: what is said of a batch dimension: that it varies, or a Dim where all are known to be equal.
    """
    leaves, structure = pytree.tree_flatten((example.args, dict(example.kwargs)))
    batches = _bound(model, structure, [_varying(leaf, (0,), batch) for leaf in leaves])
    if given is None:
        return batches
    if not isinstance(given, Mapping):
        return given
    return {name: _with_batch(own, given[name]) if name in given else own for name, own in batches.items()} | {
        name: value for name, value in given.items() if name not in batches
    }


@contextmanager
def named_keywords(model: nn.Module, example: Batch) -> Iterator[None]:
    """A context in which the inputs that a model takes as **kwargs are named in its signature: torch.export finds no
    sizes that vary in what has no name.  The model is the same again after it."""
    own, names = model.forward, inspect.signature(model.forward).parameters
    rest = [name for name, parameter in names.items() if parameter.kind is Parameter.VAR_KEYWORD]
    added = [Parameter(name, Parameter.KEYWORD_ONLY) for name in example.kwargs if name not in names]
    if not rest or not added:
        yield
        return

    @wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    known = [parameter for name, parameter in names.items() if name not in rest]
    forward.__signature__ = inspect.Signature([*known, *added])  # type: ignore[attr-defined]
    patched = "forward" in vars(model)
    model.forward = forward
    try:
        yield
    finally:
        if patched:
            model.forward = own
        else:
            del model.forward


def shapes_of(graph: fx.GraphModule, example: Batch) -> Any:
    """The `dynamic_shapes` of torch.export with which the inputs of a captured graph vary as they did at its capture.

    Args:
        graph: captured.
        example: its inputs.
    """
    kwargs = dict(example.kwargs)
    _, keywords = graph.graph._codegen.pytree_info.in_spec.children()  # type: ignore[attr-defined]
    ordered = {name: kwargs[name] for name in keywords.context or ()}
    leaves, structure = pytree.tree_flatten((example.args, ordered))
    inputs = graph.graph.find_nodes(op="placeholder")
    shapes = [_varying(leaf, varying_axes(node)) for leaf, node in zip(leaves, inputs, strict=True)]
    return _bound(graph, structure, shapes)


def varying_axes(node: fx.Node) -> list[int]:
    """The dimensions of a captured tensor that vary."""
    value = node.meta.get("val")
    sizes = value.shape if isinstance(value, Tensor) else ()
    return [axis for axis, size in enumerate(sizes) if not isinstance(size, int)]


def name_dimensions(graph: fx.Graph, model: nn.Module | None, example: Batch, given: Any) -> Names:
    """The names of the dimensions of a captured graph's inputs that vary: those of the user's `torch.export.Dim`, or
    "batch", "sequence", "height" and the like.  Dimensions that are always equal have one name.

    Args:
        graph: captured.
        model: that was captured; None if torch.export was called by the user.
        example: its inputs.
        given: the `dynamic_shapes` of the user, or None.
    """
    inputs = graph.find_nodes(op="placeholder")
    dims = _user_dims(model, example, given, len(inputs))
    by_symbol: dict[str, str] = {}
    for node, own in zip(inputs, dims, strict=True):
        for axis in varying_axes(node):
            if axis in own:
                by_symbol.setdefault(symbol(node.meta["val"].shape[axis]), own[axis])
    names: dict[str, dict[int, str]] = {}
    for node in inputs:
        for axis in varying_axes(node):
            size, rank = symbol(node.meta["val"].shape[axis]), node.meta["val"].ndim
            if axis == 0:
                name = by_symbol.get(size, "batch")
            else:
                usual = _USUAL.get((rank, axis), f"{node.name}_{axis}")
                name = usual if usual not in by_symbol.values() else f"{usual}_of_{node.name}"
            names.setdefault(node.name, {})[axis] = by_symbol.setdefault(size, name)
    return names


def _user_dims(model: nn.Module | None, example: Batch, given: Any, inputs: int) -> list[dict[int, str]]:
    """For each input, the names that the user gave to its dimensions."""
    if model is None or given is None:
        return [{}] * inputs
    with named_keywords(model, example):
        whole = shapes_to_capture(model, example, given)
    parts = list(whole.values()) if isinstance(whole, Mapping) else whole
    leaves = pytree.tree_leaves(parts, is_leaf=_is_shape)
    named = [
        {axis: dim.__name__ for axis, dim in leaf.items() if isinstance(dim, type | Dim)}
        if isinstance(leaf, Mapping)
        else {}
        for leaf in leaves
    ]
    return named if len(named) == inputs else [{}] * inputs


def _is_shape(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(axis, int) for axis in value)


def _varying(leaf: Any, axes: Sequence[int], size: Any = Dim.DYNAMIC) -> Any:
    return dict.fromkeys(axes, size) if isinstance(leaf, Tensor) else None


def _with_batch(own: Any, given: Any) -> Any:
    """What the user gives of an input, or of a list or mapping of inputs, with the batch where nothing else is said."""
    if _is_shape(own) and _is_shape(given):
        return {**own, **given}
    if isinstance(own, Mapping) and isinstance(given, Mapping) and not _is_shape(given):
        return {name: _with_batch(part, given[name]) if name in given else part for name, part in own.items()}
    if isinstance(own, (list, tuple)) and isinstance(given, (list, tuple)) and len(own) == len(given):
        return type(given)(_with_batch(*parts) for parts in zip(own, given, strict=True))
    return given


def _bound(model: nn.Module, structure: pytree.TreeSpec, shapes: list[Any]) -> dict[str, Any]:
    """What is said of every input, by the name of the argument."""
    args, kwargs = pytree.tree_unflatten(shapes, structure)
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
