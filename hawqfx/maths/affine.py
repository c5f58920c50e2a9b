"""Affine quantization: code = clip(round(x / s) + z, low, high), value = (code - z) * s.

Rounding is half to even and x is divided by s, as ONNX QuantizeLinear has it; torch's own fake_quantize multiplies by
1/s, which rounds some ties the other way.  Weights are signed, symmetric (z = 0) and per-channel, on the full range
-2^(b-1) ... 2^(b-1) - 1.  Activations are unsigned, per tensor, on 0 ... 2^b - 1.

A scale is a number, or (C,) for the indices of dimension 0, or (C, B) for B blocks of each row of a matrix.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from hawqfx.maths.formats import BLOCK

_COARSE, _REFINE = 80, 6
CACHED = 1 << 15  # elements of a weight that are looked at together, so that they stay in the processor's cache


def fake_quantize(x: Tensor, scale: Tensor, zero_point: int, low: int, high: int) -> Tensor:
    """The values that quantization leaves of `x`."""
    s = along_channels(scale, x)
    return x.div(s).round_().add_(zero_point).clamp_(low, high).sub_(zero_point).mul_(s)


def quantize(x: Tensor, scale: Tensor, zero_point: int, low: int, high: int) -> Tensor:
    """Integer codes, in the smallest of uint8, int8 and int32 that holds `low` to `high`."""
    codes = x.div(along_channels(scale, x)).round_().add_(zero_point).clamp_(low, high)
    return codes.to(code_type(low, high))


def code_type(low: int, high: int) -> torch.dtype:
    if low >= 0 and high <= 255:
        return torch.uint8
    return torch.int8 if low >= -128 and high <= 127 else torch.int32


def signed_range(bits: int) -> tuple[int, int]:
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def unsigned_range(bits: int) -> tuple[int, int]:
    return 0, (1 << bits) - 1


def symmetric_scales(weight: Tensor, bits: int) -> Tensor:
    """Per-channel scales (C,) float32 with the least ||Q(w) - w||^2 found, for a weight (C, ...).

    The best of a grid of clipping points, then alternating least squares: for fixed codes q the best scale is
    <q, w> / <q, q>, and for a fixed scale the best codes are the rounded ones, so the error never rises.
    A channel of zeros gets scale 1.
    """
    rows = weight.detach().reshape(weight.shape[0], -1)
    few = max(1, CACHED // max(1, rows.shape[1]))
    return torch.cat([_scales(part.double(), *signed_range(bits)) for part in rows.split(few)])


def _scales(rows: Tensor, low: int, high: int) -> Tensor:
    largest = rows.abs().amax(1)
    widest = torch.where(largest > 0, largest / max(high, 1), 1.0)
    best = widest.clone()
    least = _error(rows, best, low, high)
    for step in range(1, _COARSE):
        scale = widest * (1 - step / _COARSE)
        error = _error(rows, scale, low, high)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    for _ in range(_REFINE):
        codes = (rows / best[:, None]).round().clamp(low, high)
        energy = (codes * codes).sum(1)
        scale = torch.where(energy > 0, (codes * rows).sum(1) / energy.clamp_min(1), best)
        better = _error(rows, scale, low, high) < least
        best = torch.where(better, scale, best)
        least = _error(rows, best, low, high)
    return best.float().clamp_min(torch.finfo(torch.float32).tiny)


def _error(rows: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    s = scale[:, None]
    return ((rows / s).round().clamp_(low, high).mul_(s) - rows).square().sum(1)


def affine_range(
    values: Tensor, counts: Tensor, bits: int, *, nonnegative: bool, after: Callable[[Tensor], Tensor] | None = None
) -> tuple[float, int]:
    """Scale and zero-point of the least mean squared error on a histogram: `counts` (B,) of values near `values` (B,).

    Searches clipping points at both ends on a grid, then on a finer one around the best.  Zero is always represented
    exactly; with `nonnegative` the zero-point is 0, which lets onnxruntime drop a ReLU before the quantizer.  `after`:
    a function of each value, such as GELU, after which errors count.
    """
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    if nonnegative:
        low = 0.0
    if high == low:
        return 1.0, 0
    levels = unsigned_range(bits)[1]
    wanted = values.double() if after is None else after(values.double())
    ends = (0.0, 1.0), (0.0, 1.0)
    best = (float("inf"), 1.0, 0)
    for _ in range(3):
        (low_from, low_to), (high_from, high_to) = ends
        shrink_high = torch.linspace(high_from, high_to, 25, dtype=torch.float64)
        shrink_low = torch.linspace(low_from, low_to, 25, dtype=torch.float64) if low < 0 else shrink_high.new_ones(1)
        bottom, top = (grid.reshape(-1) for grid in torch.meshgrid(low * shrink_low, high * shrink_high, indexing="ij"))
        keep = top - bottom > 0
        bottom, top = bottom[keep], top[keep]
        # float32, as in the file: the search must see the very quantizer that will be lowered
        scale = ((top - bottom) / levels).float().double().clamp_min(torch.finfo(torch.float32).tiny)
        zero = (-bottom / scale).round().clamp(0, levels)
        codes = ((values.double() / scale[:, None]).round() + zero[:, None]).clamp_(0, levels)
        become = (torch.arange(levels + 1) - zero[:, None]) * scale[:, None]  # of each code
        become = become if after is None else after(become)
        errors = ((become.gather(1, codes.long()) - wanted) ** 2 * counts).sum(1)
        at = int(errors.argmin())
        if float(errors[at]) < best[0]:
            best = (float(errors[at]), float(scale[at]), int(zero[at]))
        width_low, width_high = (low_to - low_from) / 12, (high_to - high_from) / 12
        centre_low = float(bottom[at]) / low if low < 0 else 1.0
        centre_high = float(top[at]) / high if high > 0 else 1.0
        ends = (
            (max(0.0, centre_low - width_low), min(1.0, centre_low + width_low)),
            (max(0.0, centre_high - width_high), min(1.0, centre_high + width_high)),
        )
    return best[1], best[2]


def along_channels(scale: Tensor, x: Tensor) -> Tensor:
    """A scale that broadcasts over `x`."""
    if scale.ndim == 2:
        return scale.repeat_interleave(BLOCK, 1)[:, : x.shape[1]]
    return scale if scale.ndim == 0 else scale.reshape(-1, *[1] * (x.ndim - 1))


def in_blocks(rows: Tensor) -> Tensor:
    """Rows (..., K) as blocks (..., B, BLOCK), the last one filled up with zeros."""
    return F.pad(rows, (0, -rows.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))


def fake_quantize_dynamic(x: Tensor) -> Tensor:
    """The values that ONNX DynamicQuantizeLinear leaves of `x`: 8 bits unsigned over the range of all values and 0."""
    low, high = x.min().clamp_max(0), x.max().clamp_min(0)
    scale = (high - low) / 255
    scale = torch.where(scale > 0, scale, 1.0)
    zero_point = (-low / scale).round_().clamp_(0, 255)
    return x.div(scale).round_().add_(zero_point).clamp_(0, 255).sub_(zero_point).mul_(scale)


def fake_quantize_blocks(x: Tensor) -> Tensor:
    """The values that 8 bits leave of the rows (..., K) of `x`, signed, with the range of each block of its own: what
    onnxruntime's MatMulNBits multiplies by at accuracy_level 4."""
    blocks = in_blocks(x)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, blocks / scale, 0.0).round_()
    return (codes * scale).flatten(-2)[..., : x.shape[-1]]
