"""Affine quantization: code = clip(round(x / s) + z, low, high), value = (code - z) * s.

Rounding is half to even and x is divided by s, as ONNX QuantizeLinear has it; torch's own fake_quantize multiplies by
1/s, which rounds some ties the other way.  Weights are signed, symmetric (z = 0) and per-channel or in blocks of
a row, on the full range -2^(b-1) ... 2^(b-1) - 1.  Activations are unsigned, per tensor, on 0 ... 2^b - 1.

A scale is a number, or (C,) for the indices of dimension 0, or (C, B) for B blocks of each row of a matrix.  Those of
weights in blocks, and below 8 bits, may be negative: the range has one code more below zero than above, and the sign
turns it to where the row or block needs it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Function = Callable[[Tensor], Tensor]

_COARSE, _REFINE = 80, 6  # clipping points, and steps of least squares, in the search for a symmetric scale
# clipping points for the scale of a block of up to 4 bits: four times as many gain 0.3% of its error at 4 bits
_COARSE_BLOCKS = 20
_ROUNDS, _GRID = 3, 25  # grids, and clipping points at each end of the range, in the search for an affine range
CACHED = 1 << 17  # elements of a weight that are searched together, so that they stay in the processor's cache


def fake_quantize(x: Tensor, scale: Tensor, zero_point: int, low: int, high: int) -> Tensor:
    """`x` through a quantizer and back.

    Args:
        x: the tensor.
        scale: see the module.
        zero_point: the code of the value 0.
        low: the lowest code.
        high: the highest code.

    Returns:
        A new tensor in the shape of `x`.
    """
    s = along_channels(scale, x)
    # for codes below 2^24 the same as to add the zero-point, clamp and subtract it, with less to do
    return x.div(s).round_().clamp_(low - zero_point, high - zero_point).mul_(s)


def quantize(x: Tensor, scale: Tensor, zero_point: int, low: int, high: int) -> Tensor:
    """The codes of `x`, in the smallest of uint8, int8 and int32 that holds `low` to `high`.

    The arguments are those of `fake_quantize`.
    """
    codes = x.div(along_channels(scale, x)).round_().add_(zero_point).clamp_(low, high)
    return codes.to(code_type(low, high))


def code_type(low: int, high: int) -> torch.dtype:
    """The smallest of uint8, int8 and int32 that holds `low` to `high`."""
    if low >= 0 and high <= 255:
        return torch.uint8
    return torch.int8 if low >= -128 and high <= 127 else torch.int32


def signed_range(bits: int) -> tuple[int, int]:
    """The lowest and the highest signed code."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def unsigned_range(bits: int) -> tuple[int, int]:
    """The lowest and the highest unsigned code."""
    return 0, (1 << bits) - 1


