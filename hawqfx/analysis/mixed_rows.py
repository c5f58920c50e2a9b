"""Quantizers of a table whose rows have bits of their own, so many on average: see hawqfx.maths.row_widths."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hawqfx.ir.facts import Quantizers, QuantParams
from hawqfx.ir.quantizers import scale_of
from hawqfx.maths import affine
from hawqfx.maths.formats import Format
from hawqfx.maths.row_widths import RowWidths, row_widths

FEWEST_COLUMNS = 16  # the byte that tells the bits of a row is at most half a bit of each of its weights


def mixed_rows(weight: Tensor, known: Quantizers, costs: Tensor) -> tuple[Quantizers, Mapping[Format, float]]:
    """The quantizers of a table in which a static format of b bits has rows of fewer and of more, b on average; and by
    how much other samples lose more in each format than those that the widths were chosen by.

    Beside 2 bits there is 1, the sign of each number.  Nothing changes in rows of fewer than FEWEST_COLUMNS, and where
    the static formats leave out a width between the narrowest and the widest of them.

    Args:
        weight: (V, K).
        known: the quantizers, whose rows all have the bits of the format.
        costs: (2, V), what a squared error of each row costs, over each half of the samples; (1, V) for a single one.
    """
    static = {width.bits: quantizer for width, quantizer in known.by_format.items() if width.is_static}
    widths = sorted(static)
    if weight.shape[1] < FEWEST_COLUMNS or len(widths) < 3 or widths != [*range(widths[0], widths[-1] + 1)]:
        return known, {}
    scales = [scale_of(static[bits]).to(weight.device) for bits in widths]
    errors = [_squared_errors(weight, scale, bits) for scale, bits in zip(scales, widths, strict=True)]
    offered = widths
    if widths[0] == 2:
        scale, error = _signs(weight, scales[-1])
        offered, scales, errors = [1, *widths], [scale, *scales], [error, *errors]
    by_format, optimism = dict(known.by_format), {}
    for bits in widths:
        found = row_widths(torch.stack(errors), costs.to(errors[0]), bits, offered)
        if bool((found.bits != bits).any()):
            by_format[Format(bits)] = _of_rows(static[bits], torch.stack(scales), found, offered[0])
            optimism[Format(bits)] = found.optimism
    return Quantizers(by_format), optimism


def _of_rows(equal: QuantParams, scales: Tensor, found: RowWidths, fewest: int) -> QuantParams:
    scale = scales.gather(0, (found.bits - fewest)[None].to(scales.device))[0]
    low, high = affine.signed_range(int(found.bits.max()))
    return replace(equal, scale=tuple(scale.tolist()), low=low, high=high, rows=tuple(found.bits.tolist()))


def _signs(weight: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """The scales of rows of one bit, (V,), at least `least` (V,), and their squared errors, (V,) float64.

    Of the codes -1 and 1 the best scale is the mean magnitude.  That of a row of zeros would be too narrow for the bias
    of a head in int32, and a wider one has the error that gives the row more bits.
    """
    rows = weight.double().abs()
    scale = torch.maximum(rows.mean(1).to(weight), least.abs())
    return scale, (rows - scale.double()[:, None]).square().sum(1)


def _squared_errors(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Of every row, (V,) float64, with the nearest codes."""
    steps = affine.along_channels(scale, weight)
    codes = (weight / steps).round().clamp(*affine.signed_range(bits))
    return (codes * steps - weight).double().square().sum(1)
