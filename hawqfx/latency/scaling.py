"""Fit the times of the parts to the times of the whole network.

A kernel alone in a small graph is faster or slower than the same kernel in the network, where other tensors fill the
caches.  So two factors, one for the parts in float and one for those on kernels for quantized weights, and a remainder
that no choice of formats changes make the prediction of two networks equal to their measured latency: all float, and
all 8 bits, or where weights have formats in blocks alone, these with activations in float.

    float:      a * F + rest = measured latency in float
    quantized:  a * G + b * I + rest = measured latency with quantized weights

F, G and I are sums of the parts; G, of those that a quantized network leaves in float, is zero if it is all 8 bits.
Two equations do not determine three unknowns.  The rule is a = 1, or less if the float parts alone exceed the network;
the remainder and b follow.  Where b is then implausible, as in a network whose
weights exceed a cache that holds every small graph, the remainder is the one that leaves both factors nearest to 1:
it has the least log(a)^2 + log(b)^2.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hawqfx.maths.formats import Format
from hawqfx.maths.latency_model import LatencyModel

LEAST_FACTOR, MOST_FACTOR = 0.2, 2.5  # of parts that were timed alone
MOST_OF_WHOLE = 0.98  # the largest share of a network's latency that parts in float, or the remainder, may take
LEAST_OF_WHOLE = 0.02  # the smallest share that the integer parts take
STEPS = 100  # of the search for the remainder


@dataclass(frozen=True)
class Scales:
    """The fit: a factor for the parts in float, one for those on kernels for quantized weights, "integer", and the
    remainder in seconds."""

    floating: float
    integer: float
    rest: float

    @property
    def plausible(self) -> bool:
        """Whether both factors are near enough to 1 for the latencies to be trusted."""
        return _is_plausible(self.floating) and _is_plausible(self.integer)


def fit(
    whole_float: float, whole_quantized: float, float_parts: float, integer_parts: float, left_in_float: float = 0.0
) -> Scales:
    """The fit for a network.

    Args:
        whole_float: measured seconds of the network in float.
        whole_quantized: measured seconds of the quantized network.
        float_parts: the sum of the seconds of its parts in float.
        integer_parts: the sum of the seconds of the quantized network's parts on kernels for quantized weights.
        left_in_float: that of its other parts.
    """
    if not float_parts or not integer_parts:
        return Scales(1.0, 1.0, whole_float - float_parts)

    def fitted(floating: float) -> Scales:
        rest = whole_float - floating * float_parts
        left = whole_quantized - rest - floating * left_in_float
        return Scales(floating, max(LEAST_OF_WHOLE * whole_quantized, left) / integer_parts, rest)

    scales = fitted(min(1.0, MOST_OF_WHOLE * whole_float / float_parts))
    if _is_plausible(scales.integer):
        return scales
    most = MOST_OF_WHOLE * min(whole_float, whole_quantized)
    rests = (most * step / STEPS for step in range(STEPS + 1))
    fits = (fitted((whole_float - rest) / float_parts) for rest in rests)
    return min(fits, key=lambda scales: math.log(scales.floating) ** 2 + math.log(scales.integer) ** 2)


def parted(parts: LatencyModel, formats: Mapping[str, Format]) -> tuple[float, float]:
    """The seconds of parts in float, and of the others with all conversions, when the sites have these formats."""
    kernels = (kernel for kernel in parts.timed if kernel.kernel(formats) in ("floating", "unpacking"))
    floating = sum(kernel.seconds(formats) for kernel in kernels)
    return floating, parts.seconds(formats) - parts.rest - floating


def scaled(parts: LatencyModel, scales: Scales) -> LatencyModel:
    """The latency model with its parts scaled; conversions count as integer parts."""
    floating, integer = scales.floating, scales.integer
    timed = (
        replace(
            kernel,
            integer=integer * kernel.integer,
            floating=floating * kernel.floating,
            unpacking=floating * kernel.unpacking,
            dynamic=integer * kernel.dynamic,
            blockwise=tuple((width, integer * seconds) for width, seconds in kernel.blockwise),
        )
        for kernel in parts.timed
    )
    converted = (
        replace(
            tensor,
            quantize=integer * tensor.quantize,
            dequantize=integer * tensor.dequantize,
            clip=integer * tensor.clip,
        )
        for tensor in parts.converted
    )
    return replace(parts, rest=scales.rest, timed=tuple(timed), converted=tuple(converted))


def _is_plausible(factor: float) -> bool:
    return LEAST_FACTOR < factor < MOST_FACTOR
