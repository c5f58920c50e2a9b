"""Write linear layers of the schemes "dynamic" and "weight-only" as the operators that onnxruntime has for them.

Such an operator rounds its input by itself, so that the rounding before the layer goes into it; a bias is added after.
The codes of a blockwise weight of 2, 4 or 8 bits are packed as MatMulNBits reads them, and need no other packing in the
file; those of 3 bits are filled up to whole blocks, and packed like those of other layers.
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
from hawqfx.maths.formats import kernel_bits
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
        bits = dict(program.about(StoredBits).bits)
        columns: dict[str, int] = {}  # of each weight that is laid out in blocks
        read: dict[str, int] = {}  # bits in which the kernel reads it
        for node in rewriter.calls(_aten.linear.default):
            source, weight, bias = (*operands(node), None)[:3]
            if source.target not in (FAKE_QUANTIZE_DYNAMIC, FAKE_QUANTIZE_BLOCKS):
                continue
            tensor, (codes, scale) = operands(source)[0], operands(weight)
            with rewriter.before(node):
                if source.target is FAKE_QUANTIZE_DYNAMIC:
                    product = rewriter.call(DYNAMIC_LINEAR, tensor, codes, scale)
                else:
                    key = str(codes.target)
                    if key not in columns:  # layers may share the weight
                        columns[key], read[key] = rewriter.value(codes).shape[1], kernel_bits(bits[key])
                        _lay_out(rewriter, codes, scale, bits[key], source.args[1])
                        if read[key] == bits[key]:
                            del bits[key]
                    product = rewriter.call(BLOCKWISE_LINEAR, tensor, codes, scale, columns[key], read[key])
                if bias is not None:
                    product = rewriter.call(_aten.add.Tensor, product, bias)
            rewriter.replace(node, product, keep_name=True)
        return rewriter.done().learn_about_network(StoredBits(bits))


def _lay_out(rewriter: GraphRewriter, codes: fx.Node, scale: fx.Node, bits: int, block: int) -> None:
    """Lay the codes and scales of a weight out in blocks, packed where MatMulNBits reads so many bits."""
    values = rewriter.value(codes).numpy()
    packs = kernel_bits(bits) == bits
    blocks = packing.pack_blocks(values, bits, block) if packs else packing.fill_blocks(values, block)
    rewriter.store(str(codes.target), torch.from_numpy(blocks), parameter=False)
    # exact: calibration gives numbers of bfloat16
    rewriter.store(str(scale.target), rewriter.value(scale).reshape(-1).bfloat16(), parameter=False)
