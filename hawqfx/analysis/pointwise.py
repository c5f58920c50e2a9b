"""Functions of each value of a tensor, such as SiLU, GELU and their like, as the nodes that compute them."""

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor, fx

from hawqfx.ir.operators import is_pointwise, value_readers
from hawqfx.maths import curvature

Function = Callable[[Tensor], Tensor]


def nonlinearity(source: fx.Node) -> list[fx.Node]:
    """The nodes that make one function of each value of `source`, if nothing else reads it, to the first that all of
    it goes through; else none."""
    body: list[fx.Node] = []
    inside, node = {source}, source.next
    while node.op != "root":
        if is_pointwise(node) and node.all_input_nodes and set(node.all_input_nodes) <= inside:
            body.append(node)
            inside.add(node)
            if all(user in inside for member in inside - {node} for user in value_readers(member)):
                return body
        node = node.next
    return []


def evaluate(body: Sequence[fx.Node], source: fx.Node, values: Tensor) -> Tensor:
    """What the nodes make of `values`, as values of `source`."""
    known = {source: values}
    for node in body:
        assert callable(node.target)
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        known[node] = node.target(*args, **kwargs)
    return known[body[-1]] if body else values


def function_of(graph: fx.Graph, tied: Collection[str]) -> Function | None:
    """The function that is all that is read of tensors, by the names of their nodes, which are those of one tensor
    moved about; None if other things are read of them."""
    sources = [n for n in graph.nodes if n.name in tied and not {user.name for user in value_readers(n)} <= set(tied)]
    body = nonlinearity(sources[0]) if len(sources) == 1 else []
    return partial(evaluate, body, sources[0]) if body else None


def square_slope(function: Function, values: Tensor) -> float:
    """The sum over `values` of the squared derivative."""
    with torch.enable_grad():
        at = values.detach().requires_grad_()
        (slope,) = torch.autograd.grad(function(at).sum(), at)
    return curvature.dot(slope, slope)
