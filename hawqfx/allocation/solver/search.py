"""The best choice, by cores that grow.

The linear relaxation gives a bound L and a score of every option: a choice that takes the option loses at least L and
the score.  Few options have a small score.  They are the core, whose best choice has a loss of U.  If every option left
out has a score of U - L or more, that choice is the best of all; else the core grows (Balas and Zemel 1980, "An
algorithm for large zero-one knapsack problems").

HiGHS solves cores of many items to a gap of about 1e-4.  CP-SAT solves small cores, and the last core to the gap that
the caller asks for.  `benchmarks/allocation.py` has the times, and those of either solver alone.
"""

import time
from collections.abc import Sequence
from math import inf

from hawqfx.allocation.solver.cp_sat import solve_by_cp_sat
from hawqfx.allocation.solver.highs import solve_by_highs
from hawqfx.allocation.solver.mip import Core, MixedIntegerProgram
from hawqfx.allocation.solver.problem import Choice, Infeasible, LinearConstraint, Problem
from hawqfx.allocation.solver.relaxation import Relaxation, relax

CORE, GROWTH = 300, 3  # options of the first core beyond those of one per item, and the factor by which they grow
SMALL = 120  # items with a choice, up to which CP-SAT solves a core at once
LOOSE = 0.1  # fraction of the gap that is left, to which HiGHS solves cores before the last
NEAR = 1e-4  # HiGHS solves a core to half of this gap, or of the gap that the caller asks for if that is larger


def choose(
    problem: Problem, *, start: Sequence[int] | None = None, gap: float = 0.0, seconds: float = 60.0
) -> Choice | Infeasible:
    """The best choice, or the limit that stands in its way.

    The search is deterministic: seeds are fixed, and effort is counted and not clocked, unless it takes longer than
    `seconds`.  A search that either ends returns the best choice so far with its bound.  Losses count to 2^-46 of the
    sum that all options of a core can lose, which is far below the noise of any prediction.

    Args:
        problem: losses, limits and nogoods.
        start: the option of every item, near the best if possible; it need not keep the limits.
        gap: a choice is good enough if its loss is proven to be within this fraction of the least.
        seconds: time that the search may take.

    Returns:
        The choice, or the limit that cannot be kept.

    Raises:
        ValueError: if the nogoods exclude every choice.
        TimeoutError: if in that time no choice was known, and it was not known either that there is none.
    """
    if not problem.losses:
        return Choice((), 0.0, 0.0, True)
    deadline = time.monotonic() + seconds
    relaxation = relax(problem, deadline)
    if relaxation is None:
        return _infeasible(problem, deadline)
    return _Search(problem, relaxation, gap, deadline).run(start)


