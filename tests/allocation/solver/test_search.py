"""The search against the enumeration of every choice, and properties of problems too large for that."""

import random
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hawqfx.allocation.solver import search
from hawqfx.allocation.solver.problem import Choice, Infeasible, LinearConstraint, Nogood, Problem, Terms
from hawqfx.allocation.solver.search import choose
from tests.allocation.solver.instances import KINDS, Picks, instance, large, totals_of


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", KINDS)
def test_choice_is_the_best_of_all(kind: str, seed: int) -> None:
    losses, limits, every, totals = instance(kind, seed)
    answer = choose(Problem(losses, limits))
    kept = np.all([t <= limit.bound for t, limit in zip(totals, limits, strict=True)], axis=0)
    if not kept.any():  # each bound is within reach alone, so it is both together: 9 of the 80
        assert isinstance(answer, Infeasible)
        _check_jointly_infeasible(answer, limits, totals)
        return
    assert isinstance(answer, Choice)
    assert all(limit.terms.total(answer.picks) <= limit.bound for limit in limits)
    assert answer.loss == pytest.approx(sum(losses[i][k] for i, k in enumerate(answer.picks)), rel=1e-12)  # summation
    table = [np.array(options)[every[:, i]] for i, options in enumerate(losses)]
    least = np.sum(table, axis=0)[kept].min()
    # a loss is rounded by half a unit, in the choice and in the best one: one unit per item, 2^-46 of the sum of losses
    unit = sum(map(sum, losses)) * 2.0**-46
    assert least * (1 - 1e-12) <= answer.loss <= least + unit * len(losses)
    assert answer.optimal
    assert answer.bound <= answer.loss


def _check_jointly_infeasible(answer: Infeasible, limits: list[LinearConstraint], totals: list[Picks]) -> None:
    assert not answer.alone
    at = [limit.name for limit in limits].index(answer.name)
    others = [t <= limit.bound for n, (t, limit) in enumerate(zip(totals, limits, strict=True)) if n != at]
    assert answer.least == totals[at][np.all(others, axis=0)].min() > limits[at].bound


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_out_of_reach_is_named_with_its_least(kind: str, seed: int) -> None:
    losses, limits, _, totals = instance(kind, seed)
    least = int(totals[-1].min())
    last = limits[-1]
    limits[-1] = LinearConstraint(last.name, least - 1, Terms(last.terms.single, last.terms.pairs))
    assert choose(Problem(losses, limits)) == Infeasible(last.name, least, alone=True)


@pytest.mark.parametrize("seed", range(8))
def test_limits_that_conflict_are_named_with_the_least_beside_the_others(seed: int) -> None:
    """Options that are cheap for one limit are dear for the other; a third limit does not matter."""
    rng = random.Random(seed)
    costs = [[rng.randint(0, 20) for _ in range(3)] for _ in range(4)]
    one, other = dict(enumerate(costs)), {i: [20 - c for c in row] for i, row in enumerate(costs)}
    every = np.array(list(product(range(3), repeat=4)), np.int64)
    totals = [totals_of(one, {}, every), totals_of(other, {}, every), totals_of({}, {}, every)]  # the first two make 80
    bound = int(np.median(totals[0]))
    limits = [
        LinearConstraint("one", bound, Terms(one, {})),
        LinearConstraint("other", 79 - bound, Terms(other, {})),
        LinearConstraint("none", 0, Terms({}, {})),
    ]
    answer = choose(Problem([[1.0] * 3] * 4, limits))
    assert isinstance(answer, Infeasible)
    assert answer.name != "none"
    _check_jointly_infeasible(answer, limits, totals)


def test_three_limits_of_which_no_two_agree_are_infeasible_not_out_of_time() -> None:
    """Limit k allows only option k, so none of them can be kept beside the other two."""
    limits = [
        LinearConstraint(f"only {k}", 0, Terms({0: [int(option != k) for option in range(3)]}, {})) for k in range(3)
    ]
    answer = choose(Problem([[1.0, 2.0, 3.0]], limits))
    assert isinstance(answer, Infeasible)
    assert not answer.alone
    assert answer.least == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_inputs_give_the_same_picks_among_equals(kind: str) -> None:
    losses, limits, _, _ = instance(kind, 7)
    equal = [[1.0] * len(options) for options in losses]
    limits = [LinearConstraint(limit.name, 10**6, Terms(limit.terms.single, limit.terms.pairs)) for limit in limits]
    first, again = choose(Problem(equal, limits)), choose(Problem(equal, limits))
    assert isinstance(first, Choice)
    assert first == again
    assert first.loss == len(losses)


def test_zero_and_negative_losses() -> None:
    limit = LinearConstraint("size", 3, Terms({0: [2, 1], 1: [2, 1]}, {}))
    free = choose(Problem([[0.0, 0.0], [0.0, 0.0]], [limit]))
    assert isinstance(free, Choice)
    assert (free.loss, free.bound, free.optimal) == (0.0, 0.0, True)
    assert limit.terms.total(free.picks) <= 3
    found = choose(Problem([[-4.0, 1.0], [-2.0, 1.0]], [limit]))
    assert isinstance(found, Choice)
    assert (found.picks, found.loss, found.bound, found.optimal) == ((0, 1), -3.0, -3.0, True)


def test_of_sums_whose_largest_is_limited_the_one_that_is_exceeded_most_is_named() -> None:
    """Its least sum is what the limit must be raised to; that of the first would not do."""
    sums = {"first": (5, 4), "second": (9, 8), "third": (7, 1), "other": (3, 3)}
    limits = [
        LinearConstraint(name, 4, Terms({0: costs}, {}), "" if name == "other" else "memory")
        for name, costs in sums.items()
    ]
    assert choose(Problem([[1.0, 0.0]], limits)) == Infeasible("second", 8, alone=True)
    raised = [LinearConstraint(limit.name, 8, limit.terms, limit.amount) for limit in limits]
    assert isinstance(choose(Problem([[1.0, 0.0]], raised)), Choice)


