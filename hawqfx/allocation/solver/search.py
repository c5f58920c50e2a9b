"""Choose one option per item, at the least total loss, under linear limits.

    minimise  sum_i loss_i[x_i] + sum_(i,j) loss_ij[x_i][x_j]   subject to, for each limit,
    sum_i cost_i[x_i] + sum_(i,j) cost_ij[x_i][x_j]  <=  bound,   and nogoods: choices that may not all be taken.

A multiple-choice knapsack with any number of limits and pairs.  The linear relaxation gives a bound L, and for every
option a score: no choice that takes the option loses less than L plus that.  Few options have a small one; those are
the core, of which the best choice loses U.  If every option left out has a score of U - L or more, that choice is the
best of all (Balas and Zemel 1980, "An algorithm for large zero-one knapsack problems"); else the core grows.

L is computed from the multipliers in plain arithmetic and holds whatever the tolerances of the solver that found them.
Cores of many items are solved by HiGHS as far as a gap of 1e-4, small ones and the last by CP-SAT, which counts in
integers; both come with OR-tools.  benchmarks/allocation.py has the times, and those of either solver alone.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from math import inf, isfinite
from typing import Any, NamedTuple

Table = Sequence[Sequence[float]]
Pair = tuple[int, int]
Nogood = Mapping[int, frozenset[int]]  # not all of these items may pick an option of their set

CORE, GROWTH = 300, 3  # options beyond one for each item that the first core has, and the factor by which it grows
SMALL = 120  # items with a choice that CP-SAT takes on at once
LOOSE = 0.1  # of the gap that is left, to which a core is solved that is not the last
NEAR = 1e-4  # the gap to which larger cores are solved, and at which one may stop when the effort is spent
EFFORT = 20.0  # deterministic time of CP-SAT for a core, about seconds
# what all columns can lose together, as an integer: leaves CP-SAT room to add and to multiply
RESOLUTION = 2**46


@dataclass(frozen=True)
class Terms:
    """A sum over what is picked: by item and option, and by pair of items and of options."""

    single: Mapping[int, Sequence[float]]
    pairs: Mapping[Pair, Table]

    def total(self, picks: Sequence[int]) -> float:
        single = sum(costs[picks[i]] for i, costs in self.single.items())
        return single + sum(table[picks[i]][picks[j]] for (i, j), table in self.pairs.items())


@dataclass(frozen=True)
class LinearConstraint:
    """Terms in integers, whose sum must not exceed the bound.  Names tell limits apart."""

    name: str
    bound: int
    terms: Terms


@dataclass(frozen=True)
class Problem:
    """`losses`: by item and option.  `interactions`: losses by pair of items and of options, of either sign."""

    losses: Sequence[Sequence[float]]
    limits: Sequence[LinearConstraint] = ()
    nogoods: Sequence[Nogood] = ()
    interactions: Mapping[Pair, Table] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for i, options in enumerate(self.losses):
            if not all(map(isfinite, options)):
                raise ValueError(f"the losses of item {i} are not finite: {list(options)}")
        for pair, table in self.interactions.items():
            if not all(map(isfinite, (value for row in table for value in row))):
                raise ValueError(f"the losses of the pair {pair} are not finite")

    @cached_property
    def objective(self) -> Terms:
        return Terms(dict(enumerate(self.losses)), self.interactions)

    def keeps(self, picks: Sequence[int]) -> bool:
        """Whether a choice keeps every limit and nogood."""
        return all(limit.terms.total(picks) <= limit.bound for limit in self.limits) and not any(
            all(picks[i] in options for i, options in nogood.items()) for nogood in self.nogoods
        )


@dataclass(frozen=True)
class Choice:
    """The option picked for every item, their total loss, and a proven lower bound on that of any choice.

    optimal: no choice has a loss smaller by more than the gap that was allowed.  prices: by limit, how much less the
    least loss would be per further unit of the bound, in the linear relaxation.
    """

    picks: tuple[int, ...]
    loss: float
    bound: float
    optimal: bool
    prices: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Infeasible:
    """A limit that cannot be kept, and the least that its sum could be: `alone`, or beside the limits before it."""

    name: str
    least: int
    alone: bool


def choose(
    problem: Problem, *, start: Sequence[int] | None = None, gap: float = 0.0, seconds: float = 60.0
) -> Choice | Infeasible:
    """The best choice, or the limit that stands in its way.

    start: a choice to begin from, near the best if possible; it need not keep the limits.  gap: a choice whose loss is
    proven to be within this fraction of the least is good enough.  Losses count to 2^-46 of the sum of what the
    options of a core can lose, which is far below the noise of any prediction.

    Deterministic: fixed seeds, and an effort that is counted and not clocked, unless it takes longer than `seconds`.
    Stopped by either, it returns the best choice so far with its bound.  Raises ValueError if losses are not finite or
    nogoods exclude every choice, TimeoutError if no choice was found and none excluded in that time.
    """
    if not problem.losses:
        return Choice((), 0.0, 0.0, True)
    deadline = time.monotonic() + seconds
    relaxation = _relax(problem, deadline)
    if relaxation is None:
        return _what_stands_in_the_way(problem, deadline)
    return _Search(problem, relaxation, gap, deadline).run(start)


class _Relaxation(NamedTuple):
    """bound: of the loss of any choice.  scores: by item and option, at least how much more than that a choice with
    this option loses.  likely: the option of each item that the relaxation has most of."""

    bound: float
    scores: list[list[float]]
    likely: list[int]
    prices: Mapping[str, float]


class _Core(NamedTuple):
    """The best choice found in a core, and a bound on the loss of every choice in it.  settled: the two are as near as
    was asked, or the core has no choice."""

    picks: tuple[int, ...] | None
    loss: float
    bound: float
    settled: bool


class _Search:
    """Cores that grow until no option left out can be in a better choice."""

    def __init__(self, problem: Problem, relaxation: _Relaxation, gap: float, deadline: float) -> None:
        self.problem, self.relaxation, self.gap, self.deadline = problem, relaxation, gap, deadline
        self.picks: tuple[int, ...] | None = None
        self.loss, self.proven = inf, relaxation.bound

    def run(self, start: Sequence[int] | None) -> Choice | Infeasible:
        if start is not None and self.problem.keeps(start):
            self.picks, self.loss = tuple(start), self.problem.objective.total(start)
        every = sorted(score for scores in self.relaxation.scores for score in scores)
        extra = CORE
        while True:
            wanted = len(self.problem.losses) + extra
            reach = every[wanted - 1] if wanted < len(every) else inf
            reach = min(reach, self.loss - self.relaxation.bound)  # beyond, no option can be in a better choice
            answer = self._core(reach)
            if answer is not None:
                return answer
            extra *= GROWTH if self.loss == inf else GROWTH**2  # a choice bounds the last core, which is not far

    def _core(self, reach: float) -> Choice | Infeasible | None:
        """Solves the core within reach; None: a larger one is needed."""
        program = _Program(self.problem, self._kept(reach))
        # a better choice is in the core, or takes an option left out
        outside = self.relaxation.bound + reach
        last = outside >= self.loss or reach == inf
        near = max(self.gap, NEAR)
        if len(program.free) > SMALL:
            allowed = near / 2 * self._size()
            if (
                not last and self.loss < inf
            ):  # a better choice is all that is wanted; the proof comes with the last core
                allowed = max(allowed, LOOSE * (self.loss - self.proven))
            self._learn(_by_highs(program, self._hint(), allowed, self.deadline), outside)
            done = self._done(self.gap)
            if done or not last:
                return done
        found = _by_cp_sat(program, self._hint(), self.gap * self._size(), self.deadline)
        self._learn(found, outside)
        done = self._done(self.gap)
        if done:
            return done
        if reach == inf and found.bound == inf:
            return _what_stands_in_the_way(self.problem, self.deadline)
        if not last and (found.settled or self.picks is None) and time.monotonic() < self.deadline:
            return None
        if self.picks is None:
            raise TimeoutError("no choice was found in time, and none was excluded: allow more time")
        return Choice(self.picks, self.loss, self.proven, False, self.relaxation.prices)

    def _kept(self, reach: float) -> list[list[int]]:
        also = self._hint()
        return [
            [k for k, score in enumerate(scores) if score <= reach or k == also[i]]
            for i, scores in enumerate(self.relaxation.scores)
        ]

    def _hint(self) -> Sequence[int]:
        return self.relaxation.likely if self.picks is None else self.picks

    def _size(self) -> float:
        return abs(self.relaxation.bound if self.picks is None else self.loss)

    def _learn(self, found: _Core, outside: float) -> None:
        if found.picks is not None and found.loss < self.loss:
            self.picks, self.loss = found.picks, found.loss
        self.proven = min(self.loss, max(self.proven, min(found.bound, outside)))

    def _done(self, gap: float) -> Choice | None:
        if self.picks is None or self.loss - self.proven > gap * abs(self.loss):
            return None
        return Choice(self.picks, self.loss, self.proven, True, self.relaxation.prices)


class _Row(NamedTuple):
    columns: list[int]
    amounts: list[float]
    low: float
    high: float


class _Program:
    """The problem with some of its options as rows and columns.

    A column for every option of an item that has a choice, and for every pair of options of two such items that some
    terms tie, linked to the options by sums.  What smallest amounts come to is in the constants.
    """

    def __init__(self, problem: Problem, kept: Sequence[Sequence[int]]) -> None:
        self.problem, self.kept = problem, kept
        self.free = [i for i, options in enumerate(kept) if len(options) > 1]
        self.columns: dict[tuple[int, int], int] = {}
        for i in self.free:
            for k in kept[i]:
                self.columns[i, k] = len(self.columns)
        self.count = len(self.columns)
        self.rows: list[_Row] = []
        self.one = {i: self._row((self.columns[i, k], 1.0) for k in kept[i]) for i in self.free}
        self.joint: dict[Pair, dict[tuple[int, int], int]] = {}
        self.links: dict[Pair, tuple[dict[int, int], dict[int, int]]] = {}
        self.limits = [self._limit(limit) for limit in problem.limits]
        self.nogoods = [self._nogood(nogood) for nogood in problem.nogoods]
        self.constant, terms = self._sum(problem.objective)
        self.losses = [0.0] * self.count
        for column, loss in terms:
            self.losses[column] += loss

    def _row(self, terms: Iterable[tuple[int, float]], low: float = 1.0, high: float = 1.0) -> int:
        columns, amounts = zip(*terms, strict=True)
        self.rows.append(_Row(list(columns), list(amounts), low, high))
        return len(self.rows) - 1

    def _limit(self, limit: LinearConstraint) -> int | None:
        """The number of the row; None if every choice keeps it."""
        constant, terms = self._sum(limit.terms)
        slack = limit.bound - constant
        if sum(amount for _, amount in terms) <= slack:
            return None
        if not terms:
            terms = [(0, 0.0)]  # kept by no choice, as the solver will say
        return self._row(terms, -inf, slack)

    def _nogood(self, nogood: Nogood) -> int | None:
        """One of the items must pick an option outside of its set."""
        inside = {i: [k for k in self.kept[i] if k in options] for i, options in nogood.items()}
        if any(not options for options in inside.values()):
            return None
        free = [(self.columns[i, k], 1.0) for i, options in inside.items() if i in self.one for k in options]
        return self._row(free or [(0, 0.0)], -inf, sum(i in self.one for i in nogood) - 1)

    def _sum(self, terms: Terms) -> tuple[float, list[tuple[int, float]]]:
        """A constant, and columns with amounts of zero or more."""
        constant: float = 0
        found: list[tuple[int, float]] = []
        for i, costs in terms.single.items():
            least = min(costs[k] for k in self.kept[i])
            constant += least
            if i in self.one:
                found += ((self.columns[i, k], costs[k] - least) for k in self.kept[i] if costs[k] != least)
        for (i, j), table in terms.pairs.items():
            least = min(table[k][m] for k in self.kept[i] for m in self.kept[j])
            constant += least
            if i in self.one and j in self.one:
                found += ((c, table[k][m] - least) for (k, m), c in self._pair((i, j)).items() if table[k][m] != least)
            elif i in self.one:
                (m,) = self.kept[j]
                found += ((self.columns[i, k], table[k][m] - least) for k in self.kept[i])
            elif j in self.one:
                (k,) = self.kept[i]
                found += ((self.columns[j, m], table[k][m] - least) for m in self.kept[j])
        return constant, found

    def _pair(self, pair: Pair) -> dict[tuple[int, int], int]:
        if pair not in self.joint:
            i, j = pair
            both = {
                (k, m): self.count + n for n, (k, m) in enumerate((k, m) for k in self.kept[i] for m in self.kept[j])
            }
            self.count += len(both)
            by_row = {
                k: self._row([*((both[k, m], 1.0) for m in self.kept[j]), (self.columns[i, k], -1.0)], 0, 0)
                for k in self.kept[i]
            }
            by_column = {
                m: self._row([*((both[k, m], 1.0) for k in self.kept[i]), (self.columns[j, m], -1.0)], 0, 0)
                for m in self.kept[j]
            }
            self.joint[pair], self.links[pair] = both, (by_row, by_column)
        return self.joint[pair]

    def values(self, picks: Sequence[int]) -> dict[int, bool]:
        """What every column is at a choice."""
        known = {column: picks[i] == k for (i, k), column in self.columns.items()}
        for (i, j), both in self.joint.items():
            known |= {column: (picks[i], picks[j]) == km for km, column in both.items()}
        return known

    def picks(self, value: Sequence[float]) -> tuple[int, ...]:
        """The choice whose columns are largest."""
        return tuple(
            max(options, key=lambda k, i=i: value[self.columns[i, k]]) if i in self.one else options[0]  # type: ignore[misc]
            for i, options in enumerate(self.kept)
        )


class _Highs:
    """A program in HiGHS, by MathOpt.  Rows and losses are scaled to a size that suits its tolerances."""

    def __init__(self, program: _Program, *, integer: bool) -> None:
        from ortools.math_opt.python import mathopt

        self.mathopt, self.program = mathopt, program
        self.model = mathopt.Model()
        self.variables = [self.model.add_variable(lb=0.0, ub=1.0, is_integer=integer) for _ in range(program.count)]
        self.sizes = [max(1.0, abs(row.high)) for row in program.rows]
        self.rows = []
        for row, size in zip(program.rows, self.sizes, strict=True):
            made = self.model.add_linear_constraint(lb=row.low / size, ub=row.high / size)
            for column, amount in zip(row.columns, row.amounts, strict=True):
                made.set_coefficient(self.variables[column], amount / size)
            self.rows.append(made)
        self.unit = sum(program.losses) / (len(program.losses) or 1) or 1.0
        objective = self.model.objective
        for variable, loss in zip(self.variables, program.losses, strict=True):
            if loss:
                objective.set_linear_coefficient(variable, loss / self.unit)

    def solve(self, deadline: float, allowed: float = 0.0, hint: Sequence[int] | None = None) -> Any:
        left = timedelta(seconds=max(0.01, deadline - time.monotonic()))
        parameters = self.mathopt.SolveParameters(time_limit=left, absolute_gap_tolerance=allowed / self.unit)
        model_parameters = self.mathopt.ModelSolveParameters()
        if hint is not None:
            values = {self.variables[column]: float(on) for column, on in self.program.values(hint).items()}
            model_parameters.solution_hints.append(self.mathopt.SolutionHint(variable_values=values))
        with _quiet():
            return self.mathopt.solve(
                self.model, self.mathopt.SolverType.HIGHS, params=parameters, model_params=model_parameters
            )

    def values(self, result: Any) -> list[float]:
        found = result.variable_values()
        return [found[variable] for variable in self.variables]


@contextmanager
def _quiet() -> Iterator[None]:
    """HiGHS 1.12 prints a line for every solution that it mends, whatever its options: file descriptor 1 goes nowhere
    meanwhile."""
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _relax(problem: Problem, deadline: float) -> _Relaxation | None:
    """None: not even fractions of options keep the limits."""
    program = _Program(problem, [range(len(options)) for options in problem.losses])
    if not program.count:
        return _bound(problem, program, [0.0] * len(program.rows), [])
    highs = _Highs(program, integer=False)
    result = highs.solve(deadline)
    reason, reasons = result.termination.reason, highs.mathopt.TerminationReason
    if reason in (reasons.INFEASIBLE, reasons.INFEASIBLE_OR_UNBOUNDED):
        return None
    if reason != reasons.OPTIMAL:
        raise TimeoutError(f"the linear relaxation was not solved in time: {reason.name}")
    found = result.dual_values()
    duals = [found[row] * highs.unit / size for row, size in zip(highs.rows, highs.sizes, strict=True)]
    return _bound(problem, program, duals, highs.values(result))


def _bound(problem: Problem, program: _Program, duals: Sequence[float], values: Sequence[float]) -> _Relaxation:
    """What these multipliers prove: with the limits priced, the loss falls into items and pairs, each at its least."""

    def price(row: int | None) -> float:
        return max(0.0, -duals[row]) if row is not None else 0.0

    prices = [price(row) for row in program.limits]
    costs = [list(map(float, options)) for options in problem.losses]
    weighed = [(Terms({}, problem.interactions), 1.0)]
    weighed += [(limit.terms, weight) for limit, weight in zip(problem.limits, prices, strict=True)]
    pairs = {pair for terms, _ in weighed for pair in terms.pairs}
    tables = {(i, j): [[0.0] * len(costs[j]) for _ in costs[i]] for i, j in pairs}
    for terms, weight in weighed:
        if weight:
            for i, row in terms.single.items():
                costs[i] = [cost + weight * amount for cost, amount in zip(costs[i], row, strict=True)]
            for pair, table in terms.pairs.items():
                both = zip(tables[pair], table, strict=True)
                tables[pair] = [[a + weight * b for a, b in zip(*rows, strict=True)] for rows in both]
    bound = 0.0
    bound -= sum(weight * limit.bound for limit, weight in zip(problem.limits, prices, strict=True))
    for nogood, number in zip(problem.nogoods, program.nogoods, strict=True):
        fine = price(number)
        bound -= fine * (len(nogood) - 1)
        for i, options in nogood.items():
            for k in options:
                costs[i][k] += fine
    for (i, j), (by_row, by_column) in program.links.items():
        for k, number in by_row.items():
            costs[i][k] += duals[number]
            tables[i, j][k] = [value - duals[number] for value in tables[i, j][k]]
        for m, number in by_column.items():
            costs[j][m] += duals[number]
            for line in tables[i, j]:
                line[m] -= duals[number]
    # sums of floats: what rounding can take from them is taken off
    largest = [max(map(abs, row)) for rows in (costs, *tables.values()) for row in rows]
    bound -= 1e-13 * (abs(bound) + sum(largest))
    leasts = [min(row) for row in costs]
    scores = [[cost - least for cost in row] for row, least in zip(costs, leasts, strict=True)]
    bound += sum(leasts)
    for (i, j), table in tables.items():
        least = min(map(min, table))
        bound += least
        scores[i] = [score + min(row) - least for score, row in zip(scores[i], table, strict=True)]
        scores[j] = [
            score + min(column) - least for score, column in zip(scores[j], zip(*table, strict=True), strict=True)
        ]
    named = {limit.name: weight for limit, weight in zip(problem.limits, prices, strict=True)}
    return _Relaxation(bound, scores, list(program.picks(values)), named)


def _by_highs(program: _Program, hint: Sequence[int], allowed: float, deadline: float) -> _Core:
    """The best choice to within `allowed`, as far as the tolerances of floats go."""
    highs = _Highs(program, integer=True)
    result = highs.solve(deadline, allowed, hint)
    reason, reasons = result.termination.reason, highs.mathopt.TerminationReason
    if reason in (reasons.INFEASIBLE, reasons.INFEASIBLE_OR_UNBOUNDED):
        return _Core(None, inf, inf, True)
    bound = program.constant + highs.unit * result.termination.objective_bounds.dual_bound
    if not result.has_primal_feasible_solution():
        return _Core(None, inf, bound, False)
    picks = program.picks(highs.values(result))
    if not program.problem.keeps(picks):  # by a hair, within tolerances: CP-SAT will find one that does
        return _Core(None, inf, bound, False)
    return _Core(picks, program.problem.objective.total(picks), bound, reason == reasons.OPTIMAL)


def _by_cp_sat(program: _Program, hint: Sequence[int], allowed: float, deadline: float) -> _Core:
    """The best choice to within `allowed`, in integers."""
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    variables = [model.new_bool_var("") for _ in range(max(1, program.count))]
    for row in program.rows:
        total = cp_model.LinearExpr.weighted_sum([variables[c] for c in row.columns], [int(a) for a in row.amounts])
        model.add(total <= int(row.high) if row.low == -inf else total == int(row.low))
    scale = RESOLUTION / (sum(program.losses) or 1.0)
    model.minimize(
        cp_model.LinearExpr.weighted_sum(variables[: program.count], [round(v * scale) for v in program.losses])
    )
    for column, on in program.values(hint).items():
        model.add_hint(variables[column], on)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.linearization_level = 2
    solver.parameters.max_deterministic_time = EFFORT
    solver.parameters.absolute_gap_limit = max(0.5, allowed * scale)
    solver.parameters.max_time_in_seconds = max(0.01, deadline - time.monotonic())
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return _Core(None, inf, inf, True)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return _Core(None, inf, -inf, False)
    picks = program.picks([solver.value(variable) for variable in variables])
    loss = program.problem.objective.total(picks)
    bound = program.constant + solver.best_objective_bound / scale
    if status == cp_model.OPTIMAL:
        return _Core(picks, loss, max(bound, loss - allowed), True)
    return _Core(picks, loss, bound, False)


def _what_stands_in_the_way(problem: Problem, deadline: float) -> Infeasible:
    """The first limit that cannot be kept alone; else the first that cannot be kept beside those before it."""
    for limit in problem.limits:
        least = _least(problem, limit, (), deadline)
        if least > limit.bound:
            return Infeasible(limit.name, least, alone=True)
    for number, limit in enumerate(problem.limits):
        least = _least(problem, limit, problem.limits[:number], deadline)
        if least > limit.bound:
            return Infeasible(limit.name, least, alone=False)
    raise ValueError("the nogoods exclude every choice")


def _least(problem: Problem, limit: LinearConstraint, others: Sequence[LinearConstraint], deadline: float) -> int:
    """The least sum of `limit` with the `others` kept, which is known to be possible."""
    losses = [limit.terms.single.get(i, [0] * len(options)) for i, options in enumerate(problem.losses)]
    alone = Problem(losses, others, problem.nogoods, limit.terms.pairs)
    found = choose(alone, seconds=max(0.01, deadline - time.monotonic()))
    if isinstance(found, Infeasible):
        raise ValueError("the nogoods exclude every choice")
    if not found.optimal:
        raise TimeoutError(f"whether {limit.name} can be kept was not settled in time: allow more of it")
    return int(limit.terms.total(found.picks))
