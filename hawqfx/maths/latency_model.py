"""How long a network takes at any choice of bits: measured seconds of its parts, and the rule that adds them up.

onnxruntime runs a node on an integer kernel when every tensor that the kernel needs is quantized, and in float
otherwise; a float kernel whose weight is quantized unpacks it in every run, and cannot lay it out as it likes.  Linear
layers have kernels that take floats and quantized weights, dynamic ones and weight-only ones (maths/schemes.py).  Where
float meets integer it converts: a quantized tensor that a float kernel made is quantized once, and one that a float
kernel reads is dequantized once.  Below 8 bits an activation takes a Clip on its integers.  The width of a weight does
not matter, since weights are unpacked when the file is loaded.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hawqfx.maths.formats import BLOCKWISE, DYNAMIC, is_static
from hawqfx.maths.pricing import FLOAT_BITS

# how a kernel runs
KERNELS = ("floating", "integer", "unpacking", "dynamic", "blockwise")


@dataclass(frozen=True)
class KernelTimes:
    """Seconds of one node of the graph: as an integer kernel where all of `sites` are quantized, else in float, where
    it takes `unpacking` if its weight is quantized and `floating` if not; `dynamic` and `blockwise`: of the linear
    layers that have these schemes, else infinite.  The first site of a layer is what it reads.

    `node`: the fx node that makes the kernel's output, the rectifier's where the kernel takes one in.  `weight`: the
    one of the sites that is a weight, if there is one."""

    node: str
    sites: tuple[str, ...]
    weight: str | None
    integer: float
    floating: float
    unpacking: float
    dynamic: float = math.inf
    blockwise: float = math.inf

    def is_integer(self, bits: Mapping[str, int]) -> bool:
        return all(is_static(bits[site]) for site in self.sites)

    def kernel(self, bits: Mapping[str, int]) -> str:
        """One of KERNELS."""
        if self.is_integer(bits):
            return "integer"
        if self.weight is None or bits[self.weight] == FLOAT_BITS:
            return "floating"
        if bits[self.weight] == BLOCKWISE:
            return "blockwise"
        return "dynamic" if bits[self.sites[0]] == DYNAMIC else "unpacking"

    def seconds(self, bits: Mapping[str, int]) -> float:
        return float(getattr(self, self.kernel(bits)))


@dataclass(frozen=True)
class ConversionTimes:
    """Seconds to convert one tensor of the activation site `site`.

    `maker`: the node of `Timed` that makes it; None: always made in float.  `readers`: the same of those that read it;
    None among them: one reads it in float always.  `clip`: seconds of the Clip below 8 bits."""

    site: str
    maker: str | None
    readers: tuple[str | None, ...]
    quantize: float
    dequantize: float
    clip: float


@dataclass(frozen=True)
class LatencyModel:
    """`rest`: seconds of everything that no choice of bits changes.  `setting`: machine, threads, batch, versions."""

    rest: float
    timed: tuple[KernelTimes, ...]
    converted: tuple[ConversionTimes, ...]
    setting: str

    def seconds(self, bits: Mapping[str, int]) -> float:
        """Of one run at these widths, by site key; 32: the site stays in float."""
        integer = {timed.node: timed.is_integer(bits) for timed in self.timed}
        total = self.rest + sum(timed.seconds(bits) for timed in self.timed)
        for tensor in self.converted:
            if not is_static(bits[tensor.site]):
                continue
            total += tensor.clip * (bits[tensor.site] < 8)
            total += tensor.quantize * (tensor.maker is None or not integer[tensor.maker])
            total += tensor.dequantize * any(reader is None or not integer[reader] for reader in tensor.readers)
        return total
