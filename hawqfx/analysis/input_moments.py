"""The second moments of the inputs of every weight, over two halves of the calibration samples.

A rounding that is fitted to one half is judged by the other: what fits the noise of few samples does not fit others.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from hawqfx.frontend.context import Context
from hawqfx.frontend.data import sample_axis
from hawqfx.ir.operators import operands
from hawqfx.ir.program import Program
from hawqfx.ir.sites import Layer
from hawqfx.maths import rounding


@dataclass(frozen=True, eq=False)
class InputMoments:
    """E[x x^T] of the inputs x of a weight.

    Args:
        halves: (2, groups, K, K) in float64, over each half of the samples; (1, groups, K, K) for a single sample.
        shares: (2,) or (1,), the part of the samples that is in each half.
    """

    halves: Tensor
    shares: Tensor

    @property
    def whole(self) -> Tensor:
        """(groups, K, K), over all samples."""
        return torch.einsum("h,hgij->gij", self.shares, self.halves)


class _Sums:
    """The sums that the moments of a weight are made of, half by half."""

    def __init__(self) -> None:
        self.moments: dict[int, Tensor] = {}
        self.shares: dict[int, float] = {}

    def add(self, half: int, share: float, moment: Tensor) -> None:
        self.moments[half] = self.moments.get(half, 0) + share * moment
        self.shares[half] = self.shares.get(half, 0.0) + share

    def moment(self) -> InputMoments:
        """The shares of a weight that several layers use add up to more than one; its moment is the sum over them."""
        shares = torch.tensor([self.shares[half] for half in self.shares], dtype=torch.float64)
        uses = float(shares.sum())
        halves = torch.stack([moment * uses / self.shares[half] for half, moment in self.moments.items()])
        return InputMoments(halves, (shares / uses).to(halves.device))


@torch.no_grad()
def input_moments(program: Program, context: Context) -> dict[str, InputMoments]:
    """The moments of every weight that a layer multiplies by, over all layers that use it."""
    nodes = {node.name: node for node in program.graph.graph.nodes}
    readers: dict[str, list[Layer]] = {}
    for layer in program.layers:
        readers.setdefault(operands(nodes[layer.node])[0].name, []).append(layer)
    sums: dict[str, _Sums] = {}
    for index, batch in enumerate(context.track(context.batches, "rounding", len(context.batches))):

        def add(name: str, value: Tensor, index: int = index, size: int = batch.size) -> Tensor:
            for half, part, samples in _halves(value, size, index):
                for layer in readers[name]:
                    rows = _rows(part, nodes[layer.node], layer, program.tensor(layer.weight))
                    own = sums.setdefault(layer.weight, _Sums())
                    own.add(half, samples / context.samples, rounding.second_moment(rows))
            return value

        program.run(batch.args, batch.kwargs, add, at=readers)
    return {key: own.moment() for key, own in sums.items()}


def _halves(value: Tensor, size: int, index: int) -> Iterator[tuple[int, Tensor, int]]:
    """The halves of a batch's samples in a tensor: number of the half, its part, its samples.  A single sample goes to
    one half, by the number of the batch."""
    axis = sample_axis(value, size)
    if size == 1 or axis is None:
        yield index % 2, value, size
        return
    each = value.shape[axis] // size
    first = size // 2
    yield 0, value.narrow(axis, 0, first * each), first
    yield 1, value.narrow(axis, first * each, (size - first) * each), size - first


def _rows(x: Tensor, node: fx.Node, layer: Layer, weight: Tensor) -> Tensor:
    """The vectors (groups, rows, K) that a layer multiplies its weight by."""
    if layer.operator == "linear":
        return x.reshape(1, -1, x.shape[-1])
    dims = weight.ndim - 2
    rest: tuple[Any, ...] = (*operands(node)[3:], *(1, 0, 1, 1)[max(0, len(node.args) - 3) :])
    stride, padding, dilation, groups = rest

    def per_dimension(value: Any) -> list[int]:
        values = value if isinstance(value, (list, tuple)) else [value]
        return [int(v) for v in values] * (dims if len(values) == 1 else 1)

    pads = padding if isinstance(padding, str) else per_dimension(padding)
    return rounding.patches(x, weight.shape[2:], per_dimension(stride), pads, per_dimension(dilation), int(groups))