def test_no_limits_and_no_items() -> None:
    assert choose(Problem([[3.0, 1.0, 2.0], [5.0]])) == Choice((1, 0), 6.0, 6.0, True)
    assert choose(Problem([])) == Choice((), 0, 0, True)
    assert choose(Problem([[1.0]], [LinearConstraint("nothing costs", -1, Terms({}, {}))])) == Infeasible(
        "nothing costs", 0, alone=True
    )


def _with_everything(seed: int) -> Problem:
    """Up to 7 items with limits, pairs in limits and losses, negative losses and nogoods."""
    rng = random.Random(f"everything {seed}")
    sizes = [rng.randint(2, 4) for _ in range(rng.randint(2, 7))]
    couples = [(i, j) for i in range(len(sizes)) for j in range(i + 1, len(sizes)) if rng.random() < 0.4]

    def table(i: int, j: int, low: int, high: int) -> list[list[float]]:
        return [[rng.randint(low, high) for _ in range(sizes[j])] for _ in range(sizes[i])]

    limits = []
    for number in range(rng.randint(0, 3)):
        single = {i: [rng.randint(0, 30) for _ in range(n)] for i, n in enumerate(sizes)}
        pairs = {(i, j): table(i, j, 0, 20) for i, j in couples if rng.random() < 0.5}
        terms = Terms(single, pairs)
        some = sorted(terms.total([rng.randrange(n) for n in sizes]) for _ in range(5))
        limits.append(LinearConstraint(f"limit {number}", int(some[rng.choice([0, 2])]), terms))
    nogoods: list[Nogood] = []
    for _ in range(rng.randint(0, 4)):
        members = rng.sample(range(len(sizes)), rng.randint(1, min(3, len(sizes))))
        nogoods.append({i: frozenset(rng.sample(range(sizes[i]), rng.randint(1, sizes[i] - 1))) for i in members})
    losses = [[rng.uniform(-1, 3) * 10 ** rng.randint(-3, 1) for _ in range(n)] for n in sizes]
    interactions = {(i, j): [[v / 7 for v in row] for row in table(i, j, -9, 9)] for i, j in couples}
    return Problem(losses, limits, nogoods, interactions)


@pytest.mark.parametrize("seed", [*range(60), 98])  # 98: bound + (loss - bound) rounds to below the loss
@pytest.mark.parametrize("small", [search.SMALL, 0])
def test_nogoods_and_pairs_in_losses(seed: int, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the cores go through the solver for large ones, and grow from one option each."""
    if small == 0:
        monkeypatch.setattr(search, "SMALL", 0)
        monkeypatch.setattr(search, "CORE", 1)
    problem = _with_everything(seed)
    every = list(product(*(range(len(options)) for options in problem.losses)))
    kept = [picks for picks in every if problem.keeps(picks)]
    if not kept:
        if any(Problem(problem.losses, (), problem.nogoods).keeps(picks) for picks in every):
            assert isinstance(choose(problem), Infeasible)
        else:
            with pytest.raises(ValueError, match="nogoods exclude every choice"):
                choose(problem)
        return
    answer = choose(problem)
    assert isinstance(answer, Choice)
    assert answer.optimal
    assert problem.keeps(answer.picks)
    # sums of up to 30 floats in another order, and the integers' resolution
    assert answer.loss == pytest.approx(min(map(problem.objective.total, kept)), abs=1e-9)
    assert answer.bound <= answer.loss


INSTANCES = st.builds(large, st.integers(1, 30), st.integers(1, 3), st.integers(0, 10**6))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(INSTANCES)
def test_what_holds_of_any_instance(problem: Problem) -> None:
    answer = choose(problem)
    if isinstance(answer, Infeasible):
        assert any(limit.name == answer.name and answer.least > limit.bound for limit in problem.limits)
        return
    assert problem.keeps(answer.picks)
    assert answer.bound <= answer.loss
    assert answer.optimal
    assert choose(problem) == answer
    # monotone: with more of a limit the loss is no larger, beyond the rounding of sums
    first, *rest = problem.limits
    wider = choose(
        Problem(problem.losses, [LinearConstraint(first.name, round(first.bound * 1.1), first.terms), *rest])
    )
    assert isinstance(wider, Choice)
    assert wider.loss <= answer.loss * (1 + 1e-12)
    # the order of the items does not matter for the loss, beyond the rounding of sums
    back = [len(problem.losses) - 1 - i for i in range(len(problem.losses))]
    limits = [
        LinearConstraint(limit.name, limit.bound, Terms({back[i]: row for i, row in limit.terms.single.items()}, {}))
        for limit in problem.limits
    ]
    turned = choose(Problem([problem.losses[i] for i in back], limits))
    assert isinstance(turned, Choice)
    assert turned.loss == pytest.approx(answer.loss, rel=1e-12)
    # from the answer itself, and from nonsense
    for start in (answer.picks, [0] * len(problem.losses)):
        again = choose(problem, start=start)
        assert isinstance(again, Choice)
        assert again.loss == pytest.approx(answer.loss, rel=1e-12)


def test_out_of_time_without_any_choice_is_an_error() -> None:
    with pytest.raises(TimeoutError, match=r"not solved in time|no choice was found in time"):
        choose(large(3000, 3, seed=0), seconds=0.0)
