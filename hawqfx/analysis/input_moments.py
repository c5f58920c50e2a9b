"""The second moments of the inputs of every weight, over two halves of the calibration samples.

A rounding that is fitted to one half is judged by the other: what fits the noise of few samples does not fit others.
A weight of very many columns has the moments of blocks of columns alone, since those of K columns are K x K numbers.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from hawqfx.errors import DataError
from hawqfx.frontend.context import Context
from hawqfx.frontend.data import sample_axis
from hawqfx.ir.operators import EMBEDDING, operands
from hawqfx.ir.program import Program
from hawqfx.ir.sites import Layer
from hawqfx.maths import rounding

# Binary exponents of inputs whose squares are not at home in float32; they are brought to about one by a power of two,
# which is exact, and which is a float32 number itself up to the second of these.
_SAFE, _MOST = 32, 126

# The identity in the moment of a table that is the head too, in units of the mean of the diagonal, if the loss has no
# distribution to draw from (otherwise: table_moments.py).  SmolLM2-135M, the table alone with 3 bits in blocks of 32:
# perplexity 44.9 with 0, 41.9 with .1, 42.3 with 1, 50.9 with the identity alone; 32.9 in float.
LOOKED_UP = 0.1

_TOGETHER = 1 << 20  # elements of moments that are worked on at once, unless those of a single block are more


@dataclass(frozen=True)
class Part:
    """Blocks of columns, of equal widths and side by side, that are worked on at once.

    Args:
        columns: of all of the blocks.
        blocks: their number.
    """

    columns: slice
    blocks: int

    @property
    def width(self) -> int:
        return (self.columns.stop - self.columns.start) // self.blocks

    def of(self, rows: Tensor) -> Tensor:
        """Rows (groups, R, columns) block by block, (groups * blocks, R, width)."""
        groups, count, _ = rows.shape
        return rows.reshape(groups, count, self.blocks, self.width).transpose(1, 2).reshape(-1, count, self.width)


def parts_of(groups: int, columns: int, width: int) -> list[Part]:
    """The columns of a weight in as few blocks of at most `width` as there can be, all but the last of one width."""
    width = -(-columns // -(-columns // width))
    whole, at_once = columns // width, max(1, _TOGETHER // (groups * width**2))
    parts = []
    for start in range(0, whole, at_once):
        stop = min(whole, start + at_once)
        parts.append(Part(slice(start * width, stop * width), stop - start))
    return parts + [Part(slice(whole * width, columns), 1)] * (columns % width > 0)


@dataclass(frozen=True, eq=False)
class InputMoments:
    """E[x x^T] of inputs x of a weight: of all its columns, or of some blocks of columns, each by itself.

    Args:
        part: the blocks.
        halves: (2, groups * blocks, K, K) in float64, over each half of the samples, K being the columns of a block;
            (1, ...) for a single sample.
        shares: (2,) or (1,), the part of the samples that is in each half.
        energy: (groups * blocks,), the mean square of these inputs in units of that of all inputs of the weight, group
            by group.
    """

    part: Part
    halves: Tensor
    shares: Tensor
    energy: Tensor

    @property
    def whole(self) -> Tensor:
        """(groups * blocks, K, K), over all samples."""
        return torch.einsum("h,hgij->gij", self.shares, self.halves)


class Sums:
    """The sums that the moments of a weight are made of, half by half.

    Args:
        groups: of the weight.
        parts: of its columns.
        table: whether rows of the weight are looked up too, which is told by LOOKED_UP.
    """

    def __init__(self, groups: int, parts: list[Part], *, table: bool = False) -> None:
        self.groups, self.parts, self.table = groups, parts, table
        self.moments: list[dict[int, Tensor]] = [{} for _ in parts]
        self.shares: dict[int, float] = {}

    def add(self, half: int, share: float, moment_of: Callable[[Part], Tensor]) -> None:
        """Add the moments of some samples, which are such a share of all."""
        for part, known in zip(self.parts, self.moments, strict=True):
            moment = moment_of(part).mul_(share)
            known[half] = known[half].add_(moment) if half in known else moment
        self.shares[half] = self.shares.get(half, 0.0) + share

    def finished(self) -> tuple[InputMoments, ...]:
        """The shares of a weight that several layers use add up to more than one; its moment is the sum over them."""
        shares = torch.tensor(list(self.shares.values()), dtype=torch.float64)
        uses, found = float(shares.sum()), []
        for moments in self.moments:
            found.append(torch.stack([moments[half].mul_(uses / share) for half, share in self.shares.items()]))
            moments.clear()  # those of a wide weight are not held twice
            if self.table:
                diagonal = found[-1].diagonal(dim1=2, dim2=3)
                diagonal += LOOKED_UP * diagonal.mean(2, keepdim=True)
        shares = (shares / uses).to(found[0].device)
        squares = [torch.einsum("h,hgii->g", shares, halves).reshape(self.groups, -1) for halves in found]
        mean = torch.cat(squares, 1).sum(1, keepdim=True) / self.parts[-1].columns.stop
        return tuple(
            InputMoments(part, halves, shares, torch.where(mean > 0, square / part.width / mean, 1.0).flatten())
            for part, halves, square in zip(self.parts, found, squares, strict=True)
        )


def groups_of(node: fx.Node, layer: Layer) -> int:
    """The groups of input channels that a layer multiplies by themselves."""
    return 1 if layer.operator == "linear" else int(_geometry(node)[3])


def looked_up(program: Program) -> set[str]:
    """The tables: weights whose rows are looked up, whatever else reads them."""
    nodes = program.graph.graph.find_nodes(op="get_attr")
    return {str(node.target) for node in nodes if any(user.target is EMBEDDING for user in node.users)}


@torch.no_grad()
def input_moments(program: Program, context: Context, widths: Mapping[str, int]) -> dict[str, tuple[InputMoments, ...]]:
    """The moments of weights that layers multiply by, over all layers that use each, block by block.

    What is looked up in a table is wrong by the whole of a row's error, in any direction.  So the moment of one that is
    the head too has a part of the identity beside the inputs', LOOKED_UP.

    Args:
        program: the float network.
        context: the samples.
        widths: weight -> the most columns of a block.

    Raises:
        DataError: if the inputs of a layer are not finite.
    """
    nodes = {node.name: node for node in program.graph.graph.nodes}
    tables = looked_up(program)
    readers: dict[str, list[Layer]] = {}
    for layer in program.layers:
        if layer.weight in widths:
            readers.setdefault(operands(nodes[layer.node])[0].name, []).append(layer)
    sums: dict[str, Sums] = {}
    for index, batch in enumerate(context.track(context.batches, "rounding", len(context.batches))):

        def add(name: str, value: Tensor, index: int = index, size: int = batch.size) -> Tensor:
            if not torch.isfinite(value).all():
                raise DataError(
                    f"the input of {readers[name][0].weight!r} is not finite on batch {index}: the network overflows "
                    "on these data"
                )
            for half, part, samples in halves(value, size, index):
                for layer in readers[name]:
                    node, weight = nodes[layer.node], program.tensor(layer.weight)
                    if layer.weight not in sums:
                        groups = groups_of(node, layer)
                        parts = parts_of(groups, weight[0].numel(), widths[layer.weight])
                        sums[layer.weight] = Sums(groups, parts, table=layer.weight in tables)
                    share = samples / context.samples
                    sums[layer.weight].add(half, share, Rows(part, node, layer, weight, share).moment)
            return value

        program.run(batch.args, batch.kwargs, add, at=readers)
    return {key: sums.pop(key).finished() for key in list(sums)}


def halves(value: Tensor, size: int, index: int) -> Iterator[tuple[int, Tensor, int]]:
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


class Rows:
    """The vectors that a layer multiplies its weight by, in units of a power of two.

    Args:
        x: the input of the layer.
        node: of the layer.
        layer: the layer.
        weight: its weight.
        share: the part of all samples that is in x.
        fewest: rows that moments of half of the samples are taken over, at least.
        per_column: rows for each column, likewise.
        exponent: of the unit; None: one that keeps the squares of x at home in float32.
    """

    def __init__(
        self,
        x: Tensor,
        node: fx.Node,
        layer: Layer,
        weight: Tensor,
        share: float,
        fewest: int = rounding.FEWEST_ROWS,
        per_column: int = rounding.ROWS_PER_COLUMN,
        exponent: int | None = None,
    ) -> None:
        if exponent is None:
            exponent = int(torch.frexp(x.abs().max()).exponent)
            exponent = 0 if abs(exponent) < _SAFE else max(-_MOST, min(exponent, _MOST))
        self.exponent, self.fewest, self.per_column = exponent, fewest, per_column
        self.x = x * 2.0**-exponent if exponent else x
        self.node, self.layer, self.kernel, self.share = node, layer, weight.shape[2:], share

    def moment(self, part: Part) -> Tensor:
        """(groups * blocks, K, K) in float64, of blocks of K columns."""
        return rounding.second_moment(part.of(self.vectors(part))) * 4.0**self.exponent

    def vectors(self, part: Part) -> Tensor:
        """(groups, rows, columns) of the part."""
        # of all samples; each half has about half of them
        rows_of_half = max(self.fewest, self.per_column * part.width)
        most = math.ceil(2 * self.share * rows_of_half)
        if self.layer.operator == "linear":
            vectors = self.x.reshape(-1, self.x.shape[-1])
            return vectors[rounding.spread(len(vectors), most, vectors.device), part.columns][None]
        stride, padding, dilation, groups = _geometry(self.node)
        dims = len(self.kernel)
        pads = padding if isinstance(padding, str) else _per_dimension(padding, dims)
        strides, dilations = _per_dimension(stride, dims), _per_dimension(dilation, dims)
        return rounding.patches(self.x, self.kernel, strides, pads, dilations, int(groups), part.columns, most)


def _geometry(node: fx.Node) -> tuple[Any, Any, Any, Any]:
    """Stride, padding, dilation and groups of a convolution."""
    given: tuple[Any, ...] = operands(node)[3:]
    return (*given, *(1, 0, 1, 1)[len(given) :])


def _per_dimension(value: Any, dims: int) -> list[int]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [int(v) for v in values] * (dims if len(values) == 1 else 1)
