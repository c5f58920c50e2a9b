"""The bound and the prices that the linear relaxation proves."""

import pytest

from hawqfx.allocation.solver.problem import Choice, LinearConstraint, Problem, Terms
from hawqfx.allocation.solver.search import choose
from tests.allocation.solver.instances import large


@pytest.mark.parametrize("limits", [1, 3])
def test_a_thousand_items_to_a_proven_gap(limits: int) -> None:
    problem = large(1000, limits, seed=1)
    answer = choose(problem, gap=1e-4)
    assert isinstance(answer, Choice)
    assert answer.optimal
    assert problem.keeps(answer.picks)
    assert answer.loss - answer.bound <= 1e-4 * answer.loss
    # the bound holds: the prices of the linear relaxation prove it, item by item
    proven = sum(
        min(
            loss + sum(answer.prices[limit.name] * limit.terms.single[i][k] for limit in problem.limits)
            for k, loss in enumerate(options)
        )
        for i, options in enumerate(problem.losses)
    ) - sum(answer.prices[limit.name] * limit.bound for limit in problem.limits)
    assert proven <= answer.loss
    assert proven >= 0.99 * answer.loss  # of a thousand items, at most three are fractions


def test_a_price_is_what_a_further_unit_saves() -> None:
    """Of two items with steps of equal worth: 3 for 2 units."""
    problem = Problem([[9.0, 6.0], [9.0, 6.0]], [LinearConstraint("units", 3, Terms({0: [0, 2], 1: [0, 2]}, {}))])
    answer = choose(problem)
    assert isinstance(answer, Choice)
    assert answer.prices["units"] == pytest.approx(1.5)
    loose = choose(Problem(problem.losses, [LinearConstraint("units", 4, problem.limits[0].terms)]))
    assert isinstance(loose, Choice)
    assert loose.prices["units"] == 0
