"""Paired differences: two networks compared sample by sample, so that what is alike in both drops out."""

import math
from typing import NamedTuple

from torch import Tensor

SIGNIFICANT = 2.0  # standard errors: a difference below this many is not told from zero


class Difference(NamedTuple):
    """The mean of paired differences and its standard error; infinite for a single pair."""

    mean: float
    stderr: float

    @property
    def is_significant(self) -> bool:
        """Whether the difference is told from zero."""
        return abs(self.mean) > SIGNIFICANT * self.stderr

    def __str__(self) -> str:
        return f"{self.mean:+.4g} +- {self.stderr:.2g}"


def paired_difference(one: Tensor, other: Tensor, weights: Tensor) -> Difference:
    """The weighted mean of one - other, all (n,) float64.

    For weights w with sum W, the mean m of differences d has the variance sum w^2 (d - m)^2 / W^2 n / (n - 1).
    """
    differences, total, n = one - other, float(weights.sum()), len(one)
    mean = float((weights * differences).sum()) / total
    if n < 2:
        return Difference(mean, math.inf)
    squares = float((weights * (differences - mean)).square().sum())
    return Difference(mean, math.sqrt(squares * n / (n - 1)) / total)
