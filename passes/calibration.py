"""The quantizer of every site in every format that it may take, with the least squared error that a search meets.

The quantizers of weights are signed, with zero-point 0 and one scale per output channel, of either sign below 8 bits.
The quantizers of activations are unsigned, with one scale and zero-point per tensor, from the histogram of the float
network's values.  Linear layers may have other schemes than the static one (hawqfx.maths.formats): weights with a
scale per block, and inputs whose range is taken in each run.  So may tables whose rows are looked up, but for those
whose rows are shorter than a block, which have a scale per row anyway.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hawqfx.analysis.pointwise import Function, function_of
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import ActivationHistogram, Quantizers, QuantParams
from hawqfx.ir.operators import EMBEDDING
from hawqfx.ir.program import Program
from hawqfx.ir.quantizers import numbers_of
from hawqfx.ir.sites import ActivationSite, WeightSite
from hawqfx.maths import affine, formats
from hawqfx.maths.formats import BLOCKS, BLOCKWISE_BITS, DYNAMIC, Format, Scheme
from hawqfx.pass_manager.base import Analysis, Kind, option

log = logging.getLogger(__name__)

BIAS_CODES = 2.0**30  # half of what int32 holds, since scales and biases may still be learned


def _weight_quantizer(weight: Tensor, bits: int, least: Tensor) -> QuantParams:
    """The quantizer of a weight (C, ...) whose scales are at least `least` (C,) wide."""
    low, high = affine.signed_range(bits)
    scales = affine.channel_scales(weight, bits)
    scales = torch.copysign(torch.maximum(scales.abs(), least), scales)
    return QuantParams(bits, tuple(scales.tolist()), 0, low, high, per_channel=True)


def _least_scales(program: Program, activations: Mapping[str, Quantizers]) -> dict[str, Tensor]:
    """The least scales of every weight (C,) with which the biases of its layers fit into int32.

    A bias b has the scale s_x s_w of the sums that it is added to, so that |b| <= BIAS_CODES s_x s_w.  Where b is so
    large, the products lose nothing by wider steps of the weight: rounding a weight changes each product by half of
    255 s_x s_w at most, which is 2^-23 of such a bias, as much as float32 loses.  Wider steps of the input would do as
    well for this channel, and cost the others their precision.
    """
    least = {site.key: torch.zeros(site.shape[0]) for site in program.weights}
    for layer in program.layers:
        static = [q.scale[0] for width, q in activations[layer.input].by_format.items() if width.is_static]
        if not static:
            continue
        bias = torch.zeros(1) if layer.bias is None else program.tensor(layer.bias).detach().abs()
        needed = (bias.double() / BIAS_CODES).clamp_min(torch.finfo(torch.float32).tiny) / min(static)
        least[layer.weight] = torch.maximum(least[layer.weight], needed.to(least[layer.weight]))
    return least


def _widened(by_format: Mapping[Format, QuantParams], least: Tensor) -> int:
    """Number of channels whose steps a bias widens."""
    narrowest = torch.tensor(by_format[max(by_format)].scale).abs() if by_format else torch.ones(0)
    return int((narrowest == least.cpu()).sum()) if len(narrowest) else 0


def _warn_of_biases(widened: Mapping[str, int]) -> None:
    """Say which weights have such channels, in one warning."""
    if widened:
        log.warning(
            "biases of %d channels are so far above the products that int32 cannot hold them in the products' steps, "
            "and these channels' weights have wider steps, which costs 2^-23 of the bias: %s%s",
            sum(widened.values()), ", ".join(f"{count} of {key}" for key, count in list(widened.items())[:3]),
            "" if len(widened) <= 3 else f", and of {len(widened) - 3} more weights",
        )  # fmt: skip


def _blockwise_quantizer(weight: Tensor, width: Format) -> QuantParams:
    scale = affine.block_scales(weight, width.bits, width.block)
    low, high = affine.signed_range(width.bits)
    return QuantParams(width.bits, numbers_of(scale), 0, low, high, True, "weight-only", scale.shape[1], width.block)


def _dynamic_quantizer() -> QuantParams:
    low, high = affine.unsigned_range(DYNAMIC.bits)
    return QuantParams(DYNAMIC.bits, (), 0, low, high, False, "dynamic")


def _activation_quantizer(
    histogram: ActivationHistogram, site: ActivationSite, bits: int, after: Function | None
) -> QuantParams:
    scale, zero_point = affine.affine_range(
        histogram.values, histogram.counts, bits, nonnegative=site.nonnegative, after=after
    )
    low, high = affine.unsigned_range(bits)
    if site.nonnegative:  # nothing above the ceiling, so that the quantizer does the rectifier's work
        scale = min(scale, float(torch.tensor(site.ceiling / high).nextafter(torch.tensor(0.0))))
    return QuantParams(bits, (scale,), zero_point, low, high, per_channel=False)


def _longest_blocks(program: Program) -> dict[str, int]:
    """The most inputs that a block of each weight may have that may have blocks: where linear layers alone multiply by
    it, or its rows are looked up."""
    linear = {layer.node for layer in program.layers if layer.operator == "linear"}
    longest: dict[str, int] = {}
    for node in program.graph.graph.find_nodes(op="get_attr"):
        looked_up = {user for user in node.users if user.target is EMBEDDING}
        others = {user.name for user in node.users if user not in looked_up}
        if others <= linear:
            key = str(node.target)
            longest[key] = program.tensor(key).shape[-1] if looked_up else max(BLOCKS)
    return longest


@dataclass(frozen=True)
class Calibration(Analysis):
    """The quantizer of every site in every format."""

    weight_bits: tuple[int, ...] = option((2, 3, 4, 5, 6, 7, 8), "bits of the static formats that weights may have")
    activation_bits: tuple[int, ...] = option((4, 6, 8), "bits of the static formats that activations may have")
    schemes: tuple[Scheme, ...] = option(("static",), "how layers may compute: static, weight-only, dynamic")
    blocks: tuple[int, ...] = option(BLOCKS, "inputs that share a scale in the scheme weight-only")
    needs: ClassVar[tuple[Kind, ...]] = (WeightSite, ActivationSite, ActivationHistogram)
    gives: ClassVar[tuple[Kind, ...]] = (Quantizers,)

    @torch.no_grad()
    def learn(self, program: Program, context: Context) -> Mapping[str, Quantizers]:
        activations = self._of_activations(program)
        return self._of_weights(program, _least_scales(program, activations)) | activations

    def blockwise(self, longest: int) -> list[Format]:
        """The weight-only formats of a weight whose blocks may have so many inputs: of the bits that weights may have,
        those that there is a kernel for."""
        return [
            formats.blockwise(bits, block)
            for bits in BLOCKWISE_BITS
            if bits in self.weight_bits
            for block in self.blocks
            if block <= longest
        ]

    def _of_weights(self, program: Program, least: Mapping[str, Tensor]) -> dict[str, Quantizers]:
        longest = _longest_blocks(program) if "weight-only" in self.schemes else {}
        others = bool({"static", "dynamic"} & set(self.schemes))
        facts, widened = {}, {}
        for site in program.weights:
            weight = program.tensor(site.key)
            needed = least[site.key].to(weight.device)
            by_format: dict[Format, QuantParams] = {}
            in_blocks = self.blockwise(longest.get(site.key, 0))
            if others or not in_blocks:
                by_format = {Format(bits): _weight_quantizer(weight, bits, needed) for bits in self.weight_bits}
                widened[site.key] = _widened(by_format, needed)
            by_format |= {width: _blockwise_quantizer(weight, width) for width in in_blocks}
            facts[site.key] = Quantizers(by_format)
        _warn_of_biases({key: count for key, count in widened.items() if count})
        return facts

    def _of_activations(self, program: Program) -> dict[str, Quantizers]:
        # no kernel of a convolution quantizes its input in each run: what one reads has no dynamic format
        convolved = {layer.input for layer in program.layers if layer.operator != "linear"}
        linear = {layer.input for layer in program.layers} - convolved
        facts = {}
        for site in program.activations:
            after = function_of(program.graph.graph, site.tensors)
            histogram = program.facts.get(site.key, ActivationHistogram)
            by_format = {
                Format(bits): _activation_quantizer(histogram, site, bits, after) for bits in self.activation_bits
            }
            if "dynamic" in self.schemes and site.key in linear:
                by_format[DYNAMIC] = _dynamic_quantizer()
            facts[site.key] = Quantizers(by_format)
        return facts
