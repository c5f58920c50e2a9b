"""Time kernels and operators alone, as small graphs in onnxruntime.

A small graph is timed with several copies and with one; the fixed cost of a run drops out of the difference.
onnxruntime lays images out in blocks for float convolutions, and with channels last for integer ones; it does so at
the edges of a small graph, and in a whole network where float meets integer.  So two transpositions are taken off a
convolution that is timed alone, and belong to the conversions of an image.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, fx

from hawqfx.export.micro_models import MicroModel, MicroModels, operator_micro_model
from hawqfx.ir.facts import Quantizers
from hawqfx.ir.operators import WEIGHTED_LAYERS, is_constant
from hawqfx.ir.program import Program
from hawqfx.latency.kernels import Kernel
from hawqfx.latency.subgraphs import SubgraphBuilder, lowered
from hawqfx.latency.timing_cache import TimingCache
from hawqfx.maths.formats import DYNAMIC, FLOAT, Format
from hawqfx.runtime import ort

COPIES = 4  # of a small graph in one file
PIECE_SECONDS = 0.15  # for the runs of a small graph
LEAST_SECONDS = 1e-7  # of a part, where noise exceeds it
LEAST_SHARE = 0.1  # of a convolution timed alone: at least so much is its own work and not its layout
ZERO_POINT = 128  # of the conversions that are timed

# mode (hawqfx.maths.latency_model.KERNELS) -> the formats of weight and activation in which a layer runs so; the mode
# "blockwise" has many, each timed by itself
FORMATS: Mapping[str, tuple[Format, Format]] = {
    "integer": (Format(8), Format(8)),
    "floating": (FLOAT, FLOAT),
    "unpacking": (Format(8), FLOAT),
    "dynamic": (Format(8), DYNAMIC),
}


@dataclass
class _SubgraphModels:
    """The small graphs of a mode, and the number of each kernel's graph by the name of its output node."""

    models: MicroModels
    number: Mapping[str, int]


