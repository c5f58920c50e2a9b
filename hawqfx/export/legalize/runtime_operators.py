"""Write operators in the form for which onnxruntime has the kernel that is wanted."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from hawqfx.export.legalize.tolerances import FLIPPED_CODES
from hawqfx.ir.custom_ops import DEQUANTIZE, DEQUANTIZE_ROWS, FAKE_QUANTIZE, GLOBAL_AVERAGE
from hawqfx.ir.facts import StoredBits
from hawqfx.ir.operators import (
    EMBEDDING,
    PADS,
    TRANSPOSED_CONVOLUTIONS,
    WEIGHTED_LAYERS,
    elements_of,
    operands,
    spatial_mean,
)
from hawqfx.ir.program import Program
from hawqfx.ir.rewriter import GraphRewriter
from hawqfx.pass_manager.base import Kind, Rewrite

LEAST = "_least"  # the constant that no number is less than

_aten = torch.ops.aten


@dataclass(frozen=True)
class FloatWeights(Rewrite):
    """Keeps onnxruntime from quantizing weights that the plan leaves in float.

    onnxruntime quantizes a constant weight, of a transposed convolution too, between a DequantizeLinear and a
    QuantizeLinear by itself, to 8 bits and with one scale; also where what lies between only moves values.  It does not
    look past a maximum, and the maximum with the least number there is changes no value.
    """

    tolerance: ClassVar[float] = 0.0

    def rewrite(self, program: Program) -> Program:
        rewriter = GraphRewriter(program)
        for node in rewriter.calls():
            if node.target not in WEIGHTED_LAYERS | TRANSPOSED_CONVOLUTIONS:
                continue
            source, weight = operands(node)[:2]
            if weight.op == "get_attr" and _moved_from_codes(source):
                readers = list(node.users)
                with rewriter.after(node):
                    least = rewriter.buffer(LEAST, torch.tensor(torch.finfo(torch.float32).min))
                    kept = rewriter.call(_aten.maximum.default, node, least)
                for reader in readers:
                    reader.replace_input_with(node, kept)
        return rewriter.done()


def _moved_from_codes(node: fx.Node) -> bool:
    """Whether a quantizer makes a tensor, or what moves the values of others."""
    waiting, seen = [node], set[fx.Node]()
    while waiting:
        source = waiting.pop()
        if source.target is FAKE_QUANTIZE:
            return True
        if source not in seen:
            seen.add(source)
            waiting += [operands(source)[0]] if source.target in PADS else elements_of(source)
    return False


@dataclass(frozen=True)
class GlobalAverage(Rewrite):
    """Writes an average over all pixels as GlobalAveragePool, the only name under which it has an integer kernel."""

    tolerance: ClassVar[float] = FLIPPED_CODES

    def rewrite(self, program: Program) -> Program:
        rewriter = GraphRewriter(program)
        for node in [node for node in rewriter.calls() if spatial_mean(node)]:
            tensor = operands(node)[0]
            keeps_axes = node.target is not _aten.mean.dim or operands(node)[2:3] == (True,)
            with rewriter.before(node):
                mean = rewriter.call(GLOBAL_AVERAGE, tensor)
                if not keeps_axes:
                    mean = rewriter.call(_aten.squeeze.dims, mean, list(range(2, tensor.meta["val"].ndim)))
            rewriter.replace(node, mean, keep_name=True)
        return rewriter.done()


@dataclass(frozen=True)
class TableRows(Rewrite):
    """Dequantizes only the rows of a table that are asked for."""

    tolerance: ClassVar[float] = 0.0
    needs: ClassVar[tuple[Kind, ...]] = (StoredBits,)

    def rewrite(self, program: Program) -> Program:
        rewriter = GraphRewriter(program)
        for node in rewriter.calls(EMBEDDING):
            table, rows = operands(node)[:2]
            if table.target is DEQUANTIZE:
                with rewriter.before(node):
                    gathered = rewriter.call(DEQUANTIZE_ROWS, *operands(table), rows)
                rewriter.replace(node, gathered, keep_name=True)
        return rewriter.done()
