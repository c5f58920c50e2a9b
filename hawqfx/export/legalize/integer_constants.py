"""Store weights and biases as integer codes: dequantize(codes) takes the place of fake_quantize(constant)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from hawqfx.errors import ExportError
from hawqfx.ir.custom_ops import DEQUANTIZE, FAKE_QUANTIZE
from hawqfx.ir.facts import ChosenFormat, Quantizers, StoredBits
from hawqfx.ir.operators import operands
from hawqfx.ir.program import Program
from hawqfx.ir.quantizers import nearest_codes
from hawqfx.ir.rewriter import GraphRewriter
from hawqfx.maths import affine
from hawqfx.pass_manager.base import Kind, Rewrite


@dataclass(frozen=True)
class IntegerConstants(Rewrite):
    """Stores weights and biases as integer codes."""

    tolerance: ClassVar[float] = 0.0
    gives: ClassVar[tuple[Kind, ...]] = (StoredBits,)

    def rewrite(self, program: Program) -> Program:
        rewriter = GraphRewriter(program)
        bits: dict[str, int | tuple[int, ...]] = {}
        for number, node in enumerate(rewriter.calls(FAKE_QUANTIZE)):
            constant, scale, zero_point, low, high = operands(node)
            if constant.op != "get_attr":
                continue
            assert zero_point == 0
            key = str(constant.target)
            codes = affine.quantize(program.tensor(key).detach(), _scale(rewriter, scale), 0, low, high)
            if codes.dtype == torch.int8:
                bits[key] = _rows(program, key, codes) or (high - low + 1).bit_length() - 1
            else:  # several layers may share a bias, and each of them has codes of its own
                key = f"{key}_{number}"
            with rewriter.before(node):
                dequantized = rewriter.call(DEQUANTIZE, rewriter.buffer(key, codes), scale, like=node)
            rewriter.replace(node, dequantized)
        return rewriter.done().learn_about_network(StoredBits(bits))


def _rows(program: Program, key: str, codes: Tensor) -> tuple[int, ...]:
    """Bits of the rows of a weight that has bits of its own for them; else none.

    Raises:
        ExportError: if a row's codes have more, as training of the lowered graph may make them, whose quantizer ends
            where that of the widest row does.
    """
    if not program.facts.has(key, ChosenFormat):
        return ()
    quantizer = program.facts.get(key, Quantizers).by_format[program.facts.get(key, ChosenFormat).format]
    if quantizer.rows:
        wide = (nearest_codes(codes.float(), quantizer) != codes).flatten(1).any(1).nonzero()
        if len(wide):
            raise ExportError(
                f"{len(wide)} rows of {key!r} have values that their bits do not hold, row {int(wide[0])} with "
                f"{quantizer.rows[int(wide[0])]} bits first: train with that table frozen, or compile what was trained"
            )
    return quantizer.rows


def _scale(rewriter: GraphRewriter, node: fx.Node) -> Tensor:
    """The value of a scale: a buffer, or the product of two."""
    if node.op == "get_attr":
        return rewriter.value(node)
    one, other = (_scale(rewriter, factor) for factor in node.all_input_nodes)
    return one * other