class _Search:
    """Cores that grow until no option left out can be in a better choice.

    Args:
        problem: the problem.
        relaxation: its bound and scores.
        gap: fraction of the least loss that the choice may lose more.
        deadline: in seconds of `time.monotonic`.

    Attributes:
        picks: the option of every item in the best choice so far; None if no choice is known.
        loss: the total loss of that choice, or infinity.
        proven: no choice has a smaller total loss.
    """

    def __init__(self, problem: Problem, relaxation: Relaxation, gap: float, deadline: float) -> None:
        self.problem, self.relaxation, self.gap, self.deadline = problem, relaxation, gap, deadline
        self.picks: tuple[int, ...] | None = None
        self.loss, self.proven = inf, relaxation.bound

    def run(self, start: Sequence[int] | None) -> Choice | Infeasible:
        """Solves larger and larger cores until the answer is known."""
        if start is not None and self.problem.keeps(start):
            self.picks, self.loss = tuple(start), self.problem.objective.total(start)
        scores = sorted(score for options in self.relaxation.scores for score in options)
        extra = CORE
        while True:
            size = len(self.problem.losses) + extra
            reach = scores[size - 1] if size < len(scores) else inf
            reach = min(reach, self.loss - self.relaxation.bound)  # beyond, no option can be in a better choice
            answer = self._solve_core(reach)
            if answer is not None:
                return answer
            extra *= GROWTH if self.loss == inf else GROWTH**2  # a choice bounds the last core, which is not far

    def _solve_core(self, reach: float) -> Choice | Infeasible | None:
        """Solves the core of the options whose score is within reach.  None: a larger core is needed."""
        program = MixedIntegerProgram(self.problem, self._core(reach))
        # a difference, as `run` takes it: sums of floats may round to below the loss, and no core would be the last
        last = reach >= self.loss - self.relaxation.bound
        outside = inf if last else self.relaxation.bound + reach  # the least loss with an option left out
        if len(program.free) > SMALL:
            self._learn(solve_by_highs(program, self._hint(), self._allowed(last), self.deadline), outside)
            optimum = self._optimum()
            if optimum or not last:
                return optimum
        solved = solve_by_cp_sat(program, self._hint(), self.gap * self._size(), self.deadline)
        self._learn(solved, outside)
        optimum = self._optimum()
        if optimum:
            return optimum
        if reach == inf and solved.bound == inf:
            return _infeasible(self.problem, self.deadline)
        if not last and (solved.settled or self.picks is None) and time.monotonic() < self.deadline:
            return None
        return self._best_so_far()

    def _core(self, reach: float) -> list[list[int]]:
        """The options of each item whose score is within reach, and that of the hint."""
        hint = self._hint()
        return [
            [k for k, score in enumerate(scores) if score <= reach or k == hint[i]]
            for i, scores in enumerate(self.relaxation.scores)
        ]

    def _allowed(self, last: bool) -> float:
        """The gap, in units of the loss, to which HiGHS solves a core."""
        allowed = max(self.gap, NEAR) / 2 * self._size()
        # before the last core a better choice is all that is wanted: the proof comes with the last core
        if not last and self.loss < inf:
            allowed = max(allowed, LOOSE * (self.loss - self.proven))
        return allowed

    def _hint(self) -> Sequence[int]:
        """The choice from which a solver begins."""
        return self.relaxation.likely if self.picks is None else self.picks

    def _size(self) -> float:
        """The loss to which gaps are relative."""
        return abs(self.relaxation.bound if self.picks is None else self.loss)

    def _learn(self, solved: Core, outside: float) -> None:
        """Keeps the choice of a core if it is better, and the bound: the smaller of those inside and outside of it."""
        if solved.picks is not None and solved.loss < self.loss:
            self.picks, self.loss = solved.picks, solved.loss
        self.proven = min(self.loss, max(self.proven, min(solved.bound, outside)))

    def _optimum(self) -> Choice | None:
        """The best choice so far if it is proven to be within the gap; else None."""
        if self.picks is None or self.loss - self.proven > self.gap * abs(self.loss):
            return None
        return Choice(self.picks, self.loss, self.proven, True, self.relaxation.prices)

    def _best_so_far(self) -> Choice:
        """The best choice so far, not proven to be within the gap."""
        if self.picks is None:
            raise TimeoutError("no choice was found in time, and none was excluded: allow more time")
        return Choice(self.picks, self.loss, self.proven, False, self.relaxation.prices)


def _infeasible(problem: Problem, deadline: float) -> Infeasible:
    """The first limit that cannot be kept alone; else the first that cannot be kept beside those before it."""
    amounts: dict[str, list[LinearConstraint]] = {}
    for limit in problem.limits:
        amounts.setdefault(limit.amount or limit.name, []).append(limit)
    for limits in amounts.values():
        if (found := _exceeded(problem, limits, (), deadline)) is not None:
            return Infeasible(*found, alone=True)
    before: list[LinearConstraint] = []
    for limits in amounts.values():
        if (found := _exceeded(problem, limits, before, deadline)) is not None:
            return Infeasible(*found, alone=False)
        before += limits
    for number, limit in enumerate(problem.limits):  # sums that are within their bounds one at a time
        least = _least(problem, limit, problem.limits[:number], deadline)
        if least > limit.bound:
            return Infeasible(limit.name, least, alone=False)
    raise ValueError("the nogoods exclude every choice")


def _exceeded(
    problem: Problem, limits: Sequence[LinearConstraint], others: Sequence[LinearConstraint], deadline: float
) -> tuple[str, int] | None:
    """Of limits on one amount, the one that is exceeded most while the others are kept, and its least sum."""
    found, excess = None, 0
    for limit in limits:
        if limit.terms.most() - limit.bound > excess:
            least = _least(problem, limit, others, deadline)
            if least - limit.bound > excess:
                found, excess = (limit.name, least), least - limit.bound
    return found


def _least(problem: Problem, limit: LinearConstraint, others: Sequence[LinearConstraint], deadline: float) -> int:
    """The least sum of a limit while the others are kept, which is known to be possible."""
    losses = [limit.terms.single.get(i, [0] * len(options)) for i, options in enumerate(problem.losses)]
    sums = Problem(losses, others, problem.nogoods, limit.terms.pairs)
    answer = choose(sums, seconds=max(0.01, deadline - time.monotonic()))
    if isinstance(answer, Infeasible):
        raise ValueError("the nogoods exclude every choice")
    if not answer.optimal:
        raise TimeoutError(f"whether {limit.name} can be kept was not settled in time: allow more of it")
    return int(limit.terms.total(answer.picks))
