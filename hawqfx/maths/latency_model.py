"""The latency of a network for any choice of formats: measured seconds of its parts, and the rule that adds them up.

onnxruntime runs a node on an integer kernel when every tensor that the kernel needs is quantized, and in float
otherwise.  A float kernel whose weight is quantized unpacks the weight in every run, and cannot lay it out as it likes.
Linear layers also have kernels that take floats and quantized weights: dynamic and weight-only (hawqfx.maths.formats).
Where float meets integer, onnxruntime converts: it quantizes a quantized tensor once if a float kernel makes the
tensor, and dequantizes it once if a float kernel reads the tensor.  Below 8 bits, a Clip cuts the integers of an
activation.  The bits of a static weight do not matter, since onnxruntime unpacks weights when it loads the file; those
and the blocks of a weight-only one do.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from hawqfx.maths.formats import DYNAMIC, Format

# the ways in which a kernel runs: the fields of KernelTimes
KERNELS = ("floating", "integer", "unpacking", "dynamic", "blockwise")


@dataclass(frozen=True)
class KernelTimes:
    """Seconds of one kernel in each way in which it may run.

    Args:
        node: name of the fx node that makes the kernel's output; the rectifier's, if the kernel takes in a rectifier.
        sites: keys of the sites that the kernel needs to run in integers; of a layer, the first is its input.
        weight: key of the site among them that is a weight, if there is one.
        integer: seconds where all `sites` are static; infinity for a layer whose weight has formats in blocks alone.
        floating: seconds in float, with a float weight.
        unpacking: seconds in float, with a static weight; infinity likewise.
        dynamic: seconds of a linear layer whose input is dynamic; infinity for other kernels.
        blockwise: pairs of a weight-only format of the weight and the seconds of the linear layer in it; none for
            other kernels.
    """

    node: str
    sites: tuple[str, ...]
    weight: str | None
    integer: float
    floating: float
    unpacking: float
    dynamic: float = math.inf
    blockwise: tuple[tuple[Format, float], ...] = ()

    def is_integer(self, formats: Mapping[str, Format]) -> bool:
        """Whether the kernel runs in integers when the sites have these formats."""
        return all(formats[site].is_static for site in self.sites)

    def kernel(self, formats: Mapping[str, Format]) -> str:
        """The member of KERNELS that runs when the sites have these formats."""
        if self.is_integer(formats):
            return "integer"
        if self.weight is None or formats[self.weight].is_float:
            return "floating"
        if formats[self.weight].is_blockwise:
            return "blockwise"
        return "dynamic" if formats[self.sites[0]] == DYNAMIC else "unpacking"

    def seconds(self, formats: Mapping[str, Format]) -> float:
        """Seconds of one run when the sites have these formats."""
        kernel = self.kernel(formats)
        if kernel == "blockwise":
            assert self.weight is not None
            return dict(self.blockwise)[formats[self.weight]]
        return float(getattr(self, kernel))


@dataclass(frozen=True)
class ConversionTimes:
    """Seconds of the conversions of one tensor between float and integers.

    Args:
        site: key of the tensor's activation site.
        maker: `KernelTimes.node` of the kernel that makes the tensor; None if the tensor is always made in float.
        readers: `KernelTimes.node` of the kernels that read it; None among them stands for readers that are always in
            float.
        quantize: seconds from float to integers.
        dequantize: seconds from integers to float.
        clip: seconds of the Clip below 8 bits.
    """

    site: str
    maker: str | None
    readers: tuple[str | None, ...]
    quantize: float
    dequantize: float
    clip: float


@dataclass(frozen=True)
class LatencyModel:
    """Predicts the latency of a network from the formats of its sites.

    Args:
        rest: seconds that no choice of formats changes.
        timed: times of the kernels.
        converted: times of the conversions, one for each tensor of an activation site.
        setting: machine, threads and versions, as JSON.
        shape: of the run: the size of each dimension that varies, by its name.
    """

    rest: float
    timed: tuple[KernelTimes, ...]
    converted: tuple[ConversionTimes, ...]
    setting: str
    shape: Mapping[str, int] = field(default_factory=dict)

    @property
    def sites(self) -> frozenset[str]:
        """Keys of the sites whose formats change the latency."""
        read = {site for kernel in self.timed for site in kernel.sites}
        return frozenset(read | {tensor.site for tensor in self.converted})

    def seconds(self, formats: Mapping[str, Format]) -> float:
        """Seconds of one run when the sites have these formats."""
        integer = {kernel.node: kernel.is_integer(formats) for kernel in self.timed}
        total = self.rest + sum(kernel.seconds(formats) for kernel in self.timed)
        for tensor in self.converted:
            if not formats[tensor.site].is_static:
                continue
            total += tensor.clip * (formats[tensor.site].bits < 8)
            total += tensor.quantize * (tensor.maker is None or not integer[tensor.maker])
            total += tensor.dequantize * any(reader is None or not integer[reader] for reader in tensor.readers)
        return total