def channel_scales(weight: Tensor, bits: int) -> Tensor:
    """Per-channel scales with the least ||Q(w) - w||^2 that the search meets, below 8 bits of either sign.

    There is one code more below zero than above, and the sign tells on which side of a row it is.  That takes no bytes,
    and of the squared error at 3 bits on average 9% of 1 x 1 convolutions, 14% of 3 x 3 ones and 24% of depthwise ones
    (EfficientNet-Lite0, ResNet-20).  At 8 bits there is nothing to gain, and all runtimes take positive scales.

    The search takes the best of a grid of clipping points, and improves it by alternating least squares: for fixed
    codes q the best scale is <q, w> / <q, q>, and for a fixed scale the best codes are the rounded ones, so the error
    never rises.

    Args:
        weight: (C, ...).
        bits: bits of a code.

    Returns:
        (C,) in float32; a channel of zeros has scale 1.
    """
    rows = weight.detach().reshape(weight.shape[0], -1)
    few = max(1, CACHED // max(1, rows.shape[1]))
    find = _scales_of_either_sign if bits < 8 else _scales
    found = torch.cat([find(part, *signed_range(bits), _COARSE)[0] for part in rows.split(few)]).float()
    least = torch.finfo(torch.float32).tiny
    return torch.where(found.abs() < least, least, found)


def block_scales(weight: Tensor, bits: int, block: int) -> Tensor:
    """Scales of blocks of each row, of either sign, with the least ||Q(w) - w||^2 that the search meets.

    On normal values in blocks of 32 the sign is worth 20% of the squared error, as much as a zero-point of each block
    would be, and takes no bytes.  Scales are bfloat16 numbers, as the file has them.

    Args:
        weight: (C, K).
        bits: bits of a code.
        block: inputs of a block.

    Returns:
        (C, B) in float32.
    """
    rows = in_blocks(weight.detach(), block).flatten(0, 1)
    clippings = _COARSE_BLOCKS if bits <= 4 else _COARSE
    found = []
    for part in rows.split(max(1, CACHED // block)):
        found.append(_scales_of_either_sign(part, *signed_range(bits), clippings)[0])
    scale = torch.cat(found).bfloat16().float()
    least = torch.finfo(torch.bfloat16).tiny
    return torch.where(scale.abs() < least, least, scale).reshape(len(weight), -1)


def _scales_of_either_sign(rows: Tensor, low: int, high: int, clippings: int) -> tuple[Tensor, Tensor]:
    """The better of `_scales` for rows and for their negatives, whose scales are negative."""
    (above, lost), (below, lost_below) = (_scales(part, low, high, clippings) for part in (rows, -rows))
    return torch.where(lost_below < lost, -below, above), torch.minimum(lost, lost_below)


def _scales(rows: Tensor, low: int, high: int, clippings: int) -> tuple[Tensor, Tensor]:
    """The positive scales (C,) of `channel_scales` for rows (C, K), from so many clipping points, and the squared
    errors (C,) of rows whose largest magnitude is one; both in float64.

    Rows are brought to a largest magnitude of one, so that a clipping point is one number for all of them, and squares
    are far from the ends of float32.  Least squares are taken in float64: where an element lies at the threshold of two
    codes, rounding in float32 could end them beside the best scale.
    """
    largest = rows.double().abs().amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    rows = rows / largest
    best = _best_clipping(rows.float(), low, high, clippings).double()
    codes, buffer = torch.empty_like(rows), torch.empty_like(rows)
    least = _error(rows, best, _codes(rows, best, low, high, codes), buffer)
    for _ in range(_REFINE):
        energy = torch.linalg.vecdot(codes, codes)
        scale = torch.where(energy > 0, torch.linalg.vecdot(codes, rows) / energy.clamp_min(1), best)
        error = _error(rows, scale, _codes(rows, scale, low, high, codes), buffer)
        better = error < least
        if not bool(better.any()):
            break
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best * largest[:, 0], least


def _best_clipping(rows: Tensor, low: int, high: int, clippings: int) -> Tensor:
    """The scales (C,) of the best clipping points of rows (C, K), whose largest magnitude is one, in float32.

    Clipping points fall, and what the extremes of a row alone lose by clipping is a lower bound on its error with all
    points to come: the search ends where no row can gain any more.
    """
    grid = torch.arange(clippings, 0, -1, device=rows.device)[:, None] / (clippings * max(high, 1))  # widest first
    lowest, highest = torch.aminmax(rows, dim=1)
    clipped = (highest - high * grid).clamp_min(0).square() + (low * grid - lowest).clamp_min(0).square()
    codes = torch.empty_like(rows)
    best, least = grid[0].expand(len(rows)), rows.new_full((len(rows),), torch.inf)
    for scale, bound in zip(grid, clipped, strict=True):
        if bool((bound >= least).all()):
            break
        error = _error(rows, scale, _codes(rows, scale, low, high, codes), codes)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def _codes(rows: Tensor, scale: Tensor, low: int, high: int, out: Tensor) -> Tensor:
    """The codes (C, K), as floats in `out`, of rows (C, K) with scales (C,) or (1,)."""
    return torch.div(rows, scale[:, None], out=out).round_().clamp_(low, high)


def _error(rows: Tensor, scale: Tensor, codes: Tensor, buffer: Tensor) -> Tensor:
    """The squared errors (C,) of rows (C, K) with scales (C,) or (1,); `buffer` (C, K) is overwritten."""
    return torch.linalg.vector_norm(torch.mul(codes, scale[:, None], out=buffer).sub_(rows), dim=1).square_()


def affine_range(
    values: Tensor, counts: Tensor, bits: int, *, nonnegative: bool, after: Function | None = None
) -> tuple[float, int]:
    """Scale and zero-point with the least mean squared error on a histogram.

    The search tries clipping points at both ends on a grid, then on finer grids around the best pair.  Zero is always
    represented exactly.

    Args:
        values: (B,) a value for each bin, ascending.
        counts: (B,) the number of values in each bin.
        bits: bits of a code.
        nonnegative: whether the zero-point must be 0, which lets onnxruntime drop a ReLU before the quantizer.
        after: a function of each value, such as GELU; errors count after it.

    Returns:
        The scale, which float32 represents exactly, and the zero-point.
    """
    values, counts = values.double(), counts.double()
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    if nonnegative:
        low = 0.0
    if high == low:
        return 1.0, 0
    levels = unsigned_range(bits)[1]
    fractions = _Fractions((0.0, 1.0), (0.0, 1.0))
    least, best = float("inf"), (1.0, 0)
    for _ in range(_ROUNDS):
        bottom, top = _clipping_points(low, high, fractions)
        scale, zero = _quantizers_between(bottom, top, levels)
        errors = errors_on_histogram(values, counts, scale, zero, levels, after)
        at = int(errors.argmin())
        if float(errors[at]) < least:
            least, best = float(errors[at]), (float(scale[at]), int(zero[at]))
        fractions = fractions.around(
            float(bottom[at]) / low if low < 0 else 1.0, float(top[at]) / high if high > 0 else 1.0
        )
    return best


class _Fractions(NamedTuple):
    """The part of a grid that is searched: clipping points as fractions of the lowest and of the highest value.

    Args:
        low: from which to which fraction of the lowest value.
        high: from which to which fraction of the highest value.
    """

    low: tuple[float, float]
    high: tuple[float, float]

    def around(self, low: float, high: float) -> "_Fractions":
        """Finer grids, two steps of the present ones to either side of a pair of fractions."""
        return _Fractions(_narrowed(self.low, low), _narrowed(self.high, high))


def _narrowed(ends: tuple[float, float], centre: float) -> tuple[float, float]:
    width = (ends[1] - ends[0]) / 12
    return max(0.0, centre - width), min(1.0, centre + width)


def _clipping_points(low: float, high: float, fractions: _Fractions) -> tuple[Tensor, Tensor]:
    """All pairs (bottom, top) of clipping points on the grid, as two tensors (P,), but for empty ranges."""
    shrink_high = torch.linspace(*fractions.high, _GRID, dtype=torch.float64)
    shrink_low = torch.linspace(*fractions.low, _GRID, dtype=torch.float64) if low < 0 else shrink_high.new_ones(1)
    bottom, top = (grid.reshape(-1) for grid in torch.meshgrid(low * shrink_low, high * shrink_high, indexing="ij"))
    keep = top - bottom > 0
    return bottom[keep], top[keep]


def _quantizers_between(bottom: Tensor, top: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scales (P,) and zero-points (P,) of quantizers with codes 0 to `levels` over ranges from bottom to top (P,)."""
    # float32, as in the file: the search must see the very quantizer that will be lowered
    scale = ((top - bottom) / levels).float().double().clamp_min(torch.finfo(torch.float32).tiny)
    return scale, (-bottom / scale).round().clamp(0, levels)


def errors_on_histogram(
    values: Tensor, counts: Tensor, scale: Tensor, zero: Tensor, levels: int, after: Function | None = None
) -> Tensor:
    """The squared errors of quantizers with codes 0 to `levels`, summed over a histogram.

    For the bins x with code c and value v, the error sum n (v - x)^2 is v^2 sum n - 2 v sum n x + sum n x^2, and the
    sums over the bins between two thresholds are differences of cumulative sums.

    Args:
        values: (B,) float64, a value for each bin, ascending.
        counts: (B,) float64, the number of values in each bin.
        scale: (P,) float64.
        zero: (P,) float64, the zero-points.
        levels: the highest code.
        after: a function of each value, such as GELU; errors count after it.

    Returns:
        (P,) in float64.
    """
    codes = torch.arange(levels + 1) - zero[:, None]
    at = torch.searchsorted(values, (codes[:, :-1] + 0.5) * scale[:, None])
    at = F.pad(F.pad(at, (1, 0)), (0, 1), value=len(values))
    value_of_code = codes * scale[:, None]
    if after is not None:
        values, value_of_code = after(values), after(value_of_code)
    number, total = (F.pad(sums.cumsum(0), (1, 0))[at].diff(dim=1) for sums in (counts, counts * values))
    return (value_of_code * (value_of_code * number - 2 * total)).sum(1) + (counts * values.square()).sum()


def along_channels(scale: Tensor, x: Tensor) -> Tensor:
    """A scale, see the module, in a shape that broadcasts over `x`."""
    if scale.ndim == 2:
        return scale.repeat_interleave(block_of(x.shape[1], scale.shape[1]), 1)[:, : x.shape[1]]
    return scale if scale.ndim == 0 else scale.reshape(-1, *[1] * (x.ndim - 1))


def block_of(columns: int, count: int) -> int:
    """The inputs of a block, a power of two, where so many blocks hold so many columns.

    There is only one, but for a single block, whose size does not matter.
    """
    return 1 << (-(-columns // count) - 1).bit_length()


def in_blocks(rows: Tensor, block: int) -> Tensor:
    """Rows (..., K) as blocks (..., B, block); zeros fill up the last block."""
    return F.pad(rows, (0, -rows.shape[-1] % block)).unflatten(-1, (-1, block))


def fake_quantize_dynamic(x: Tensor) -> Tensor:
    """`x` through ONNX DynamicQuantizeLinear and back: 8 bits unsigned, over the range of all values and 0."""
    low, high = x.min().clamp_max(0), x.max().clamp_min(0)
    scale = (high - low) / 255
    scale = torch.where(scale > 0, scale, 1.0)
    zero_point = (-low / scale).round_().clamp_(0, 255)
    return x.div(scale).round_().add_(zero_point).clamp_(0, 255).sub_(zero_point).mul_(scale)


def fake_quantize_blocks(x: Tensor, block: int) -> Tensor:
    """Rows (..., K) through signed 8-bit quantizers and back, with a range for each block of a row.

    onnxruntime's MatMulNBits at accuracy_level 4 multiplies by these values.
    """
    blocks = in_blocks(x, block)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, blocks / scale, 0.0).round_()
    return (codes * scale).flatten(-2)[..., : x.shape[-1]]
