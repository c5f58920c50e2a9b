"""The shape of a run: the size of each dimension that varies, by its name, and a batch that is made to have it.

A run has the sizes that are asked for, and for the others one sample and the sizes of the batch that it is made of.  A
size that follows from others follows them: 8 * h where the graph was captured with torch.export's 8 * Dim("h"), and
the tokens that a decoder's mask stands for, past and new ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hawqfx.errors import BudgetError
from hawqfx.frontend import decoders
from hawqfx.frontend.data import Batch
from hawqfx.ir.graph import first_input
from hawqfx.ir.names import sizes_in_words
from hawqfx.ir.program import Program

Shape = Mapping[str, int]  # name of a dimension that varies -> its size

_SMALLEST_CAPTURED = 2  # torch.export states it as the least size wherever nobody says another; 0 and 1 run as well


def at_shape(program: Program, example: Batch, asked: Shape) -> tuple[Batch, Shape]:
    """A batch at a shape.

    Args:
        program: captured; its `dimensions` have names.
        example: the data.  A tensor is repeated along a dimension where it has fewer than are asked for, and cut where
            it has more.
        asked: sizes, by names of dimensions; those that are left out have the size of the example, and one sample.

    Returns:
        The batch, without a target; and the size of every dimension that may be asked for.

    Raises:
        BudgetError: if a name is no dimension that varies, or follows from others; or if a size is no whole number, or
            one that the graph was not captured for.
    """
    leaves, structure = pytree.tree_flatten((example.args, dict(example.kwargs)))
    axes = _axes(program, leaves, structure)
    known: dict[str, int] = {}
    for axis in axes:
        known.setdefault(axis.name, axis.size)
    sums = decoders.sums(program.dimensions)
    samples = program.dimensions.get(first_input(program.graph.graph).name, {}).get(0)
    wanted = {**({} if samples is None else {samples: 1}), **with_sums(asked, known, sums)}
    # a tensor without a batch dimension has another size there than the first input, and stays whole
    named = [axis for axis in axes if axis.size == known[axis.name]]
    symbols: dict[Any, int] = {}
    for axis in named:
        if axis.name in wanted:
            axis.solve(wanted[axis.name], symbols, checked=axis.name in asked)
    for axis in axes:
        axis.solve(axis.size, symbols, checked=False)
    for axis in axes:
        leaves[axis.leaf] = resized(leaves[axis.leaf], axis.number, axis.at(symbols))
    args, kwargs = pytree.tree_unflatten(leaves, structure)
    shape: dict[str, int] = {}
    for axis in named:
        if axis.name not in sums:
            shape.setdefault(axis.name, axis.at(symbols))
    return Batch(args, kwargs), shape


@torch.no_grad()
def check_shape(program: Program, example: Batch, asked: Shape) -> None:
    """Run a network once at a shape.

    Args:
        program: captured.
        example: as for `at_shape`.
        asked: likewise.

    Raises:
        BudgetError: as `at_shape` does, or if the graph cannot take the shape, or computes nothing there.
    """
    batch, shape = at_shape(program, example, asked)
    try:
        output = program.run(batch.args, batch.kwargs)
    except Exception as error:  # operators raise whatever they like
        reason = str(error).partition("\n")[0]
        raise BudgetError(f"the network cannot run at {sizes_in_words(shape)}: {reason}") from error
    if any(isinstance(leaf, Tensor) and leaf.numel() == 0 for leaf in pytree.tree_leaves(output)):
        raise BudgetError(f"the network computes nothing at {sizes_in_words(shape)}: give sizes above zero")


@dataclass(frozen=True)
class _Axis:
    """A dimension of an input that varies.

    Args:
        leaf: number of the tensor among the leaves of a batch.
        number: of the dimension.
        name: in files.
        size: in the batch.
        captured: the size in the captured graph, symbolic and linear in one symbol.
    """

    leaf: int
    number: int
    name: str
    size: int
    captured: Any

    def at(self, symbols: Mapping[Any, int]) -> int:
        """The size where the symbols have these values."""
        return int(self.captured.node.expr.subs(symbols))

    def solve(self, size: int, symbols: dict[Any, int], *, checked: bool) -> None:
        """Give the symbol the value that makes the size, unless it has one.

        Raises:
            BudgetError: if the size is checked, and no value makes it or the graph was captured for others.
        """
        (symbol,) = self.captured.node.expr.free_symbols
        start = self.at({symbol: 0})
        value, rest = divmod(size - start, self.at({symbol: 1}) - start)
        value = symbols.setdefault(symbol, value)
        if not checked:
            return
        if rest or self.at({symbol: value}) != size:
            raise BudgetError(f"{self.name}={size}: the network takes {self.captured.node.expr} there, whole numbers")
        known = self.captured.node.shape_env.var_to_range.get(symbol)
        if known is None:
            return
        if value > known.upper:
            raise BudgetError(
                f"{self.name}={size}: the network was captured for at most {self.at({symbol: known.upper})}"
            )
        if value < known.lower and known.lower > _SMALLEST_CAPTURED:
            raise BudgetError(
                f"{self.name}={size}: the network was captured for at least {self.at({symbol: known.lower})}"
            )


def _axes(program: Program, leaves: Sequence[Any], structure: pytree.TreeSpec) -> list[_Axis]:
    """The dimensions that vary, in the order of the graph's inputs."""
    args, kwargs = pytree.tree_unflatten(range(len(leaves)), structure)
    inputs = program.graph.graph.find_nodes(op="placeholder")
    return [
        _Axis(leaf, axis, name, leaves[leaf].shape[axis], node.meta["val"].shape[axis])
        for node, leaf in zip(inputs, program.flat_inputs(args, kwargs), strict=True)
        for axis, name in program.dimensions.get(node.name, {}).items()
    ]


def with_sums(asked: Shape, known: Shape, sums: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """The sizes that are asked for, and those that are sums of them and others.

    Args:
        asked: sizes, by names of dimensions.
        known: the size of every dimension that varies, where nothing is asked.
        sums: of the dimensions that are sums, the names of the parts, see hawqfx.frontend.decoders.

    Raises:
        BudgetError: if a name is no dimension that varies, or follows from others; or if a size is no whole number.
    """
    names = [name for name in known if name not in sums]
    for name, size in asked.items():
        if name in sums:
            raise BudgetError(f"{name}={size}: it is {' + '.join(sums[name])}; give those")
        if name not in names:
            raise BudgetError(
                f"{name}={size}: of this network {', '.join(names) or 'nothing'} varies, and no {name!r}; "
                "dynamic_shapes= names more dimensions"
            )
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise BudgetError(f"{name}={size!r}: a size is a whole number")
    return {**asked, **{name: sum(asked.get(part, known[part]) for part in parts) for name, parts in sums.items()}}


def resized(tensor: Tensor, axis: int, size: int) -> Tensor:
    """A tensor that is cut or repeated along a dimension; zeros, where it is empty."""
    have = tensor.shape[axis]
    if have == size:
        return tensor
    if have == 0:
        return tensor.new_zeros((*tensor.shape[:axis], size, *tensor.shape[axis + 1 :]))
    return tensor.index_select(axis, torch.arange(size, device=tensor.device) % have)
