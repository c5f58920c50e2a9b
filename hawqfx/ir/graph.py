"""Tensors, sizes and names of an fx graph."""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree


def output_names(graph: fx.GraphModule) -> list[str]:
    """Names of the tensors that a graph returns.

    Args:
        graph: a captured graph.

    Returns:
        A name for every tensor, in order.  The keys and fields that lead to the tensor make its name, as in `logits` or
        `past_0`.  A tensor without a key is `output`; several of them are `output_0`, `output_1`, ...
    """
    (returned,) = next(iter(graph.graph.find_nodes(op="output"))).args
    spec = graph.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    paths = zip(pytree.tree_leaves(returned), _paths(spec, ()), strict=True)
    return ["_".join(path) or "output" for leaf, path in paths if isinstance(leaf, fx.Node)]


def _paths(spec: pytree.TreeSpec, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The keys that lead to every leaf of a structure.

    Args:
        spec: of the structure.
        path: the keys that lead to the structure itself.
    """
    children = spec.children()
    if spec.is_leaf():
        yield path
        return
    known: Any = getattr(spec.context, "_fields", spec.context)  # fields of a named tuple, or keys of a mapping
    named = isinstance(known, (list, tuple)) and len(known) == len(children) and all(isinstance(k, str) for k in known)
    for key, child in zip(known if named else map(str, range(len(children))), children, strict=True):
        yield from _paths(child, (*(path or () if named else path or ("output",)), key))


def tensor_of(graph: fx.GraphModule, key: str) -> Tensor:
    """The parameter or buffer with a qualified name."""
    owner, _, name = key.rpartition(".")
    value = getattr(graph.get_submodule(owner), name)
    assert isinstance(value, Tensor)
    return value


def constants_of(graph: fx.GraphModule) -> dict[str, Tensor]:
    """The parameters and buffers that a graph reads, by qualified name."""
    nodes = graph.graph.find_nodes(op="get_attr")
    return {str(node.target): tensor_of(graph, str(node.target)) for node in nodes}


def dependents(graph: fx.Graph, roots: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes whose values follow from those of `roots`, and these themselves."""
    found = set(roots)
    for node in graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def captured_size(size: Any) -> int:
    """A size as a number; for a symbolic size, the number that it stood for when the graph was captured."""
    return size if isinstance(size, int) else int(size.node.hint)


def symbol(size: Any) -> str:
    """A size as text; for a symbolic size, its expression."""
    return str(size) if isinstance(size, int) else str(size.node.expr)


def captured_shape(node: fx.Node) -> list[int]:
    """The shape of a node's tensor when the graph was captured, with the batch of the example."""
    return [captured_size(size) for size in node.meta["val"].shape]


def batch_size(graph: fx.Graph) -> int:
    """The number of samples in the example that the graph was captured with."""
    return captured_shape(first_input(graph))[0]


def first_input(graph: fx.Graph) -> fx.Node:
    """The first input that is a tensor; Python numbers among the inputs are constants of the graph."""
    return next(node for node in graph.find_nodes(op="placeholder") if isinstance(node.meta.get("val"), Tensor))


def copy_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy to rewrite, which leaves the old graph as it is; both share their tensors."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    copied.set_codegen(graph.graph._codegen)
    return fx.GraphModule(graph, copied)


def set_tensor(graph: fx.GraphModule, key: str, value: Tensor, *, parameter: bool) -> None:
    """Put a parameter or a buffer at a qualified name, in place of an older tensor.

    Args:
        graph: the module to change; submodules of the name are made where they are missing.
        key: the qualified name.
        value: the tensor.
        parameter: whether the tensor becomes a parameter; else it becomes a buffer.
    """
    owner, _, name = key.rpartition(".")
    module: torch.nn.Module = graph
    for part in filter(None, owner.split(".")):
        if not isinstance(getattr(module, part, None), torch.nn.Module):
            module.add_module(part, torch.nn.Module())
        module = module.get_submodule(part)
    if hasattr(module, name):  # a constant of torch.export may be neither parameter nor buffer
        delattr(module, name)
    if parameter:
        module.register_parameter(name, torch.nn.Parameter(value, requires_grad=value.is_floating_point()))
    else:
        module.register_buffer(name, value)
