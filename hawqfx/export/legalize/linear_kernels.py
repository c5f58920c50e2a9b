"""Write linear layers of the schemes "dynamic" and "weight-only" as the operators that onnxruntime has for them.

Such an operator rounds its input by itself, so that the rounding before the layer goes into it; a bias is added after.
The codes of a blockwise weight are packed as MatMulNBits reads them, and need no other packing in the file.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from hawqfx.export.legalize.tolerances import FLIPPED_CODES
from hawqfx.ir.custom_ops import BLOCKWISE_LINEAR, DYNAMIC_LINEAR, FAKE_QUANTIZE_BLOCKS, FAKE_QUANTIZE_DYNAMIC
from hawqfx.ir.facts import StoredBits
from hawqfx.ir.operators import operands
from hawqfx.ir.program import Program
from hawqfx.ir.rewriter import GraphRewriter
from hawqfx.maths import packing
from hawqfx.pass_manager.base import Kind, Rewrite

_aten = torch.ops.aten


@dataclass(frozen=True)
class LinearKernels(Rewrite):
    """Writes dynamic and blockwise linear layers as onnxruntime's operators."""

    tolerance: ClassVar[float] = FLIPPED_CODES
    needs: ClassVar[tuple[Kind, ...]] = (StoredBits,)
    gives: ClassVar[tuple[Kind, ...]] = (StoredBits,)

    def rewrite(self, program: Program) -> Program:
        rewriter = GraphRewriter(program)
        inputs: dict[str, int] = {}  # of each weight that is packed in blocks
        for node in rewriter.calls(_aten.linear.default):
            source, weight, bias = (*operands(node), None)[:3]
            if source.target not in (FAKE_QUANTIZE_DYNAMIC, FAKE_QUANTIZE_BLOCKS):
                continue
            (tensor,), (codes, scale) = operands(source), operands(weight)
            with rewriter.before(node):
                if source.target is FAKE_QUANTIZE_DYNAMIC:
                    product = rewriter.call(DYNAMIC_LINEAR, tensor, codes, scale)
                else:
                    key = str(codes.target)
                    if key not in inputs:  # layers may share the weight
                        inputs[key] = _pack_blocks(rewriter, codes, scale)
                    product = rewriter.call(BLOCKWISE_LINEAR, tensor, codes, scale, inputs[key])
                if bias is not None:
                    product = rewriter.call(_aten.add.Tensor, product, bias)
            rewriter.replace(node, product, keep_name=True)
        bits = program.about(StoredBits).bits
        return rewriter.done().learn_about_network(StoredBits({k: b for k, b in bits.items() if k not in inputs}))


def _pack_blocks(rewriter: GraphRewriter, codes: fx.Node, scale: fx.Node) -> int:
    """Lay the codes and scales of a weight out as MatMulNBits reads them.

    Returns:
        The number of inputs that the weight has.
    """
    unpacked = rewriter.value(codes)
    packed = torch.from_numpy(packing.pack_blocks(unpacked.numpy()))
    rewriter.store(str(codes.target), packed, parameter=False)
    rewriter.store(str(scale.target), rewriter.value(scale).reshape(-1), parameter=False)
    return unpacked.shape[1]
