"""The solver against the enumeration of every choice."""

import random
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from hawqfx.maths.knapsack import Choice, Infeasible, LinearLimit, choose

Picks = NDArray[np.int64]
KINDS = ["single", "pairs", "both", "two limits"]


def _limit(name: str, losses: list[list[float]], rng: random.Random, kind: str) -> tuple[LinearLimit, Picks, Picks]:
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
    return LinearLimit(name, bound, single, pairs), every, totals


def _totals(single: dict[int, list[int]], pairs: dict[tuple[int, int], list[list[int]]], every: Picks) -> Picks:
    totals = np.zeros(len(every), np.int64)
    for i, costs in single.items():
        totals += np.array(costs)[every[:, i]]
    for (i, j), table in pairs.items():
        totals += np.array(table)[every[:, i], every[:, j]]
    return totals


def _instance(kind: str, seed: int) -> tuple[list[list[float]], list[LinearLimit], Picks, list[Picks]]:
    rng = random.Random(f"{kind} {seed}")
    losses = [[rng.random() * 10 ** rng.randint(-4, 2) for _ in range(rng.randint(2, 4))] for _ in range(1 + seed % 8)]
    kinds = ["single", "pairs"] if kind == "two limits" else [kind]
    made = [_limit(f"limit {n}", losses, rng, k) for n, k in enumerate(kinds)]
    return losses, [m[0] for m in made], made[0][1], [m[2] for m in made]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", KINDS)
def test_choice_is_the_best_of_all(kind: str, seed: int) -> None:
    losses, limits, every, totals = _instance(kind, seed)
    answer = choose(losses, limits)
    kept = np.all([t <= limit.bound for t, limit in zip(totals, limits, strict=True)], axis=0)
    if not kept.any():  # each bound is within reach alone, so it is both together: 9 of the 80
        assert isinstance(answer, Infeasible)
        _check_jointly_infeasible(answer, limits, totals)
        return
    assert isinstance(answer, Choice)
    assert all(limit.total(answer.picks) <= limit.bound for limit in limits)
    assert answer.loss == pytest.approx(sum(losses[i][k] for i, k in enumerate(answer.picks)), rel=1e-12)  # summation
    table = [np.array(options)[every[:, i]] for i, options in enumerate(losses)]
    least = np.sum(table, axis=0)[kept].min()
    # a loss is rounded by half a unit, in the choice and in the best one: one unit per item, 2^-40 of the largest loss
    unit = max(map(max, losses)) * 2.0**-40
    assert least * (1 - 1e-12) <= answer.loss <= least + unit * len(losses)
    assert answer.optimal
    assert answer.bound <= answer.loss


def _check_jointly_infeasible(answer: Infeasible, limits: list[LinearLimit], totals: list[Picks]) -> None:
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
    limits[-1] = LinearLimit(last.name, least - 1, last.single, last.pairs)
    assert choose(losses, limits) == Infeasible(last.name, least, alone=True)


@pytest.mark.parametrize("seed", range(8))
def test_limits_that_conflict_are_named_with_the_least_beside_the_others(seed: int) -> None:
    """What is cheap for one limit is dear for the other; a third limit does not matter."""
    rng = random.Random(seed)
    costs = [[rng.randint(0, 20) for _ in range(3)] for _ in range(4)]
    one, other = dict(enumerate(costs)), {i: [20 - c for c in row] for i, row in enumerate(costs)}
    every = np.array(list(product(range(3), repeat=4)), np.int64)
    totals = [_totals(one, {}, every), _totals(other, {}, every), _totals({}, {}, every)]  # the first two make 80
    bound = int(np.median(totals[0]))
    limits = [LinearLimit("one", bound, one), LinearLimit("other", 79 - bound, other), LinearLimit("none", 0)]
    answer = choose([[1.0] * 3] * 4, limits)
    assert isinstance(answer, Infeasible)
    assert answer.name != "none"
    _check_jointly_infeasible(answer, limits, totals)


def test_three_limits_of_which_no_two_agree_are_infeasible_not_out_of_time() -> None:
    """Limit k allows only option k, so none of them can be kept beside the other two."""
    limits = [LinearLimit(f"only {k}", 0, {0: [int(option != k) for option in range(3)]}) for k in range(3)]
    answer = choose([[1.0, 2.0, 3.0]], limits)
    assert isinstance(answer, Infeasible)
    assert not answer.alone
    assert answer.least == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_inputs_give_the_same_picks_among_equals(kind: str) -> None:
    losses, limits, _, _ = _instance(kind, 7)
    equal = [[1.0] * len(options) for options in losses]
    limits = [LinearLimit(limit.name, 10**6, limit.single, limit.pairs) for limit in limits]
    first, again = choose(equal, limits), choose(equal, limits)
    assert isinstance(first, Choice)
    assert first == again
    assert first.loss == len(losses)


def test_zero_and_negative_losses() -> None:
    limit = LinearLimit("size", 3, {0: [2, 1], 1: [2, 1]})
    free = choose([[0.0, 0.0], [0.0, 0.0]], [limit])
    assert isinstance(free, Choice)
    assert (free.loss, free.bound, free.optimal) == (0.0, 0.0, True)
    assert limit.total(free.picks) <= 3
    assert choose([[-4.0, 1.0], [-2.0, 1.0]], [limit]) == Choice((0, 1), -3.0, -3.0, True)


def test_no_limits_and_no_items() -> None:
    assert choose([[3.0, 1.0, 2.0], [5.0]], []) == Choice((1, 0), 6.0, 6.0, True)
    assert choose([], []) == Choice((), 0, 0, True)
    assert choose([[1.0]], [LinearLimit("nothing costs", -1)]) == Infeasible("nothing costs", 0, alone=True)


@pytest.mark.parametrize("kind", ["single", "pairs", "both"])
def test_total_is_the_direct_sum(kind: str) -> None:
    _, (limit,), every, (totals,) = _instance(kind, 5)
    assert [limit.total(picks) for picks in every.tolist()] == totals.tolist()
    assert LinearLimit("by hand", 0, {1: [5, 7]}, {(0, 1): [[1, 2], [3, 4]]}).total([1, 0]) == 8
