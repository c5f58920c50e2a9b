"""A plan goes on from itself: measured where it stands, solved again a width around it, and judged on other data.

HAWQ expands the loss once, around the float network.  Here the expansion is repeated around the plan
(passes/at_plan.py), as in sequential quadratic programming: no site moves further than one width, which is as far as
the expansion is trusted, and the new plan is taken if it loses less on samples that were not measured on.
"""

import glob
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

from hawqfx.frontend.context import Context
from hawqfx.frontend.data import Batch
from hawqfx.ir.program import Program
from hawqfx.maths.formats import FLOAT_BITS, Format
from hawqfx.pass_manager.manager import run
from hawqfx.passes.allocation import Allocation
from hawqfx.passes.at_plan import AtPlan, Moves
from hawqfx.session.planner import Candidate, Planner, Refinement


def refined(planner: Planner, candidate: Candidate, allocation: Allocation, rounds: int) -> Candidate:
    """The candidate, or a better one within the same limits.

    Args:
        planner: of the measured network.
        candidate: a plan and its network.
        allocation: the limits and rules of the plan.
        rounds: the most plans to try one after another; the first that gains nothing is the last.
    """
    halves = _halves(planner)
    if halves is None or not _can_refine(planner.context, allocation):
        return candidate
    measured_on, judged_on = halves
    judge = replace(planner, context=judged_on)
    tried = []
    for _ in range(rounds):
        moves = _moves(planner.measured, candidate.planned.formats(), allocation)
        if not any(each.others for each in moves.values()):
            break
        around = run([AtPlan(tuple(moves.items()))], planner.measured, measured_on)
        chosen = run([_near(allocation, moves)], around, measured_on).formats()
        changed = sum(width != moves[key].format for key, width in chosen.items())
        if not changed:
            break
        other = planner.quiet.lower(planner.explain(allocation, chosen), candidate.budget)
        before, after = judge.losses(candidate.program, other.program, expected=True)
        gain = after.minus(before)
        tried.append(Refinement(changed, gain, taken=gain.mean < 0 and gain.is_significant, unit=after.unit))
        if not tried[-1].taken:
            break
        candidate = planner.lower(other.planned, other.budget)
    return replace(candidate, refinements=tuple(tried))


def _can_refine(context: Context, allocation: Allocation) -> bool:
    """The expansion needs targets drawn from the model's distribution; the paper's rule orders bits by the trace."""
    return context.knows_distribution and allocation.rule == "exact"


def _halves(planner: Planner) -> tuple[Context, Context] | None:
    """The calibration data, half to measure on and half to judge by; None if it is one sample, or one batch of a fixed
    size."""
    context = planner.context
    parts: tuple[list[Batch], list[Batch]] = ([], [])
    for index, batch in enumerate(context.batches):
        if planner.measured.dynamic_batch and batch.size > 1:
            parts[0].append(batch.first(batch.size // 2))
            parts[1].append(batch.last(batch.size - batch.size // 2))
        else:
            parts[index % 2].append(batch)
    if not all(parts):
        return None
    one, other = (replace(context, batches=tuple(part)) for part in parts)
    return one, other


def _moves(program: Program, plan: Mapping[str, Format], allocation: Allocation) -> dict[str, Moves]:
    """For every site, the static formats next to its own that the rules allow; sites in other schemes stay."""
    allowed = allocation.rules.formats(program)
    moves = {}
    for key, own in plan.items():
        static = sorted({width for width in allowed[key] if width.is_static} | {own}) if own.is_static else [own]
        pairs = [*pairwise(static), *pairwise(reversed(static))]
        moves[key] = Moves(own, tuple(sorted(other for one, other in pairs if one == own)))
    return moves


def _near(allocation: Allocation, moves: Mapping[str, Moves]) -> Allocation:
    """The allocation among the formats that sites may move to."""
    return replace(
        allocation,
        weight_bits=_static(allocation.weight_bits),
        activation_bits=_static(allocation.activation_bits),
        fix=(*allocation.fix, *((glob.escape(key), FLOAT_BITS) for key, each in moves.items() if each.format.is_float)),
        interactions=0,
    )


def _static(bits: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return None if bits is None else tuple(each for each in bits if each < FLOAT_BITS)
