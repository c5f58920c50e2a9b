"""Write the second factor of a product of activations with codes below zero, as onnxruntime's fastest kernel takes it.

The instructions of VNNI multiply unsigned by signed codes.  A layer's weight is signed; the product of two activations,
both unsigned, runs on others: queries by keys of Whisper, 6 heads of 1500 x 64 by 64 x 1500, in 13.2 ms, and in 7.7
with signed keys; weights by values in 13.3 and 8.0 (1.32, AVX512-VNNI, one thread; float32 18.1 and 17.4).  The codes
and the zero-point less 128 are the same numbers.  Only the second factor may be signed: a product of two signed tensors
takes 59 ms.

onnxruntime makes signed codes unsigned again where a DequantizeLinear follows on the QuantizeLinear.  Keys and values
of several heads are permuted before the product, and what is permuted between the two, as here, stays signed.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from hawqfx.ir.custom_ops import FAKE_QUANTIZE, PERMUTE_CODES
from hawqfx.ir.graph import captured_shape
from hawqfx.ir.operators import PRODUCTS, operands, value_readers
from hawqfx.ir.program import Program
from hawqfx.ir.rewriter import GraphRewriter
from hawqfx.maths.affine import code_type
from hawqfx.pass_manager.base import Rewrite

OFFSET = 128  # between unsigned and signed codes
# Rows of the first factor.  Codes that a layer made unsigned are converted, at .45 ns an element; a row of the first
# factor gains .0064 ns for each: 70 rows pay for it, and more where caches are small.
FEWEST_ROWS = 96

_aten = torch.ops.aten


@dataclass(frozen=True)
class SignedFactors(Rewrite):
    """Gives signed codes to permuted activations that are second factors of products, and nothing else."""

    tolerance: ClassVar[float] = 0.0

    def rewrite(self, program: Program) -> Program:
        rewriter = GraphRewriter(program)
        for node in rewriter.calls(FAKE_QUANTIZE):
            permuted, scale, zero_point, low, high = operands(node)
            order = _order(permuted)
            if order and len(permuted.users) == 1 and code_type(low, high) == torch.uint8 and _gains(node):
                grid = (code - OFFSET for code in (zero_point, low, high))
                with rewriter.before(node):
                    signed = rewriter.call(PERMUTE_CODES, operands(permuted)[0], scale, *grid, order, like=node)
                rewriter.replace(node, signed)
                rewriter.replace(permuted, signed, keep_name=True)  # sites know it
        return rewriter.done()


def _order(node: fx.Node) -> list[int]:
    """The dimensions of a node's source in those of its value, where it permutes them; else none."""
    if node.target is _aten.permute.default:
        rank = node.meta["val"].ndim
        return [axis % rank for axis in operands(node)[1]]
    if node.target is _aten.transpose.int:
        order = list(range(node.meta["val"].ndim))
        one, other = operands(node)[1:]
        order[one], order[other] = order[other], order[one]
        return order
    return []


def _gains(node: fx.Node) -> bool:
    """Whether all that reads a tensor are products that have it for their second factor alone, and rows enough."""
    readers = value_readers(node)
    firsts = [operands(reader)[0] for reader in readers if reader.target in PRODUCTS]
    # a vector has no rows
    few = any(first is node or captured_shape(first)[-2:-1] < [FEWEST_ROWS] for first in firsts)
    return len(firsts) == len(readers) > 0 and not few
