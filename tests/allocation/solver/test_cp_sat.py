"""The effort and the resolution of CP-SAT."""

import pytest

from hawqfx.allocation.solver import cp_sat
from hawqfx.allocation.solver.problem import Choice, LinearConstraint, Problem, Terms
from hawqfx.allocation.solver.search import choose
from tests.allocation.solver.instances import large


def test_stopped_early_it_gives_its_best_with_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """With next to no effort: a choice within the limits, a bound below the optimum, and the word that it is not known
    to be the best."""
    problem = large(60, 3, seed=5)
    best = choose(problem)
    monkeypatch.setattr(cp_sat, "EFFORT", 0.02)
    early = choose(problem)
    assert isinstance(best, Choice)
    assert isinstance(early, Choice)
    assert problem.keeps(early.picks)
    assert not early.optimal
    assert early.bound <= best.loss <= early.loss
    assert early == choose(problem)  # counted, not clocked


def test_losses_over_twelve_decades_keep_their_order() -> None:
    losses = [[1e3, 0.0], [2e-9, 1e-9], [3e-9, 0.0]]
    answer = choose(Problem(losses, [LinearConstraint("two", 2, Terms({i: [0, 1] for i in range(3)}, {}))]))
    assert isinstance(answer, Choice)
    assert answer.picks == (1, 0, 1)
