"""Problems for the tests of the solver."""

import random
from itertools import product

import numpy as np
from numpy.typing import NDArray

from hawqfx.allocation.solver.problem import LinearConstraint, Problem, Terms

Picks = NDArray[np.int64]
KINDS = ["single", "pairs", "both", "two limits"]


def limit_and_sums(
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
    totals = totals_of(single, pairs, every)
    bound = int(np.quantile(totals, rng.choice([0.0, 0.01, 0.1, 0.5])))
    return LinearConstraint(name, bound, Terms(single, pairs)), every, totals


def totals_of(single: dict[int, list[int]], pairs: dict[tuple[int, int], list[list[int]]], every: Picks) -> Picks:
    """The sum of terms for each of some choices."""
    totals = np.zeros(len(every), np.int64)
    for i, costs in single.items():
        totals += np.array(costs)[every[:, i]]
    for (i, j), table in pairs.items():
        totals += np.array(table)[every[:, i], every[:, j]]
    return totals


def instance(kind: str, seed: int) -> tuple[list[list[float]], list[LinearConstraint], Picks, list[Picks]]:
    """Losses of 1 to 8 items, limits of a kind, every choice, and the sum of each limit for each choice."""
    rng = random.Random(f"{kind} {seed}")
    losses = [[rng.random() * 10 ** rng.randint(-4, 2) for _ in range(rng.randint(2, 4))] for _ in range(1 + seed % 8)]
    kinds = ["single", "pairs"] if kind == "two limits" else [kind]
    made = [limit_and_sums(f"limit {n}", losses, rng, k) for n, k in enumerate(kinds)]
    return losses, [m[0] for m in made], made[0][1], [m[2] for m in made]


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
