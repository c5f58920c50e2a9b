"""Codes of weights in the formats of their quantizers, rounded to the nearest or compensated.

Compensation fits the codes to the calibration samples, and the fewer these are beside the columns of a weight, the
better they are fitted at the cost of all others: of 64 pictures, the last layer of EfficientNet-Lite0 (1,280 columns)
is left an error 300 times too small.  So the samples are parted in two halves.  Codes that are fitted to one half are
judged by the other, both ways: that chooses the damping, and it is the error that the facts tell.  The codes themselves
are fitted to all samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hawqfx.analysis.input_moments import InputMoments, input_moments
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import Quantizers, QuantParams, RoundedWeights
from hawqfx.ir.program import Program
from hawqfx.ir.quantizers import scale_of
from hawqfx.maths import affine, rounding
from hawqfx.maths.formats import Format

DAMPINGS = (rounding.DAMPING, 0.1, 0.5)  # tried for each weight; more than these is as good as rounding to the nearest


def _compensated(weight: Tensor, widths: Quantizers, moments: InputMoments) -> RoundedWeights:
    """The codes in all formats: the static ones, which have a scale per row, together, then the others."""
    codes: dict[Format, Tensor] = {}
    errors: dict[Format, float] = {}
    optimism: dict[Format, float] = {}
    damping = _best_damping(weight, moments)
    for static in (True, False):
        quantizers = [quantizer for width, quantizer in widths.by_format.items() if width.is_static is static]
        if not quantizers:
            continue
        stack = _Stack(weight, quantizers, moments)
        whole = moments.whole[None]
        # twice the samples need half the damping
        rounded = stack.rounded(whole, max(rounding.DAMPING, damping / len(moments.halves)))
        fitted = stack.errors(rounded, whole)[0]
        ratio = torch.ones_like(fitted)
        if len(moments.halves) > 1:
            held_out = stack.errors(stack.rounded(moments.halves, damping), moments.halves.flip(0)).mean(0)
            ratio = torch.where(fitted > 0, held_out / fitted, 1.0).clamp_min(1.0)  # below one by chance alone
        for number, quantizer in enumerate(quantizers):
            codes[quantizer.format] = rounded[0, :, number].to(torch.int8).reshape(weight.shape)
            errors[quantizer.format] = float(fitted[number] * ratio[number])
            optimism[quantizer.format] = float(ratio[number])
    return RoundedWeights(codes, errors, optimism)


def _best_damping(weight: Tensor, moments: InputMoments) -> float:
    """The damping by which codes that are fitted to one half of the samples leave the least error on the other.

    Judged at 4 bits whatever the formats are, so that a plan which names a single one gives the same codes.
    """
    if len(moments.halves) < 2:
        return rounding.DAMPING
    low, high = affine.signed_range(4)
    scale = tuple(affine.symmetric_scales(weight, 4).tolist())
    stack = _Stack(weight, [QuantParams(4, scale, 0, low, high, per_channel=True)], moments)
    errors = [
        float(stack.errors(stack.rounded(moments.halves, damping), moments.halves.flip(0)).sum())
        for damping in DAMPINGS
    ]
    return DAMPINGS[errors.index(min(errors))]


class _Stack:
    """A weight's rows, once per quantizer: all quantizers are rounded together, by several moments at once.

    Args:
        weight: (C, ...).
        quantizers: q of them.
        moments: of its inputs.
    """

    def __init__(self, weight: Tensor, quantizers: Sequence[QuantParams], moments: InputMoments) -> None:
        self.groups, columns = moments.halves.shape[1], moments.halves.shape[-1]
        self.quantizers = len(quantizers)
        self.rows = weight.detach().double().reshape(self.groups, -1, columns)
        self.scales = [
            _scale_of_rows(quantizer, weight).double().reshape(*self.rows.shape[:2], -1) for quantizer in quantizers
        ]
        self.low, self.high = (
            torch.cat([torch.full_like(scale[..., :1], end) for scale, end in zip(self.scales, ends, strict=True)], 1)
            for ends in ([q.low for q in quantizers], [q.high for q in quantizers])
        )

    def rounded(self, moments: Tensor, damping: float) -> Tensor:
        """Codes (m, groups, q, R, K) by moments (m, groups, K, K)."""
        grids = (self.rows.repeat(1, self.quantizers, 1), torch.cat(self.scales, 1), self.low, self.high)
        compensation = rounding.Compensation(moments.flatten(0, 1), damping)
        codes = compensation.round(*(part.repeat(len(moments), 1, 1) for part in grids))
        return codes.reshape(len(moments), self.groups, self.quantizers, *self.rows.shape[1:])

    def errors(self, codes: Tensor, moments: Tensor) -> Tensor:
        """The weighted errors (m, q) that codes (m, groups, q, R, K) leave under moments (m, groups, K, K)."""
        errors = []
        for number, scale in enumerate(self.scales):
            difference = codes[:, :, number] * scale - self.rows
            error = rounding.weighted_error(difference.flatten(0, 1), moments.flatten(0, 1))
            errors.append(error.reshape(len(moments), -1).sum(1))
        return torch.stack(errors, 1)


def _scale_of_rows(quantizer: QuantParams, weight: Tensor) -> Tensor:
    """The scale in a shape that broadcasts over the weight: one per row, or one per element of a matrix."""
    return affine.along_channels(scale_of(quantizer).to(weight.device), weight)


def nearest(weight: Tensor, widths: Quantizers) -> RoundedWeights:
    """The nearest codes in all formats, and their squared errors ||Q(W) - W||^2."""
    codes: dict[Format, Tensor] = {}
    errors: dict[Format, float] = {}
    for width, quantizer in widths.by_format.items():
        scale = _scale_of_rows(quantizer, weight)
        code = (weight / scale).round().clamp(quantizer.low, quantizer.high)
        codes[width] = code.to(torch.int8)
        errors[width] = float((code * scale - weight).square().sum(dtype=torch.float64))
    return RoundedWeights(codes, errors, dict.fromkeys(codes, 1.0))


@torch.no_grad()
def compensated(program: Program, context: Context) -> dict[str, RoundedWeights]:
    """The compensated codes of every weight in the formats that the fact Quantizers has, by the samples of the context;
    the nearest ones of a table, whose rows are read without a product."""
    moments = input_moments(program, context)
    facts = {}
    for site in program.weights:
        weight, widths = program.tensor(site.key), program.facts.get(site.key, Quantizers)
        if site.key in moments:
            facts[site.key] = _compensated(weight, widths, moments[site.key])
        else:
            facts[site.key] = nearest(weight, widths)
    return facts
