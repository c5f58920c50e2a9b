"""Choose one option per item, at the least total loss, under linear limits: a multiple-choice knapsack.

    minimise  sum_i loss_i[x_i]   subject to, for each limit,
    sum_i cost_i[x_i] + sum_(i,j) cost_ij[x_i][x_j]  <=  bound

Solved to proven optimality by OR-tools' CP-SAT.  Pair costs are linearised by one variable per joint choice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

Table = Sequence[Sequence[int]]

RESOLUTION = 2**40  # losses become integers; the largest one becomes this, so a sum over 2^20 items stays below 2^62


@dataclass(frozen=True)
class LinearLimit:
    """Integer costs by item and option, and by pair of items and options, and the bound on their sum."""

    name: str
    bound: int
    single: Mapping[int, Sequence[int]] = field(default_factory=dict)
    pairs: Mapping[tuple[int, int], Table] = field(default_factory=dict)

    def total(self, picks: Sequence[int]) -> int:
        single = sum(costs[picks[i]] for i, costs in self.single.items())
        return single + sum(table[picks[i]][picks[j]] for (i, j), table in self.pairs.items())


@dataclass(frozen=True)
class Choice:
    """The option picked for every item, their total loss, and a proven lower bound on that of any choice."""

    picks: tuple[int, ...]
    loss: float
    bound: float
    optimal: bool


@dataclass(frozen=True)
class Infeasible:
    """A limit that cannot be kept, and the least that its sum could be: `alone`, or beside the limits before it."""

    name: str
    least: int
    alone: bool


def choose(
    losses: Sequence[Sequence[float]], limits: Sequence[LinearLimit], seconds: float = 60.0
) -> Choice | Infeasible:
    """The best choice, or the limit that stands in its way.

    Deterministic: one worker and a fixed seed.  Stopped after `seconds`, it returns the best choice so far with its
    bound.  Losses must be finite.  Raises TimeoutError if it neither found a choice nor excluded one in that time.
    """
    largest = max((abs(loss) for options in losses for loss in options), default=0.0) or 1.0
    scaled = [[round(loss / largest * RESOLUTION) for loss in options] for options in losses]
    model = _Model(losses)
    for limit in limits:
        model.keep(limit)
    model.minimise(LinearLimit("loss", 0, dict(enumerate(scaled))))
    answer = model.solve(seconds)
    if answer is None:
        return _what_stands_in_the_way(losses, limits, seconds)
    picks, bound, optimal = answer
    loss = sum(options[pick] for options, pick in zip(losses, picks, strict=True))
    return Choice(picks, loss, loss if optimal else bound / RESOLUTION * largest, optimal)


def _what_stands_in_the_way(
    losses: Sequence[Sequence[float]], limits: Sequence[LinearLimit], seconds: float
) -> Infeasible:
    """The first limit that cannot be kept alone; else the first that cannot be kept beside those before it."""
    for limit in limits:
        least = _least(losses, limit, [], seconds)
        if least > limit.bound:
            return Infeasible(limit.name, least, alone=True)
    for number, limit in enumerate(limits):
        least = _least(losses, limit, limits[:number], seconds)
        if least > limit.bound:
            return Infeasible(limit.name, least, alone=False)
    raise TimeoutError(f"no choice was found in {seconds:.0f} s, though there is one: allow more time")


def _least(losses: Sequence[Sequence[float]], limit: LinearLimit, others: Sequence[LinearLimit], seconds: float) -> int:
    """The least sum of `limit` with the `others` kept, which is known to be possible."""
    model = _Model(losses)
    for other in others:
        model.keep(other)
    model.minimise(limit)
    answer = model.solve(seconds)
    if answer is None or not answer[2]:
        raise TimeoutError(f"whether {limit.name} can be kept was not settled in {seconds:.0f} s: allow more time")
    return limit.total(answer[0])


class _Model:
    def __init__(self, losses: Sequence[Sequence[float]]) -> None:
        from ortools.sat.python import cp_model

        self.cp = cp_model
        self.model = cp_model.CpModel()
        self.options = [[self.model.new_bool_var(f"x{i}_{k}") for k in range(len(o))] for i, o in enumerate(losses)]
        self.joint: dict[tuple[int, int], list[list[cp_model.IntVar]]] = {}
        for variables in self.options:
            self.model.add_exactly_one(variables)

    def keep(self, limit: LinearLimit) -> None:
        self.model.add(self._sum(limit) <= limit.bound)

    def minimise(self, limit: LinearLimit) -> None:
        self.model.minimize(self._sum(limit))

    def solve(self, seconds: float) -> tuple[tuple[int, ...], float, bool] | None:
        solver = self.cp.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = 0
        solver.parameters.max_time_in_seconds = seconds
        status = solver.solve(self.model)
        if status not in (self.cp.OPTIMAL, self.cp.FEASIBLE):
            return None
        picks = tuple([solver.value(v) for v in variables].index(1) for variables in self.options)
        return picks, solver.best_objective_bound, status == self.cp.OPTIMAL

    def _sum(self, limit: LinearLimit) -> "cp_model.LinearExprT":
        terms: list[cp_model.IntVar] = []
        costs: list[int] = []
        for i, row in limit.single.items():
            terms += self.options[i]
            costs += row
        for (i, j), table in limit.pairs.items():
            for variables, row in zip(self._pair(i, j), table, strict=True):
                terms += variables
                costs += row
        return self.cp.LinearExpr.weighted_sum(terms, costs)

    def _pair(self, i: int, j: int) -> "list[list[cp_model.IntVar]]":
        """Variables that say which pair of options was picked, tied so that their sums are the options' variables."""
        if (i, j) not in self.joint:
            rows, columns = self.options[i], self.options[j]
            table = [
                [self.model.new_bool_var(f"y{i}_{k}_{j}_{m}") for m in range(len(columns))] for k in range(len(rows))
            ]
            for k, variable in enumerate(rows):
                self.model.add(self.cp.LinearExpr.sum(table[k]) == variable)
            for m, variable in enumerate(columns):
                self.model.add(self.cp.LinearExpr.sum([row[m] for row in table]) == variable)
            self.joint[i, j] = table
        return self.joint[i, j]
