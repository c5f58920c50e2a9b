"""Sums of terms, and the losses that a problem refuses."""

import math

import pytest

from hawqfx.allocation.solver.problem import Problem, Terms
from tests.allocation.solver.instances import instance


@pytest.mark.parametrize("kind", ["single", "pairs", "both"])
def test_total_is_the_direct_sum(kind: str) -> None:
    _, (limit,), every, (totals,) = instance(kind, 5)
    assert [limit.terms.total(picks) for picks in every.tolist()] == totals.tolist()
    assert Terms({1: [5, 7]}, {(0, 1): [[1, 2], [3, 4]]}).total([1, 0]) == 8


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_name_the_item(value: float) -> None:
    with pytest.raises(ValueError, match="losses of item 1 are not finite"):
        Problem([[0.0, 1.0], [2.0, value]])
    with pytest.raises(ValueError, match=r"losses of the pair \(0, 1\) are not finite"):
        Problem([[0.0], [2.0]], interactions={(0, 1): [[value]]})
