"""Pointwise functions, such as SiLU and GELU, as the nodes of a graph that compute them."""

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor, fx

from hawqfx.ir.operators import is_pointwise, value_readers

Function = Callable[[Tensor], Tensor]


def nonlinearity(source: fx.Node) -> list[fx.Node]:
    """The nodes that compute a pointwise function of the values of `source`.

    Args:
        source: a node with a tensor.

    Returns:
        The nodes in the order of the graph.  The last of them is the first node that all values pass through.  The list
        is empty if other nodes read the values too.
    """
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
    """Compute the function that `nonlinearity` returns the nodes of.

    Args:
        body: the nodes of the function, in the order of the graph.
        source: the node whose values the function takes.
        values: of any shape; they stand in for the values of `source`.

    Returns:
        A tensor in the shape of `values`; `values` itself if there are no nodes.
    """
    known = {source: values}
    for node in body:
        assert callable(node.target)
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        known[node] = node.target(*args, **kwargs)
    return known[body[-1]] if body else values


def function_of(graph: fx.Graph, tied: Collection[str]) -> Function | None:
    """The pointwise function through which the rest of the graph reads a tensor.

    Args:
        graph: of the nodes.
        tied: names of the nodes that make or move the tensor.

    Returns:
        The function, from a tensor to a tensor of the same shape; None if there is no such function, or if other nodes
        read the values too.
    """
    sources = [n for n in graph.nodes if n.name in tied and not {user.name for user in value_readers(n)} <= set(tied)]
    body = nonlinearity(sources[0]) if len(sources) == 1 else []
    return partial(evaluate, body, sources[0]) if body else None


def mean_square_slope(function: Function, values: Tensor, counts: Tensor) -> float:
    """The mean of the squared derivative of a pointwise function over a histogram.

    Args:
        function: from a tensor to a tensor of the same shape.
        values: (B,) where the derivatives are taken.
        counts: (B,) how often each value occurs.
    """
    with torch.enable_grad():
        inputs = values.detach().requires_grad_()
        (slope,) = torch.autograd.grad(function(inputs).sum(), inputs)
    return float((slope.square() * counts).sum() / counts.sum())
