"""The smallest network whose score falls by at most a given drop.

Sizes are bisected on the calibration data, each network lowered once, and the smallest that keeps the score is
validated on the data held out; if it falls short there, larger sizes are bisected on those data.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from hawqfx.allocation.budget import Budget, Limit
from hawqfx.errors import InfeasibleBudget, UsageError
from hawqfx.frontend.data import Batch
from hawqfx.ir.facts import FileText
from hawqfx.passes.allocation import Allocation
from hawqfx.session.planner import Candidate, Planner

log = logging.getLogger(__name__)

STEPS = 64  # budgets between the least and the greatest size that a search may try


def smallest(planner: Planner, limits: Budget, rules: Allocation) -> Candidate:
    """The smallest network that keeps the score and the other limits.

    Args:
        planner: with scoring, whose program knows its FileText.
        limits: a budget on `drop`, and others beside it.
        rules: the allocation's other options.

    Raises:
        UsageError: if there is no scoring.
        InfeasibleBudget: if no network keeps the score on the data held out.
    """
    scoring, drop = planner.scoring, limits.drop
    if scoring is None or drop is None:
        raise UsageError("a budget on drop needs metric=, a function of (output, target), given to compile()")
    search = _Search(planner, limits, rules, _sizes(planner, limits, rules))
    calibration, holdout = (search.floor(batches, drop) for batches in (planner.context.batches, scoring.holdout))
    step = search.first(0, calibration)
    if not search.keeps(step, holdout):
        log.warning(
            "%s keeps drop=%s on the calibration data and not on the data held out: a larger one is taken",
            search.budget(step), drop,
        )  # fmt: skip
        step = search.first(step, holdout)
    candidate = search.at(step)
    if candidate is None or not search.keeps(step, holdout):
        best = "no size keeps the other limits"
        if candidate is not None:
            best = f"the largest network has {planner.score(candidate.program, scoring.holdout):.4g}"
            best += "; with 32 among weight_bits= and activation_bits= sites may stay in float"
        raise InfeasibleBudget(
            f"drop={drop} cannot be met on the data held out: the metric must be {holdout.score:.4g}, and {best}"
        )
    scores = {
        name: (floor.reference, planner.score(candidate.program, floor.batches))
        for name, floor in (("calibration data", calibration), ("data held out", holdout))
    }
    return replace(planner.lower(candidate.planned, candidate.budget), scores=scores)


@dataclass(frozen=True)
class _Floor:
    """The score of the float network on some batches, and the least that another may have."""

    batches: Sequence[Batch]
    reference: float
    score: float


@dataclass
class _Search:
    """Networks by size, smallest first; each is lowered once."""

    planner: Planner
    limits: Budget
    rules: Allocation
    sizes: Sequence[int]
    lowered: dict[int, Candidate | None] = field(default_factory=dict)

    def floor(self, batches: Sequence[Batch], drop: Limit) -> _Floor:
        score = self.planner.score(self.planner.measured, batches)
        return _Floor(batches, score, score - drop.of(abs(score)))

    def budget(self, step: int) -> Budget:
        return replace(self.limits, drop=None, size=Limit(self.sizes[step]))

    def at(self, step: int) -> Candidate | None:
        """The network of a size; None if the size is too small for the other limits."""
        if step not in self.lowered:
            budget, quiet = self.budget(step), self.planner.quiet
            try:
                planned = quiet.plan(replace(self.rules, budget=budget))
                self.lowered[step] = quiet.lower(planned, f"{self.limits}, met by {budget}")
            except InfeasibleBudget:
                self.lowered[step] = None
            count = len(self.lowered)
            self.planner.context.progress("drop", count, max(count, STEPS.bit_length()))
        return self.lowered[step]

    def keeps(self, step: int, floor: _Floor) -> bool:
        candidate = self.at(step)
        return candidate is not None and self.planner.score(candidate.program, floor.batches) >= floor.score

    def first(self, low: int, floor: _Floor) -> int:
        """The first step from `low` that keeps the score, if the last does, by bisection: scores rise with the size."""
        high = len(self.sizes) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.keeps(middle, floor) else (middle + 1, high)
        return low


def _sizes(planner: Planner, limits: Budget, rules: Allocation) -> list[int]:
    """Sizes in bytes from the least to the greatest, or to the limit on size if there is one."""
    sizes = [int(size) for size in planner.range_of(rules, "size", STEPS)]
    if limits.size is None:
        return sizes
    most = math.floor(limits.size.of(planner.measured.about(FileText).float_bytes))
    return [*(size for size in sizes if size < most), most]
