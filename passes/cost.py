"""The bytes of every site in every format.

The cost of a weight is its part of the exported file:

    static       packed integers, a float32 scale per channel, and an int32 bias for every layer that uses the weight;
                 where rows have bits of their own, a byte for each that tells them
    weight-only  packed integers for every element of whole blocks, a bfloat16 scale per block, and float32 biases
    float        the weight and its biases in float32

The cost of an activation is the bytes of one sample, packed (onnxruntime itself takes a byte for 4 or 6 bits).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hawqfx.frontend.context import Context
from hawqfx.ir.facts import ByteCost, Quantizers, QuantParams
from hawqfx.ir.program import Program
from hawqfx.ir.sites import WeightSite
from hawqfx.maths.formats import FLOAT, FLOAT_BITS, Format, blocks
from hawqfx.maths.packing import packed_bytes, row_bytes
from hawqfx.pass_manager.base import Analysis, Kind

FLOAT_BYTES = SCALE_BYTES = 4  # float32
BLOCK_SCALE_BYTES = 2  # bfloat16
BIAS_BYTES = 4  # int32


def _weight_bytes(program: Program, site: WeightSite, width: Format, quantizer: QuantParams | None) -> int:
    channels = site.shape[0]
    used = [layer for layer in program.layers if layer.weight == site.key]
    biased = sum(layer.bias is not None for layer in used)
    if width.is_float:
        return FLOAT_BYTES * (site.numel + channels * len({layer.bias for layer in used if layer.bias is not None}))
    if width.is_blockwise:
        count = channels * blocks(site.shape[1], width.block)
        packed = packed_bytes(count * width.block, width.bits)
        return packed + count * BLOCK_SCALE_BYTES + FLOAT_BYTES * channels * biased
    if quantizer is not None and quantizer.rows:
        packed = row_bytes(quantizer.rows, site.numel // channels) + channels
    else:
        packed = packed_bytes(site.numel, width.bits)
    return packed + channels * (SCALE_BYTES + BIAS_BYTES * biased)


@dataclass(frozen=True)
class Cost(Analysis):
    """The bytes of every site in every format."""

    needs: ClassVar[tuple[Kind, ...]] = (Quantizers,)
    gives: ClassVar[tuple[Kind, ...]] = (ByteCost,)

    def learn(self, program: Program, context: Context) -> Mapping[str, ByteCost]:
        facts = {}
        for site in program.sites:
            known = program.facts.get(site.key, Quantizers).by_format
            widths = (*known, FLOAT)
            if isinstance(site, WeightSite):
                cost = {width: _weight_bytes(program, site, width, known.get(width)) for width in widths}
                facts[site.key] = ByteCost(cost)
            else:
                # an activation that is quantized in each run is stored in float
                bits = {width: width.bits if width.is_static else FLOAT_BITS for width in widths}
                facts[site.key] = ByteCost({width: packed_bytes(site.numel, bits[width]) for width in widths})
        return facts
