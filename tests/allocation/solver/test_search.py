"""The solver against the enumeration of every choice, and what must hold of instances too large for that."""

import math
import random
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hawqfx.allocation.solver import search
from hawqfx.allocation.solver.search import Choice, Infeasible, LinearConstraint, Nogood, Problem, Terms, choose

Picks = NDArray[np.int64]
KINDS = ["single", "pairs", "both", "two limits"]


def _limit(
    name: str, losses: list[list[float]], rng: random.Random, kind: str
) -> tuple[LinearConstraint, Picks, Picks]:
    """A limit with its bound within reach, every choice, and the limit's sum for each."""
    sizes = [len(options) for options in losses]
    single, pairs = {}, {}
    if kind != "pairs":
        single = {i: [rng.randint(-5, 60) for _ in range(n)] for i, n in enumerate(sizes) if rng.random() < 0.9}
    if kind != "single":
        couples = [(i, j) for i in range(len(sizes)) for j in range(len(sizes)) if i != j and rng.random() < 0.3]
        pairs = {(i, j): [[rng.randint(0, 40) for _ in range(sizes[j])] for _ in range(sizes[i])] for i, j in couples}
    every = np.array(list(product(*map(range, sizes))), np.int64)
    totals = _totals(single, pairs, every)
    bound = int(np.quantile(totals, rng.choice([0.0, 0.01, 0.1, 0.5])))
    return LinearConstraint(name, bound, Terms(single, pairs)), every, totals


def _totals(single: dict[int, list[int]], pairs: dict[tuple[int, int], list[list[int]]], every: Picks) -> Picks:
    totals = np.zeros(len(every), np.int64)
    for i, costs in single.items():
        totals += np.array(costs)[every[:, i]]
    for (i, j), table in pairs.items():
        totals += np.array(table)[every[:, i], every[:, j]]
    return totals


def _instance(kind: str, seed: int) -> tuple[list[list[float]], list[LinearConstraint], Picks, list[Picks]]:
    rng = random.Random(f"{kind} {seed}")
    losses = [[rng.random() * 10 ** rng.randint(-4, 2) for _ in range(rng.randint(2, 4))] for _ in range(1 + seed % 8)]
    kinds = ["single", "pairs"] if kind == "two limits" else [kind]
    made = [_limit(f"limit {n}", losses, rng, k) for n, k in enumerate(kinds)]
    return losses, [m[0] for m in made], made[0][1], [m[2] for m in made]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", KINDS)
def test_choice_is_the_best_of_all(kind: str, seed: int) -> None:
    losses, limits, every, totals = _instance(kind, seed)
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
    losses, limits, _, totals = _instance(kind, seed)
    least = int(totals[-1].min())
    last = limits[-1]
    limits[-1] = LinearConstraint(last.name, least - 1, Terms(last.terms.single, last.terms.pairs))
    assert choose(Problem(losses, limits)) == Infeasible(last.name, least, alone=True)


@pytest.mark.parametrize("seed", range(8))
def test_limits_that_conflict_are_named_with_the_least_beside_the_others(seed: int) -> None:
    """What is cheap for one limit is dear for the other; a third limit does not matter."""
    rng = random.Random(seed)
    costs = [[rng.randint(0, 20) for _ in range(3)] for _ in range(4)]
    one, other = dict(enumerate(costs)), {i: [20 - c for c in row] for i, row in enumerate(costs)}
    every = np.array(list(product(range(3), repeat=4)), np.int64)
    totals = [_totals(one, {}, every), _totals(other, {}, every), _totals({}, {}, every)]  # the first two make 80
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
    losses, limits, _, _ = _instance(kind, 7)
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


def test_no_limits_and_no_items() -> None:
    assert choose(Problem([[3.0, 1.0, 2.0], [5.0]])) == Choice((1, 0), 6.0, 6.0, True)
    assert choose(Problem([])) == Choice((), 0, 0, True)
    assert choose(Problem([[1.0]], [LinearConstraint("nothing costs", -1, Terms({}, {}))])) == Infeasible(
        "nothing costs", 0, alone=True
    )


@pytest.mark.parametrize("kind", ["single", "pairs", "both"])
def test_total_is_the_direct_sum(kind: str) -> None:
    _, (limit,), every, (totals,) = _instance(kind, 5)
    assert [limit.terms.total(picks) for picks in every.tolist()] == totals.tolist()
    assert Terms({1: [5, 7]}, {(0, 1): [[1, 2], [3, 4]]}).total([1, 0]) == 8


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


@pytest.mark.parametrize("seed", range(60))
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


def large(items: int, limits: int, seed: int, tight: float = 0.3) -> Problem:
    """Layers of 2 to 8 bits: losses fall by 4 a bit, costs grow with the bits, and with every layer's own factor."""
    draw = np.random.default_rng(seed)
    bits = np.arange(2, 9)
    numel = np.exp(draw.normal(9, 1.5, items))[:, None]
    losses = np.exp(draw.normal(0, 2, items))[:, None] * 4.0**-bits * numel
    rows = []
    for number in range(limits):
        factor = np.exp(draw.normal(0, 1, items))[:, None] * np.exp(draw.normal(0, 0.1, (items, len(bits))))
        cost = np.rint(numel * bits * factor).astype(np.int64)
        low, high = cost.min(1).sum(), cost.max(1).sum()
        rows.append(
            LinearConstraint(
                f"limit {number}", int(low + tight * (high - low)), Terms(dict(enumerate(cost.tolist())), {})
            )
        )
    return Problem(losses.tolist(), rows)


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


@pytest.mark.parametrize("limits", [1, 3])
def test_a_thousand_items_to_a_proven_gap(limits: int) -> None:
    problem = large(1000, limits, seed=1)
    answer = choose(problem, gap=1e-4)
    assert isinstance(answer, Choice)
    assert answer.optimal
    assert problem.keeps(answer.picks)
    assert answer.loss - answer.bound <= 1e-4 * answer.loss
    # the bound is one: the linear relaxation's prices prove it, item by item
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


def test_stopped_early_it_gives_its_best_with_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """With next to no effort: a choice within the limits, a bound below the optimum, and the word that it is not known
    to be the best."""
    problem = large(60, 3, seed=5)
    best = choose(problem)
    monkeypatch.setattr(search, "EFFORT", 0.02)
    early = choose(problem)
    assert isinstance(best, Choice)
    assert isinstance(early, Choice)
    assert problem.keeps(early.picks)
    assert not early.optimal
    assert early.bound <= best.loss <= early.loss
    assert early == choose(problem)  # counted, not clocked


def test_out_of_time_without_any_choice_is_an_error() -> None:
    with pytest.raises(TimeoutError, match=r"not solved in time|no choice was found in time"):
        choose(large(3000, 3, seed=0), seconds=0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_name_the_item(value: float) -> None:
    with pytest.raises(ValueError, match="losses of item 1 are not finite"):
        Problem([[0.0, 1.0], [2.0, value]])
    with pytest.raises(ValueError, match=r"losses of the pair \(0, 1\) are not finite"):
        Problem([[0.0], [2.0]], interactions={(0, 1): [[value]]})


def test_losses_over_twelve_decades_keep_their_order() -> None:
    losses = [[1e3, 0.0], [2e-9, 1e-9], [3e-9, 0.0]]
    answer = choose(Problem(losses, [LinearConstraint("two", 2, Terms({i: [0, 1] for i in range(3)}, {}))]))
    assert isinstance(answer, Choice)
    assert answer.picks == (1, 0, 1)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    choose(large(300, 3, seed=2), gap=1e-4)
    assert capfd.readouterr().out == ""
