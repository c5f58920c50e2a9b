"""What every site costs at every bit width.

A weight: the bytes of the exported file that belong to it, namely packed integers, one float32 scale per channel, and
an int32 bias for every layer that uses it; weight-only, 4 bits for every element of its blocks and a scale for each
block; in float, at 32 bits, the weight as it is.  Biases stay in float in both.  An activation: the bytes of one sample
packed at that width (onnxruntime itself holds 4 and 6 bits in a byte each).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hawqfx.frontend.context import Context
from hawqfx.ir.facts import ByteCost, Quantizers
from hawqfx.ir.program import Program, WeightSite
from hawqfx.maths.formats import BLOCK, BLOCKWISE, bits_of, blocks, is_static
from hawqfx.maths.packing import packed_bytes
from hawqfx.maths.pricing import FLOAT_BITS
from hawqfx.pass_manager.base import Analysis, Kind

FLOAT_BYTES = SCALE_BYTES = 4  # float32
BIAS_BYTES = 4  # int32


def _weight_bytes(program: Program, site: WeightSite, bits: int) -> int:
    channels = site.shape[0]
    used = [layer for layer in program.layers if layer.weight == site.key]
    biased = sum(layer.bias is not None for layer in used)
    if bits == FLOAT_BITS:
        return FLOAT_BYTES * (site.numel + channels * len({layer.bias for layer in used if layer.bias is not None}))
    if bits == BLOCKWISE:
        count = channels * blocks(site.shape[1])
        return count * (packed_bytes(BLOCK, bits_of(bits)) + SCALE_BYTES) + FLOAT_BYTES * channels * biased
    return packed_bytes(site.numel, bits) + channels * (SCALE_BYTES + BIAS_BYTES * biased)


@dataclass(frozen=True)
class Cost(Analysis):
    needs: ClassVar[tuple[Kind, ...]] = (Quantizers,)
    gives: ClassVar[tuple[Kind, ...]] = (ByteCost,)

    def learn(self, program: Program, context: Context) -> Mapping[str, ByteCost]:
        facts = {}
        for site in program.sites:
            widths = (*program.facts.get(site.key, Quantizers).by_bits, FLOAT_BITS)
            if isinstance(site, WeightSite):
                facts[site.key] = ByteCost({bits: _weight_bytes(program, site, bits) for bits in widths})
            else:
                # what is quantized in each run lives as floats
                taken = {bits: bits if is_static(bits) else FLOAT_BITS for bits in widths}
                facts[site.key] = ByteCost({bits: packed_bytes(site.numel, taken[bits]) for bits in widths})
        return facts
