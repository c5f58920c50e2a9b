"""HiGHS, by MathOpt of OR-tools: linear relaxations, and cores of many items.

HiGHS computes in floats: rows and losses are scaled to a size that suits its tolerances.  The results hold only within
these tolerances, so callers prove bounds of relaxations anew, and choices that break a limit are dropped.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from math import inf
from typing import Any, NamedTuple

from hawqfx.allocation.solver.mip import Core, MixedIntegerProgram


class LinearSolution(NamedTuple):
    """The optimum of a linear relaxation.

    Args:
        duals: multiplier of each row, in losses per unit of the row.
        values: value of each column, from 0 to 1.
    """

    duals: list[float]
    values: list[float]


def solve_relaxed(program: MixedIntegerProgram, deadline: float) -> LinearSolution | None:
    """Solves a program whose columns may be fractions.

    Args:
        program: the program; it has at least one column.
        deadline: in seconds of `time.monotonic`.

    Returns:
        The optimum, or None if not even fractions keep the rows.

    Raises:
        TimeoutError: if the deadline passes.
    """
    highs = _Highs(program, integer=False)
    result = highs.solve(deadline)
    if highs.is_infeasible(result):
        return None
    if not highs.is_optimal(result):
        raise TimeoutError(f"the linear relaxation was not solved in time: {result.termination.reason.name}")
    return LinearSolution(highs.duals(result), highs.values(result))


def solve_by_highs(program: MixedIntegerProgram, hint: Sequence[int], allowed: float, deadline: float) -> Core:
    """Searches for the best choice, as exactly as the tolerances of floats allow.

    Args:
        program: the program of a core.
        hint: the option of every item, near the best if possible.
        allowed: the search ends when loss and bound differ by no more than this, in units of the loss.
        deadline: in seconds of `time.monotonic`.

    Returns:
        The best choice and the bound that HiGHS reports.
    """
    highs = _Highs(program, integer=True)
    result = highs.solve(deadline, allowed, hint)
    if highs.is_infeasible(result):
        return Core(None, inf, inf, True)
    bound = program.constant + highs.unit * result.termination.objective_bounds.dual_bound
    if not result.has_primal_feasible_solution():
        return Core(None, inf, bound, False)
    picks = program.picks(highs.values(result))
    # the tolerances let a choice through that breaks a limit by a hair: CP-SAT will find a choice that keeps it
    if not program.problem.keeps(picks):
        return Core(None, inf, bound, False)
    return Core(picks, program.problem.objective.total(picks), bound, highs.is_optimal(result))


class _Highs:
    """A program as a model of MathOpt.

    Args:
        program: the program.
        integer: whether columns must be 0 or 1; else they may be fractions.

    Attributes:
        unit: the mean loss of a column; the model's objective is the loss in this unit.
    """

    def __init__(self, program: MixedIntegerProgram, *, integer: bool) -> None:
        from ortools.math_opt.python import mathopt

        self.mathopt, self.program = mathopt, program
        self.model = mathopt.Model()
        columns = range(program.column_count)
        self.variables = [self.model.add_variable(lb=0.0, ub=1.0, is_integer=integer) for _ in columns]
        self._add_rows()
        self.unit = sum(program.losses) / (len(program.losses) or 1) or 1.0
        objective = self.model.objective
        for variable, loss in zip(self.variables, program.losses, strict=True):
            if loss:
                objective.set_linear_coefficient(variable, loss / self.unit)

    def _add_rows(self) -> None:
        """Every row, divided by the size of its bound."""
        self.sizes = [max(1.0, abs(row.high)) for row in self.program.rows]
        self.constraints = []
        for row, size in zip(self.program.rows, self.sizes, strict=True):
            constraint = self.model.add_linear_constraint(lb=row.low / size, ub=row.high / size)
            for column, amount in zip(row.columns, row.amounts, strict=True):
                constraint.set_coefficient(self.variables[column], amount / size)
            self.constraints.append(constraint)

    def solve(self, deadline: float, allowed: float = 0.0, hint: Sequence[int] | None = None) -> Any:
        """The result of MathOpt; arguments as in `solve_by_highs`."""
        left = timedelta(seconds=max(0.01, deadline - time.monotonic()))
        parameters = self.mathopt.SolveParameters(time_limit=left, absolute_gap_tolerance=allowed / self.unit)
        model_parameters = self.mathopt.ModelSolveParameters()
        if hint is not None:
            values = {self.variables[column]: float(on) for column, on in self.program.values(hint).items()}
            model_parameters.solution_hints.append(self.mathopt.SolutionHint(variable_values=values))
        with _silent_stdout():
            return self.mathopt.solve(
                self.model, self.mathopt.SolverType.HIGHS, params=parameters, model_params=model_parameters
            )

    def is_infeasible(self, result: Any) -> bool:
        """Whether HiGHS proved that no values of the columns keep the rows; columns are bounded, so is the loss."""
        reasons = self.mathopt.TerminationReason
        return result.termination.reason in (reasons.INFEASIBLE, reasons.INFEASIBLE_OR_UNBOUNDED)

    def is_optimal(self, result: Any) -> bool:
        """Whether HiGHS ended with an optimum, within the gap allowed."""
        return result.termination.reason == self.mathopt.TerminationReason.OPTIMAL

    def values(self, result: Any) -> list[float]:
        """The value of each column."""
        values = result.variable_values()
        return [values[variable] for variable in self.variables]

    def duals(self, result: Any) -> list[float]:
        """The multiplier of each row of the program, in losses per unit of the row."""
        duals = result.dual_values()
        pairs = zip(self.constraints, self.sizes, strict=True)
        return [duals[constraint] * self.unit / size for constraint, size in pairs]


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Sends file descriptor 1 nowhere: HiGHS 1.12 prints a line for every solution that it repairs, whatever its
    options."""
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
