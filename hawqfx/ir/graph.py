"""Tensors, sizes and names of an fx graph."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree


def output_names(graph: fx.GraphModule) -> list[str]:
    """Names of the tensors that a graph returns, in order: the keys or fields that lead to them, as in `logits` or
    `past_0`, else `output`, or `output_0`, ... where there are several."""
    (returned,) = next(iter(graph.graph.find_nodes(op="output"))).args
    spec = graph.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    paths = zip(pytree.tree_leaves(returned), _paths(spec, ()), strict=True)
    return ["_".join(path) or "output" for leaf, path in paths if isinstance(leaf, fx.Node)]


def _paths(spec: pytree.TreeSpec, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The keys that lead to each leaf."""
    children = spec.children()
    if spec.is_leaf():
        yield path
        return
    known: Any = getattr(spec.context, "_fields", spec.context)  # a named tuple's, or the keys of a dict and its like
    named = isinstance(known, (list, tuple)) and len(known) == len(children) and all(isinstance(k, str) for k in known)
    for key, child in zip(known if named else map(str, range(len(children))), children, strict=True):
        yield from _paths(child, (*(path or () if named else path or ("output",)), key))


def tensor_of(graph: fx.GraphModule, key: str) -> Tensor:
    """The parameter or buffer of a graph with this qualified name."""
    owner, _, name = key.rpartition(".")
    value = getattr(graph.get_submodule(owner), name)
    assert isinstance(value, Tensor)
    return value


def constants_of(graph: fx.GraphModule) -> dict[str, Tensor]:
    """The parameters and buffers that a graph reads, by qualified name."""
    nodes = graph.graph.find_nodes(op="get_attr")
    return {str(node.target): tensor_of(graph, str(node.target)) for node in nodes}


def captured_size(size: Any) -> int:
    """A size, or the value that a symbolic size had when the graph was captured."""
    return size if isinstance(size, int) else int(size.node.hint)


def captured_shape(node: fx.Node) -> list[int]:
    """The shape of a node's tensor when the graph was captured, with the batch of the example."""
    return [captured_size(size) for size in node.meta["val"].shape]


def batch_size(graph: fx.Graph) -> int:
    """The number of samples in the example that the graph was captured with."""
    return captured_shape(next(iter(graph.find_nodes(op="placeholder"))))[0]


def copy_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """A graph that can be rewritten while the old one stays as it was; the tensors are shared."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    copied.set_codegen(graph.graph._codegen)
    return fx.GraphModule(graph, copied)


def set_tensor(graph: fx.GraphModule, key: str, value: Tensor, *, parameter: bool) -> None:
    """Put a parameter or a buffer at a qualified name, over what was there."""
    owner, _, name = key.rpartition(".")
    module: torch.nn.Module = graph
    for part in filter(None, owner.split(".")):
        if not isinstance(getattr(module, part, None), torch.nn.Module):
            module.add_module(part, torch.nn.Module())
        module = module.get_submodule(part)
    if name in module._parameters or name in module._buffers:
        delattr(module, name)
    if parameter:
        module.register_parameter(name, torch.nn.Parameter(value, requires_grad=value.is_floating_point()))
    else:
        module.register_buffer(name, value)
