"""The linear relaxation: a proven bound on the loss of every choice, and a score for every option.

The relaxation lets an item take fractions of options.  Its solver gives a multiplier for every row, and any multipliers
prove a bound: a price p_l >= 0 for limit l, a fine f_n >= 0 for nogood n, and a shift of either sign for each row that
ties a pair to its items.  They move every rule into the loss, which then falls into items and pairs, each at its least:

    c_i[k]     =  loss_i[k] + sum_l p_l cost_li[k] + sum_(n: k in set_ni) f_n + shifts
    t_ij[k][m] =  loss_ij[k][m] + sum_l p_l cost_lij[k][m] - shifts
    bound      =  sum_i min c_i + sum_(i,j) min t_ij - sum_l p_l bound_l - sum_n f_n (size_n - 1)

A choice that takes option k of item i loses at least the bound and the score of that option,

    score_i[k] =  c_i[k] - min c_i + sum_(pairs of i) (least t of the pair with option k - least t of the pair)

(Balas and Zemel 1980, "An algorithm for large zero-one knapsack problems").  The bound is computed in plain arithmetic,
so it holds whatever the tolerances of the solver that found the multipliers.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from hawqfx.allocation.solver.highs import LinearSolution, solve_relaxed
from hawqfx.allocation.solver.mip import MixedIntegerProgram
from hawqfx.allocation.solver.problem import Nogood, Pair, Problem, Terms

ROUNDING = 1e-13  # of the amounts in a bound: more than rounding takes from sums of floats


class Relaxation(NamedTuple):
    """The bound and the scores that the linear relaxation proves.

    Args:
        bound: no choice has a smaller total loss.
        scores: by item and option; a choice with this option has a total loss of at least bound and score.
        likely: the option of each item that the relaxation has most of.
        prices: limit -> decrease of the bound per further unit of the limit.
    """

    bound: float
    scores: list[list[float]]
    likely: list[int]
    prices: Mapping[str, float]


def relax(problem: Problem, deadline: float) -> Relaxation | None:
    """Solves the linear relaxation of a problem.

    Args:
        problem: the problem.
        deadline: in seconds of `time.monotonic`.

    Returns:
        The bound and scores, or None if not even fractions of options keep the limits.

    Raises:
        TimeoutError: if the deadline passes.
    """
    program = MixedIntegerProgram(problem, [range(len(options)) for options in problem.losses])
    if not program.column_count:
        return prove(problem, program, LinearSolution([0.0] * len(program.rows), []))
    solution = solve_relaxed(program, deadline)
    return None if solution is None else prove(problem, program, solution)


def prove(problem: Problem, program: MixedIntegerProgram, solution: LinearSolution) -> Relaxation:
    """Computes the bound and the scores that multipliers prove.

    Args:
        problem: the problem.
        program: the problem with all of its options.
        solution: multipliers of the program's rows, and values of its columns.

    Returns:
        The bound and scores; they hold for any multipliers, and are best for those of the optimum.
    """
    prices = [_at_least_zero(row, solution.duals) for row in program.limit_rows]
    fines = [_at_least_zero(row, solution.duals) for row in program.nogood_rows]
    priced = _price_limits(problem, prices)
    priced.fine_nogoods(problem.nogoods, fines)
    priced.shift_by_links(program, solution.duals)
    priced.take_off_rounding()
    bound, scores = priced.minimum()
    by_name = {limit.name: price for limit, price in zip(problem.limits, prices, strict=True)}
    return Relaxation(bound, scores, list(program.picks(solution.values)), by_name)


def _at_least_zero(row: int | None, duals: Sequence[float]) -> float:
    """The multiplier of an upper limit, in losses per unit: solvers give those of a minimisation a minus sign."""
    return max(0.0, -duals[row]) if row is not None else 0.0


class _PricedLosses:
    """The loss with all rules moved into it: a constant, amounts of items, and amounts of pairs.

    Args:
        constant: the part that no choice changes.
        costs: by item and option.
        tables: pair -> by option and option.
    """

    def __init__(self, constant: float, costs: list[list[float]], tables: dict[Pair, list[list[float]]]) -> None:
        self.constant, self.costs, self.tables = constant, costs, tables

    def fine_nogoods(self, nogoods: Sequence[Nogood], fines: Sequence[float]) -> None:
        """Each option in a set of a nogood costs the fine, which all items of the nogood but one get back."""
        for nogood, fine in zip(nogoods, fines, strict=True):
            self.constant -= fine * (len(nogood) - 1)
            for i, options in nogood.items():
                for k in options:
                    self.costs[i][k] += fine

    def shift_by_links(self, program: MixedIntegerProgram, duals: Sequence[float]) -> None:
        """Moves amounts of pairs to their items: no choice costs more or less for that, but the bound is closer."""
        for (i, j), (first_rows, second_rows) in program.link_rows.items():
            table = self.tables[i, j]
            for k, row in first_rows.items():
                self.costs[i][k] += duals[row]
                table[k] = [value - duals[row] for value in table[k]]
            for m, row in second_rows.items():
                self.costs[j][m] += duals[row]
                for line in table:
                    line[m] -= duals[row]

    def take_off_rounding(self) -> None:
        """Lowers the constant by more than rounding can have raised the bound."""
        largest = [max(map(abs, row)) for rows in (self.costs, *self.tables.values()) for row in rows]
        self.constant -= ROUNDING * (abs(self.constant) + sum(largest))

    def minimum(self) -> tuple[float, list[list[float]]]:
        """The bound, which is each item and each pair at its least, and the scores of the options."""
        leasts = [min(row) for row in self.costs]
        scores = [[cost - least for cost in row] for row, least in zip(self.costs, leasts, strict=True)]
        bound = self.constant + sum(leasts)
        for (i, j), table in self.tables.items():
            least = min(map(min, table))
            bound += least
            scores[i] = _raised(scores[i], map(min, table), least)
            scores[j] = _raised(scores[j], map(min, zip(*table, strict=True)), least)
        return bound, scores


def _raised(scores: Sequence[float], smallest: Iterable[float], least: float) -> list[float]:
    """Scores of an item's options, raised by how far the smallest amount with each option is above the pair's least."""
    return [score + small - least for score, small in zip(scores, smallest, strict=True)]


def _price_limits(problem: Problem, prices: Sequence[float]) -> _PricedLosses:
    """The losses with every limit's sum beyond its bound added at its price, in losses per unit."""
    costs = [list(map(float, options)) for options in problem.losses]
    weighted = [(Terms({}, problem.interactions), 1.0)]
    weighted += [(limit.terms, price) for limit, price in zip(problem.limits, prices, strict=True)]
    pairs = {pair for terms, _ in weighted for pair in terms.pairs}
    tables = {(i, j): [[0.0] * len(costs[j]) for _ in costs[i]] for i, j in pairs}
    for terms, weight in weighted:
        if weight:
            for i, row in terms.single.items():
                costs[i] = _weighted_sum(costs[i], weight, row)
            for pair, table in terms.pairs.items():
                both = zip(tables[pair], table, strict=True)
                tables[pair] = [_weighted_sum(own, weight, other) for own, other in both]
    constant = 0.0 - sum(price * limit.bound for limit, price in zip(problem.limits, prices, strict=True))
    return _PricedLosses(constant, costs, tables)


def _weighted_sum(amounts: Sequence[float], weight: float, others: Sequence[float]) -> list[float]:
    return [amount + weight * other for amount, other in zip(amounts, others, strict=True)]
