"""The quantizer of every site in every format that it may take, with the least squared error that a search meets.

The quantizers of weights are signed and symmetric, with one scale per output channel.  The quantizers of activations
are unsigned, with one scale and zero-point per tensor, from a histogram of the float network's values over the
calibration data.  Linear layers may have other schemes than the static one (hawqfx.maths.formats): weights with a scale
per block, and inputs whose range is taken in each run.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hawqfx.analysis.pointwise import Function, function_of
from hawqfx.errors import DataError
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import Quantizers, QuantParams
from hawqfx.ir.program import Program
from hawqfx.ir.sites import ActivationSite, WeightSite
from hawqfx.maths import affine
from hawqfx.maths.formats import BLOCKWISE, DYNAMIC, Format, Scheme
from hawqfx.pass_manager.base import Analysis, Kind, option

BINS = 2048  # eight to a step of an 8-bit quantizer


@dataclass
class _Histogram:
    """Counts and sums of values in BINS equal bins from low to high.

    Args:
        low: the lowest value.
        high: the highest value.
        counts: (BINS,) int64.
        sums: (BINS,) float64.
    """

    low: float
    high: float
    counts: Tensor
    sums: Tensor

    @staticmethod
    def between(low: float, high: float) -> "_Histogram":
        """An empty histogram."""
        return _Histogram(low, high, torch.zeros(BINS, dtype=torch.long), torch.zeros(BINS).double())

    def add(self, values: Tensor) -> None:
        flat = values.detach().double().reshape(-1).cpu()
        width = (self.high - self.low) / BINS or 1.0
        bins = ((flat - self.low) / width).long().clamp_(0, BINS - 1)
        self.counts += torch.bincount(bins, minlength=BINS)
        self.sums += torch.bincount(bins, flat, minlength=BINS)

    def filled(self) -> tuple[Tensor, Tensor]:
        """The means (B,) and the counts (B,) of the bins that are not empty, in float64."""
        filled = self.counts > 0
        return self.sums[filled] / self.counts[filled], self.counts[filled].double()


def _ranges(program: Program, context: Context) -> dict[str, tuple[float, float]]:
    """The lowest and the highest value of every activation node over the calibration data."""
    ranges: dict[str, tuple[float, float]] = {}

    def widen(node: str, value: Tensor) -> Tensor:
        low, high = ranges.get(node, (float("inf"), float("-inf")))
        ranges[node] = min(low, float(value.min())), max(high, float(value.max()))
        return value

    for batch in context.track(context.batches, "calibration", 2 * len(context.batches)):
        program.run(batch.args, batch.kwargs, widen)
    return ranges


def _histograms(program: Program, context: Context) -> dict[str, _Histogram]:
    """The histogram of every activation site, by two runs over the calibration data."""
    ranges = _ranges(program, context)
    histograms: dict[str, _Histogram] = {}
    owner: dict[str, _Histogram] = {}
    for site in program.activations:
        low, high = min(ranges[node][0] for node in site.nodes), max(ranges[node][1] for node in site.nodes)
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise DataError(f"the activation {site.key!r} is not finite on the calibration data")
        histograms[site.key] = _Histogram.between(low, high)
        owner |= dict.fromkeys(site.nodes, histograms[site.key])

    def count(node: str, value: Tensor) -> Tensor:
        owner[node].add(value)
        return value

    for index, batch in enumerate(context.batches, 1):
        program.run(batch.args, batch.kwargs, count)
        context.progress("calibration", len(context.batches) + index, 2 * len(context.batches))
    return histograms


def _weight_quantizer(weight: Tensor, bits: int) -> QuantParams:
    low, high = affine.signed_range(bits)
    return QuantParams(bits, tuple(affine.symmetric_scales(weight, bits).tolist()), 0, low, high, per_channel=True)


def _blockwise_quantizer(weight: Tensor) -> QuantParams:
    blocks, bits = affine.in_blocks(weight.detach()), BLOCKWISE.bits
    scale = affine.symmetric_scales(blocks.flatten(0, 1), bits)
    low, high = affine.signed_range(bits)
    return QuantParams(bits, tuple(scale.tolist()), 0, low, high, True, "weight-only", blocks.shape[1])


def _dynamic_quantizer() -> QuantParams:
    low, high = affine.unsigned_range(DYNAMIC.bits)
    return QuantParams(DYNAMIC.bits, (), 0, low, high, False, "dynamic")


def _activation_quantizer(
    histogram: _Histogram, site: ActivationSite, bits: int, after: Function | None
) -> QuantParams:
    scale, zero_point = affine.affine_range(*histogram.filled(), bits, nonnegative=site.nonnegative, after=after)
    low, high = affine.unsigned_range(bits)
    if site.nonnegative:  # nothing above the ceiling, so that the quantizer does the rectifier's work
        scale = min(scale, float(torch.tensor(site.ceiling / high).nextafter(torch.tensor(0.0))))
    return QuantParams(bits, (scale,), zero_point, low, high, per_channel=False)


def _read_by(program: Program, readers: Set[str]) -> list[str]:
    """The weights that only these nodes read; the lookup of a table is another reader."""
    nodes = [node for node in program.graph.graph.find_nodes(op="get_attr") if node.users]
    others = {str(node.target) for node in nodes if not {user.name for user in node.users} <= readers}
    return [site.key for site in program.weights if site.key not in others]


@dataclass(frozen=True)
class Calibration(Analysis):
    """The quantizer of every site in every format."""

    weight_bits: tuple[int, ...] = option((2, 3, 4, 5, 6, 7, 8), "bits of the static formats that weights may have")
    activation_bits: tuple[int, ...] = option((4, 6, 8), "bits of the static formats that activations may have")
    schemes: tuple[Scheme, ...] = option((), "schemes that linear layers may have besides static: weight-only, dynamic")
    needs: ClassVar[tuple[Kind, ...]] = (WeightSite, ActivationSite)
    gives: ClassVar[tuple[Kind, ...]] = (Quantizers,)

    @torch.no_grad()
    def learn(self, program: Program, context: Context) -> Mapping[str, Quantizers]:
        return self._of_weights(program) | self._of_activations(program, context)

    def _of_weights(self, program: Program) -> dict[str, Quantizers]:
        linear = {layer.node for layer in program.layers if layer.operator == "linear"}
        blockwise = _read_by(program, linear) if "weight-only" in self.schemes else []
        facts = {}
        for site in program.weights:
            weight = program.tensor(site.key)
            by_format = {Format(bits): _weight_quantizer(weight, bits) for bits in self.weight_bits}
            if site.key in blockwise:
                by_format[BLOCKWISE] = _blockwise_quantizer(weight)
            facts[site.key] = Quantizers(by_format)
        return facts

    def _of_activations(self, program: Program, context: Context) -> dict[str, Quantizers]:
        linear = {layer.input for layer in program.layers if layer.operator == "linear"}
        histograms = _histograms(program, context)
        facts = {}
        for site in program.activations:
            after = function_of(program.graph.graph, site.tensors)
            by_format = {
                Format(bits): _activation_quantizer(histograms[site.key], site, bits, after)
                for bits in self.activation_bits
            }
            if "dynamic" in self.schemes and site.key in linear:
                by_format[DYNAMIC] = _dynamic_quantizer()
            facts[site.key] = Quantizers(by_format)
        return facts
