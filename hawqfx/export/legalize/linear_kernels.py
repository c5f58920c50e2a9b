"""Write what is computed in the schemes "dynamic" and "weight-only" as the operators that onnxruntime has for it.

Such a layer rounds its input by itself, so that the rounding before the layer goes into it; a bias is added after.  The
codes of a blockwise weight of 2, 4 or 8 bits are packed as MatMulNBits reads them, and need no other packing in the
file; those of 3 bits are filled up to whole blocks, packed like those of other layers, and packed in 4 bits when the
file is loaded.  The rows of a table are looked up in the same packed codes, so that a head may multiply by them too.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from hawqfx.export.legalize.tolerances import FLIPPED_CODES
from hawqfx.ir.custom_ops import (
    BLOCKWISE_LINEAR,
    BLOCKWISE_ROWS,
    DEQUANTIZE,
    DYNAMIC_LINEAR,
    FAKE_QUANTIZE_BLOCKS,
    FAKE_QUANTIZE_DYNAMIC,
    PACK_BLOCKS,
)
from hawqfx.ir.facts import StoredBits
from hawqfx.ir.operators import EMBEDDING, operands
from hawqfx.ir.program import Program
from hawqfx.ir.rewriter import GraphRewriter
from hawqfx.maths import affine, packing
from hawqfx.maths.formats import kernel_bits
from hawqfx.pass_manager.base import Kind, Rewrite

_aten = torch.ops.aten


@dataclass(frozen=True)
class LinearKernels(Rewrite):
    """Writes dynamic and blockwise linear layers, and tables in blocks, as operators of their own."""

    tolerance: ClassVar[float] = FLIPPED_CODES
    needs: ClassVar[tuple[Kind, ...]] = (StoredBits,)
    gives: ClassVar[tuple[Kind, ...]] = (StoredBits,)

    def rewrite(self, program: Program) -> Program:
        rewriter = GraphRewriter(program)
        weights = _BlockwiseWeights(rewriter, dict(program.about(StoredBits).bits))
        for node in rewriter.calls():
            with rewriter.before(node):
                written = _written(rewriter, weights, node)
            if written is not None:
                rewriter.replace(node, written, keep_name=True)
        return rewriter.done().learn_about_network(StoredBits(weights.bits))


def _written(rewriter: GraphRewriter, weights: "_BlockwiseWeights", node: fx.Node) -> fx.Node | None:
    """The operator that takes the place of a node, if there is one."""
    if node.target is EMBEDDING:
        table, rows = operands(node)[:2]
        if table.target is not DEQUANTIZE or not weights.has(table):
            return None
        codes, scale, *size = weights.packed(table)
        return rewriter.call(BLOCKWISE_ROWS, codes, scale, rows, *size)
    if node.target is not _aten.linear.default:
        return None
    source, weight, bias = (*operands(node), None)[:3]
    if source.target is FAKE_QUANTIZE_DYNAMIC:
        product = rewriter.call(DYNAMIC_LINEAR, operands(source)[0], *operands(weight))
    elif source.target is FAKE_QUANTIZE_BLOCKS:
        product = rewriter.call(BLOCKWISE_LINEAR, operands(source)[0], *weights.packed(weight, source.args[1]))
    else:
        return None
    return product if bias is None else rewriter.call(_aten.add.Tensor, product, bias)


@dataclass
class _BlockwiseWeights:
    """The weights in blocks as the kernels read them.

    Args:
        rewriter: of the graph.
        bits: of each weight that the file has to pack, by the name of its codes; what is packed here leaves it.
    """

    rewriter: GraphRewriter
    bits: MutableMapping[str, int | tuple[int, ...]]
    _known: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def has(self, weight: fx.Node) -> bool:
        """Whether a dequantized weight is in blocks."""
        codes, scale = operands(weight)
        return str(codes.target) in self._known or self.rewriter.value(scale).ndim == 2

    def packed(self, weight: fx.Node, block: int | None = None) -> tuple[Any, ...]:
        """Codes, scale, columns and bits of a dequantized weight, as blockwise_linear takes them; the same nodes for
        all that read the weight.  `block`: inputs of a block; None for a table, whose rows are no shorter than one."""
        codes, scale = operands(weight)
        key = str(codes.target)
        if key not in self._known:
            values, steps = self.rewriter.value(codes).numpy(), self.rewriter.value(scale)
            bits = self.bits[key]
            assert isinstance(bits, int)  # rows in blocks all have the bits of the format
            width, block = kernel_bits(bits), block or affine.block_of(values.shape[1], steps.shape[1])
            # exact: calibration gives numbers of bfloat16
            self.rewriter.store(str(scale.target), steps.reshape(-1).bfloat16(), parameter=False)
            packs = width == bits
            blocks = packing.pack_blocks(values, width, block) if packs else packing.fill_blocks(values, block)
            self.rewriter.store(key, torch.from_numpy(blocks), parameter=False)
            if packs:
                del self.bits[key]
            else:
                codes = self.rewriter.call(PACK_BLOCKS, codes, width)
            self._known[key] = (codes, scale, values.shape[1], width)
        return self._known[key]
