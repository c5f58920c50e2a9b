"""The function that makes a network's output, as the last operators of its graph tell."""

from typing import Any, Literal

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from hawqfx.frontend.criteria import SUMS_TO_ONE
from hawqfx.frontend.data import Batch
from hawqfx.ir.operators import LOG_SOFTMAXES, SIGMOIDS, SOFTMAXES, elements_of
from hawqfx.ir.program import Program

Ending = Literal["softmax", "log_softmax", "sigmoid"]


def run_with_endings(program: Program, batch: Batch) -> tuple[Any, list[tuple[Tensor, Ending | None]]]:
    """The output of a captured network on a batch, and the function that makes each tensor in it, behind operators that
    only move elements; None for another function, or several."""
    (returned,) = next(iter(program.graph.graph.find_nodes(op="output"))).args
    nodes = {leaf.name: leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, fx.Node)}
    made: list[tuple[Tensor, Ending | None]] = []

    def see(name: str, value: Tensor) -> Tensor:
        made.append((value, _ending(nodes[name])))
        return value

    return program.run(batch.args, batch.kwargs, see, at=nodes), made


def class_axis(tensor: Tensor, made_by: Ending) -> int | None:
    """The dimension of the classes in the output of a softmax: the one along which probabilities add up to one.

    Operators behind the softmax may have moved its own dimension, or parted it, so that there is none.  Where several
    dimensions of more than one element do so, as where all probabilities are equal, it is the last of them.
    """
    probabilities = tensor.detach() if made_by == "softmax" else tensor.detach().exp()
    axes = [
        axis
        for axis in range(tensor.ndim - 1, 0, -1)
        if tensor.shape[axis] > 1 and bool(((probabilities.sum(axis) - 1).abs() < SUMS_TO_ONE).all())
    ]
    return axes[0] if axes else None


def _ending(node: fx.Node) -> Ending | None:
    kinds: dict[Ending, set[Any]] = {"softmax": SOFTMAXES, "log_softmax": LOG_SOFTMAXES, "sigmoid": SIGMOIDS}
    for name, targets in kinds.items():
        if node.target in targets:
            return name
    endings = {_ending(source) for source in elements_of(node)}
    return endings.pop() if len(endings) == 1 else None
