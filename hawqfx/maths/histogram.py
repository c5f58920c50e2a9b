"""A histogram that grows with its data, in one run over them.

Bins are [k w, (k + 1) w) for integers k, and their width w is a power of two.  When a value lies too far out, w doubles
and pairs of bins become one.  So no value ever changes sides, the counts do not depend on the order of the data, and
the index of a bin is exact in float32.
"""

import math

import torch
from torch import Tensor

BINS = 8192  # at least half of them are in use: sixteen or more to a step of an 8-bit quantizer over all values
_FINEST = -126  # log2 of the least width, that of the least normal float32
_PART = 1 << 18  # values that are counted at once, which bounds the memory and fits into the processor's cache


class Histogram:
    """Counts and sums of values in bins of equal width."""

    def __init__(self) -> None:
        self._low, self._high = math.inf, -math.inf
        self._exponent, self._first = _FINEST, 0  # log2 of the width, and the index k of the first bin
        self._counts = torch.zeros(BINS, dtype=torch.long)
        self._sums = torch.zeros(BINS, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Count values of any shape.

        Raises:
            ValueError: if one of them is not finite.
        """
        flat = values.detach().reshape(-1).float().cpu()
        if not len(flat):
            return
        low, high = (float(end) for end in torch.aminmax(flat))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("a value is not finite")
        self._cover(low, high)
        for part in flat.split(_PART):
            bins = (part * 2.0**-self._exponent).floor_().long().sub_(self._first)
            self._counts += torch.bincount(bins, minlength=BINS)
            self._sums += torch.bincount(bins, part.double(), minlength=BINS)

    def filled(self) -> tuple[Tensor, Tensor]:
        """The means (B,) and the counts (B,) of the bins that are not empty, in float64; the means ascend."""
        filled = self._counts > 0
        return self._sums[filled] / self._counts[filled], self._counts[filled].double()

    def _cover(self, low: float, high: float) -> None:
        """Let the bins reach from `low` to `high` and over all values before."""
        if low >= self._low and high <= self._high:
            return
        self._low, self._high = min(low, self._low), max(high, self._high)
        exponent = max(_exponent(self._low, self._high), self._exponent)
        first = math.floor(math.ldexp(self._low, -exponent))
        bins = ((torch.arange(BINS) + self._first) >> (exponent - self._exponent)) - first
        bins.clamp_(0, BINS - 1)  # those outside are empty
        self._counts = torch.zeros_like(self._counts).index_add_(0, bins, self._counts)
        self._sums = torch.zeros_like(self._sums).index_add_(0, bins, self._sums)
        self._exponent, self._first = exponent, first


def _exponent(low: float, high: float) -> int:
    """log2 of the least width of bins between two numbers, as far as float32 tells values apart."""
    fine = math.frexp((high - low) / BINS)[1] - 1 if high > low else _FINEST
    exponent = max(fine, math.frexp(max(abs(low), abs(high)))[1] - 24, _FINEST)
    while math.floor(math.ldexp(high, -exponent)) - math.floor(math.ldexp(low, -exponent)) >= BINS:
        exponent += 1
    return exponent
