"""The quantizer of every site at every bit width that it may take, with the least squared error found.

Weights: signed, symmetric, one scale per output channel.  Activations: unsigned, one scale and zero-point per tensor,
from a histogram of the float network's values over the calibration data.  Linear layers have other schemes beside the
static one (hawqfx.maths.formats): their weights may have a scale per block, and what they read a range that is taken in
each run.
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
from hawqfx.ir.program import ActivationSite, Program, WeightSite
from hawqfx.maths import affine
from hawqfx.maths.formats import BLOCKWISE, DYNAMIC, Scheme, bits_of
from hawqfx.pass_manager.base import Analysis, Kind

BINS = 2048  # eight to a step of an 8-bit quantizer


@dataclass
class _Histogram:
    """Counts of values in equal bins from low to high, and their sums, so that each bin is known by its mean."""

    low: float
    high: float
    counts: Tensor
    sums: Tensor

    def add(self, values: Tensor) -> None:
        flat = values.detach().double().reshape(-1).cpu()
        width = (self.high - self.low) / BINS or 1.0
        bins = ((flat - self.low) / width).long().clamp_(0, BINS - 1)
        self.counts += torch.bincount(bins, minlength=BINS)
        self.sums += torch.bincount(bins, flat, minlength=BINS)

    def filled(self) -> tuple[Tensor, Tensor]:
        seen = self.counts > 0
        return self.sums[seen] / self.counts[seen], self.counts[seen].double()


def _ranges(program: Program, context: Context) -> dict[str, tuple[float, float]]:
    ranges: dict[str, tuple[float, float]] = {}

    def look(node: str, value: Tensor) -> Tensor:
        low, high = ranges.get(node, (float("inf"), float("-inf")))
        ranges[node] = min(low, float(value.min())), max(high, float(value.max()))
        return value

    for batch in context.track(context.batches, "calibration", 2 * len(context.batches)):
        program.run(batch.args, batch.kwargs, look)
    return ranges


def _histograms(program: Program, context: Context) -> dict[str, _Histogram]:
    ranges = _ranges(program, context)
    histograms: dict[str, _Histogram] = {}
    owner: dict[str, _Histogram] = {}
    for site in program.activations:
        low, high = min(ranges[node][0] for node in site.nodes), max(ranges[node][1] for node in site.nodes)
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise DataError(f"the activation {site.key!r} is not finite on the calibration data")
        histograms[site.key] = _Histogram(low, high, torch.zeros(BINS, dtype=torch.long), torch.zeros(BINS).double())
        owner |= dict.fromkeys(site.nodes, histograms[site.key])

    def look(node: str, value: Tensor) -> Tensor:
        owner[node].add(value)
        return value

    for index, batch in enumerate(context.batches, 1):
        program.run(batch.args, batch.kwargs, look)
        context.progress("calibration", len(context.batches) + index, 2 * len(context.batches))
    return histograms


def _weight_quantizer(weight: Tensor, bits: int) -> QuantParams:
    low, high = affine.signed_range(bits)
    return QuantParams(bits, tuple(affine.symmetric_scales(weight, bits).tolist()), 0, low, high, per_channel=True)


def _blockwise_quantizer(weight: Tensor) -> QuantParams:
    blocks, bits = affine.in_blocks(weight.detach()), bits_of(BLOCKWISE)
    scale = affine.symmetric_scales(blocks.flatten(0, 1), bits)
    low, high = affine.signed_range(bits)
    return QuantParams(bits, tuple(scale.tolist()), 0, low, high, True, "weight-only", blocks.shape[1])


def _dynamic_quantizer() -> QuantParams:
    low, high = affine.unsigned_range(bits_of(DYNAMIC))
    return QuantParams(bits_of(DYNAMIC), (), 0, low, high, False, "dynamic")


def _activation_quantizer(
    histogram: _Histogram, site: ActivationSite, bits: int, after: Function | None
) -> QuantParams:
    scale, zero_point = affine.affine_range(*histogram.filled(), bits, nonnegative=site.nonnegative, after=after)
    low, high = affine.unsigned_range(bits)
    if site.nonnegative:  # nothing above the ceiling, so that the quantizer does the rectifier's work
        scale = min(scale, float(torch.tensor(site.ceiling / high).nextafter(torch.tensor(0.0))))
    return QuantParams(bits, (scale,), zero_point, low, high, per_channel=False)


def _read_by(program: Program, readers: Set[str]) -> list[str]:
    """The weights that these nodes read and no others, such as the lookup of a table."""
    nodes = [node for node in program.graph.graph.find_nodes(op="get_attr") if node.users]
    others = {str(node.target) for node in nodes if not {user.name for user in node.users} <= readers}
    return [site.key for site in program.weights if site.key not in others]


@dataclass(frozen=True)
class Calibration(Analysis):
    """`weight_bits` and `activation_bits`: the static widths that the allocation may choose from.  `schemes`: what else
    linear layers may compute by."""

    weight_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    activation_bits: tuple[int, ...] = (4, 6, 8)
    schemes: tuple[Scheme, ...] = ()
    needs: ClassVar[tuple[Kind, ...]] = (WeightSite, ActivationSite)
    gives: ClassVar[tuple[Kind, ...]] = (Quantizers,)

    @torch.no_grad()
    def learn(self, program: Program, context: Context) -> Mapping[str, Quantizers]:
        facts = {
            site.key: Quantizers({bits: _weight_quantizer(program.tensor(site.key), bits) for bits in self.weight_bits})
            for site in program.weights
        }
        linear = [layer for layer in program.layers if layer.operator == "linear"]
        if "weight-only" in self.schemes:
            for key in _read_by(program, {layer.node for layer in linear}):
                found = facts[key].by_bits
                facts[key] = Quantizers({**found, BLOCKWISE: _blockwise_quantizer(program.tensor(key))})
        dynamic = {layer.input for layer in linear} if "dynamic" in self.schemes else set()
        histograms = _histograms(program, context)
        for site in program.activations:
            histogram = histograms[site.key]
            after = function_of(program.graph.graph, (*site.nodes, *site.data_movement))
            by_bits = {bits: _activation_quantizer(histogram, site, bits, after) for bits in self.activation_bits}
            if site.key in dynamic:
                by_bits[DYNAMIC] = _dynamic_quantizer()
            facts[site.key] = Quantizers(by_bits)
        return facts