@dataclass
class MicroTimer:
    """Seconds of the parts of a network, each alone.

    Args:
        program: with sites, Quantizers and RoundedWeights.
        kernels: of the program.
        values: name of a node -> its tensor in the run, for the inputs and outputs of kernels.
        sizes: name of a node -> the size of a tensor that it gives to kernels.
        threads: of onnxruntime.
        cache: the timings that are known, and the place of new ones.
    """

    program: Program
    kernels: Sequence[Kernel]
    values: Mapping[str, Tensor]
    sizes: Mapping[str, int]
    threads: int
    cache: TimingCache
    _models: dict[str, _SubgraphModels] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._site_of = self.program.site_of

    def kernel_seconds(self, kernel: Kernel) -> dict[str, float]:
        """Seconds of a kernel, less those of its layout, in every mode of FORMATS; infinity where it may not run so."""
        seconds = dict.fromkeys(FORMATS, math.inf)
        for mode in filter(lambda mode: self._may_run(kernel, mode), FORMATS):
            alone = self._alone(kernel, mode)
            layout = 0.0
            if kernel.weight is not None and mode in ("integer", "floating"):  # other modes take images as they are
                ends = (kernel.inputs[0].name, kernel.output.name)
                layout = sum(self.layout_seconds(name, integer=mode == "integer") for name in ends)
            seconds[mode] = max(LEAST_SHARE * alone, alone - layout)
        return seconds

    def blockwise_seconds(self, kernel: Kernel) -> tuple[tuple[Format, float], ...]:
        """The weight-only formats of a kernel's weight, and the seconds of the kernel in each."""
        if kernel.weight is None:
            return ()
        known = self.program.facts.get(kernel.weight, Quantizers).by_format
        return tuple((width, self._alone(kernel, str(width))) for width in known if width.is_blockwise)

    def layout_seconds(self, name: str, *, integer: bool) -> float:
        """Seconds to lay out the tensor of a node anew; zero unless it is an image (N, C, H, W) of several channels.

        In integers, channels go last.  In float, they go into blocks, and no operator does this alone: a pooling over
        one pixel does it before and after, and has as much work of its own.
        """
        shape = tuple(self.values[name].shape)
        if len(shape) != 4 or shape[1] == 1:
            return 0.0
        return self.operator_seconds("Transpose", shape) if integer else self.operator_seconds("MaxPool", shape) / 3

    def operator_seconds(self, operator: str, shape: tuple[int, ...]) -> float:
        """Seconds of one of the operators of `operator_micro_model` on a tensor of this shape."""
        return self.cache.get(
            f"{operator} {'x'.join(map(str, shape))}",
            lambda: self._time(lambda copies: operator_micro_model(operator, shape, ZERO_POINT, copies)),
        )

    def _may_run(self, kernel: Kernel, mode: str) -> bool:
        """Whether a kernel may run in a mode, or in the weight-only format of this name, by the formats that its sites
        may have."""
        if mode == "floating":
            return True
        if kernel.weight is None:
            return mode in ("integer", "unpacking")
        known = self.program.facts.get(kernel.weight, Quantizers).by_format
        if mode not in FORMATS:
            return mode in map(str, known)
        if not any(width.is_static for width in known):
            return False
        if mode != "dynamic":
            return True
        source = self._site_of.get(kernel.inputs[0].name)
        is_linear = WEIGHTED_LAYERS[kernel.operator.target] == "linear"
        return is_linear and source is not None and self._may_have(source, DYNAMIC)

    def _may_have(self, site: str, width: Format) -> bool:
        return width in self.program.facts.get(site, Quantizers).by_format

    def _alone(self, kernel: Kernel, mode: str) -> float:
        """Seconds of a kernel, with those of its layout."""
        return self.cache.get(
            self._signature(kernel, mode),
            lambda: self._time(lambda copies: self._micro_model(kernel, mode, copies)),
        )

    def _micro_model(self, kernel: Kernel, mode: str, copies: int) -> MicroModel:
        if mode not in self._models:
            self._models[mode] = self._export(mode)
        subgraphs = self._models[mode]
        return subgraphs.models.piece(subgraphs.number[kernel.output.name], copies)

    def _export(self, mode: str) -> _SubgraphModels:
        """One export of all kernels whose seconds in a mode are unknown."""
        unknown: dict[str, Kernel] = {}
        for kernel in self.kernels:
            signature = self._signature(kernel, mode)
            if self._may_run(kernel, mode) and signature not in self.cache:
                unknown.setdefault(signature, kernel)
        builder = SubgraphBuilder(self.program, self.values, self.sizes)
        number = {kernel.output.name: builder.add(kernel) for kernel in unknown.values()}
        program = builder.program()
        formats = FORMATS[mode] if mode in FORMATS else (_named(program, mode), FLOAT)
        return _SubgraphModels(MicroModels(lowered(program, *formats), builder.inputs), number)

    def _time(self, model: Callable[[int], MicroModel]) -> float:
        """Seconds of one copy.  `model`: makes a small graph of so many copies."""
        models = [model(COPIES), model(1)]
        random = np.random.default_rng(0)
        feeds = []
        for micro in models:
            feeds.append({
                name: random.integers(0, 256, shape, np.uint8) if dtype == np.uint8
                else random.standard_normal(shape).astype(dtype)
                for name, (shape, dtype) in micro.inputs.items()
            })  # fmt: skip
        contents = [micro.content for micro in models]
        many, one = ort.steady(contents, feeds, threads=self.threads, budget=PIECE_SECONDS)
        return max(LEAST_SECONDS, (many - one) / (COPIES - 1))

    def _signature(self, kernel: Kernel, mode: str) -> str:
        return kernel.signature(mode, self._shape, kernel.output.name in self._site_of)

    def _shape(self, node: fx.Node) -> Sequence[int]:
        if is_constant(node):
            return self.program.tensor(str(node.target)).shape
        if node.name in self.sizes:
            return (self.sizes[node.name],)
        return self.values[node.name].shape if node.name in self.values else ()


def _named(program: Program, name: str) -> Format:
    """The format of this name that some weight of the program has."""
    known = (width for site in program.weights for width in program.facts.get(site.key, Quantizers).by_format)
    return next(width for width in known if str(width) == name)
