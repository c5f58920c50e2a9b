"""Take out of a table of words what all of its rows have in common, and bring its columns to one range.

A table has a scale for each row, and its columns may lie far apart: in that of Whisper tiny.en one of 384 is .31 in
every row, where the others are about .01, and leaves them few codes.  So the table is parted,

    W = W' diag(s) + 1 m^T,

with the mean m and the deviation s of each column.  A row that is looked up becomes s W'_v + m; a head that multiplies
by the same table, W x = W' (s x) + (m . x) 1.  Both are sums and products of floats beside a look-up or a product of
all words, and nothing changes in float.

Rounded to the nearest with 4 bits, that table has an error of .92 of the energy of W - 1 m^T before, and of .021
afterwards.  With the square root of s, which would leave half of the range to the head's input, as SmoothQuant does
between two tensors that are rounded (Xiao et al., ICML 2023, equation 4), it is .035, and the decoder loses more: .045
nats a token in place of .020 with uniform 4 bits, .040 in place of .029 with 4 bits on average (16 recordings
calibrate, 48 sentences; the input has 8 bits).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from hawqfx.ir.operators import EMBEDDING, kept_in_float, operands
from hawqfx.ir.program import Program
from hawqfx.ir.rewriter import GraphRewriter
from hawqfx.pass_manager.base import Rewrite, option

_aten = torch.ops.aten
LEAST = 2.0**-12  # of the largest deviation: with less, a column counts as constant
FEWEST = 128  # rows: of fewer, m and s take as many bytes as a bit or two of each number


@dataclass(frozen=True)
class NormalizeTables(Rewrite):
    """Takes out of tables of words what their rows have in common, and brings columns to one range."""

    gain: float = option(16.0, "the least fall of the quantizer's squared error, as a factor; 16 is worth two bits")
    keep_float: tuple[str, ...] = option((), "patterns, as in a shell, of weights whose layers stay in float")
    tolerance: ClassVar[float] = 1e-4  # float32 rounding through a deep network

    def rewrite(self, program: Program) -> Program:
        rewriter, changed = GraphRewriter(program), False
        for key, readers in _tables(rewriter).items():
            if any(kept_in_float(reader, self.keep_float) for reader in readers):
                continue
            table = rewriter.value(_constant(readers[0]))
            if len(table) < FEWEST:
                continue
            means = table.mean(0)
            deviation = table.std(0, correction=0)
            scale = deviation.clamp_min(LEAST * float(deviation.max()))
            normal = (table - means).div_(scale)
            if _error(normal, scale) * self.gain < _error(table, torch.ones_like(scale)):
                _normalize(rewriter, key, readers, normal, scale, means)
                changed = True
        return rewriter.done() if changed else program


def _place(reader: fx.Node) -> int:
    """The argument of a look-up or a linear layer that is its table."""
    return 0 if reader.target is EMBEDDING else 1


def _constant(reader: fx.Node) -> fx.Node:
    return operands(reader)[_place(reader)]


def _tables(rewriter: GraphRewriter) -> dict[str, list[fx.Node]]:
    """Key -> the nodes that read it, of tables of numbers that are looked up, and that nothing but linear layers reads
    beside."""
    readers: dict[str, list[fx.Node]] = {}
    for node in rewriter.graph.find_nodes(op="get_attr"):
        readers.setdefault(str(node.target), []).extend(node.users)
    return {key: users for key, users in readers.items() if _is_table(key, users)}


def _is_table(key: str, users: list[fx.Node]) -> bool:
    def alone(user: fx.Node) -> bool:
        """Whether a node looks up rows of the table or multiplies by it, and reads it in no other place."""
        if user.target not in (EMBEDDING, _aten.linear.default) or user.kwargs:
            return False
        places = [at for at, source in enumerate(user.args) if isinstance(source, fx.Node) and source.target == key]
        return places == [_place(user)]

    return any(user.target is EMBEDDING for user in users) and all(map(alone, users))


def _error(table: Tensor, scale: Tensor) -> float:
    """What rounding leaves of a table whose columns are multiplied by `scale`, up to a factor: the square of each row's
    largest number, over all rows, times those of the columns."""
    largest = torch.maximum(table.amax(1), -table.amin(1)).double()
    return float(largest.square().sum() * scale.double().square().sum())


def _normalize(
    rewriter: GraphRewriter, key: str, readers: list[fx.Node], normal: Tensor, scale: Tensor, means: Tensor
) -> None:
    """Put another table in the place of one, and give what reads it the values of before."""
    constant = _constant(readers[0])
    rewriter.store(key, normal, parameter=True)
    for reader in readers:
        with rewriter.before(reader):
            columns = rewriter.buffer(f"{key}_columns", scale, constant)
            shared = rewriter.buffer(f"{key}_means", means, constant)
            if reader.target is not EMBEDDING:
                source = reader.args[0]
                reader.update_arg(0, rewriter.call(_aten.mul.Tensor, source, columns))
                shared = rewriter.call(_aten.mul.Tensor, source, shared)
                shared = rewriter.call(_aten.sum.dim_IntList, shared, [-1], True)
        users = list(reader.users)
        with rewriter.after(reader):
            found = reader
            if reader.target is EMBEDDING:
                found = rewriter.call(_aten.mul.Tensor, reader, columns, like=reader)
            whole = rewriter.call(_aten.add.Tensor, found, shared, like=reader)
        for user in users:
            user.replace_input_with(reader, whole)
