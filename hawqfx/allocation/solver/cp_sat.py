"""CP-SAT of OR-tools: small cores, and the last one.

CP-SAT counts in integers.  Rows of limits are integers already; losses are scaled so that all columns together lose
RESOLUTION, and rounded.
"""

import time
from collections.abc import Sequence
from math import inf
from typing import Any

from hawqfx.allocation.solver.mip import Core, MixedIntegerProgram

EFFORT = 20.0  # deterministic time for a core, about seconds
RESOLUTION = 2**46  # loss of all columns together, as an integer: leaves CP-SAT room to add and to multiply


def solve_by_cp_sat(program: MixedIntegerProgram, hint: Sequence[int], allowed: float, deadline: float) -> Core:
    """Searches for the best choice, exact in integers.

    Args:
        program: the program of a core.
        hint: the option of every item, near the best if possible.
        allowed: the search ends when loss and bound differ by no more than this, in units of the loss.
        deadline: in seconds of `time.monotonic`.

    Returns:
        The best choice and the bound that CP-SAT reports.
    """
    from ortools.sat.python import cp_model

    scale = RESOLUTION / (sum(program.losses) or 1.0)
    model, variables = _model(program, hint, scale)
    solver = _solver(allowed * scale, deadline)
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return Core(None, inf, inf, True)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Core(None, inf, -inf, False)
    picks = program.picks([solver.value(variable) for variable in variables])
    loss = program.problem.objective.total(picks)
    bound = program.constant + solver.best_objective_bound / scale
    if status == cp_model.OPTIMAL:
        return Core(picks, loss, max(bound, loss - allowed), True)
    return Core(picks, loss, bound, False)


def _model(program: MixedIntegerProgram, hint: Sequence[int], scale: float) -> tuple[Any, list[Any]]:
    """The program as a model, and its variables by column; a loss of 1 is `scale` in the model's objective."""
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    # a program without columns has a variable all the same, which rows that no choice keeps refer to
    variables = [model.new_bool_var("") for _ in range(max(1, program.column_count))]
    for row in program.rows:
        total = cp_model.LinearExpr.weighted_sum([variables[c] for c in row.columns], [int(a) for a in row.amounts])
        model.add(total <= int(row.high) if row.low == -inf else total == int(row.low))
    losses = [round(loss * scale) for loss in program.losses]
    model.minimize(cp_model.LinearExpr.weighted_sum(variables[: program.column_count], losses))
    for column, on in program.values(hint).items():
        model.add_hint(variables[column], on)
    return model, variables


def _solver(allowed: float, deadline: float) -> Any:
    """A deterministic solver: a single worker, a fixed seed, and an effort that is counted and not clocked."""
    from ortools.sat.python import cp_model

    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.linearization_level = 2
    solver.parameters.max_deterministic_time = EFFORT
    # losses are integers, so a gap below 1 is none
    solver.parameters.absolute_gap_limit = max(0.5, allowed)
    solver.parameters.max_time_in_seconds = max(0.01, deadline - time.monotonic())
    return solver
