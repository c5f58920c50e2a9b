"""Write the second factor of a product of activations with codes below zero, as onnxruntime's fastest kernel takes it.

The instructions of VNNI multiply unsigned by signed codes.  A layer's weight is signed; the product of two activations,
both unsigned, runs on instructions of half the speed: queries by keys of Whisper, 6 heads of 1500 x 64 by 64 x 1500, in
25 ms, and in 17 with signed keys (1.32, AVX512-VNNI, one thread; float32 39).  The codes and the zero-point less 128
are the same numbers.  Only the second factor may be signed: a product of two signed tensors takes 117 ms.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from hawqfx.ir.custom_ops import FAKE_QUANTIZE
from hawqfx.ir.operators import PRODUCTS, elements_of, operands, value_readers
from hawqfx.ir.program import Program
from hawqfx.ir.rewriter import GraphRewriter
from hawqfx.maths.affine import code_type
from hawqfx.pass_manager.base import Rewrite

OFFSET = 128  # between unsigned and signed codes


@dataclass(frozen=True)
class SignedFactors(Rewrite):
    """Gives signed codes to activations that are second factors of products, and nothing else."""

    tolerance: ClassVar[float] = 0.0

    def rewrite(self, program: Program) -> Program:
        rewriter = GraphRewriter(program)
        for node in rewriter.calls(FAKE_QUANTIZE):
            tensor, scale, *rest = node.args
            zero_point, low, high = (code for code in rest if isinstance(code, int))
            if code_type(low, high) == torch.uint8 and _is_second_factor(node):
                node.args = tensor, scale, zero_point - OFFSET, low - OFFSET, high - OFFSET
        return rewriter.done()


def _is_second_factor(node: fx.Node) -> bool:
    """Whether products read a tensor, moved or not, as their second factor, and nothing computes with it otherwise."""
    waiting, products = [node], 0
    while waiting:
        source = waiting.pop()
        for reader in value_readers(source):
            if source in elements_of(reader):
                waiting.append(reader)
            elif reader.target in PRODUCTS and operands(reader)[0] is not source:
                products += 1
            elif reader.op != "output":
                return False
    return products > 0
