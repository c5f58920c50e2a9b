"""The curve of a budget against the loss: one plan per budget, all from one measurement."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from hawqfx.allocation.budget import Budget
from hawqfx.ir.facts import Account
from hawqfx.maths.formats import Format
from hawqfx.passes.allocation import Allocation
from hawqfx.session.planner import Planner


@dataclass(frozen=True)
class Point:
    """A plan on the frontier.

    Args:
        budget: as text.
        formats: site -> its format.
        account: the amounts of the limits and the predicted loss.
        loss: the mean loss on the calibration data, if the lowered network was run.
        score: the score on the data held out, if the network was run and there is a score.
    """

    budget: str
    formats: Mapping[str, Format]
    account: Account
    loss: float | None = None
    score: float | None = None

    @property
    def bits(self) -> dict[str, int]:
        """Bits of every site; 32 is float."""
        return {key: width.bits for key, width in self.formats.items()}

    @property
    def measured(self) -> bool:
        """Whether the plan was lowered and run, rather than predicted."""
        return self.loss is not None


@dataclass(frozen=True)
class Frontier:
    """Plans from the tightest budget to the loosest.

    Args:
        limit: the limit that grows along the curve; empty if the budgets were given.
        points: the plans.
    """

    limit: str
    points: tuple[Point, ...]

    def table(self) -> Table:
        """A row per plan: budget, amounts of its limits, predicted loss increase with its proof, measured loss."""
        table = Table("budget", "takes", "of float32", "predicted", "proven", "loss", "score", title="frontier")
        for point in self.points:
            uses = point.account.limits.values()
            table.add_row(
                point.budget,
                ", ".join(f"{use.amount:.6g} {use.unit}" for use in uses),
                ", ".join(f"{use.amount / use.reference:.2%}" for use in uses),
                f"{point.account.loss:.4g}",
                "least" if point.account.optimal else f">= {point.account.bound:.4g}",
                "predicted only" if point.loss is None else f"{point.loss:.4f}",
                "" if point.score is None else f"{point.score:.4f}",
            )
        return table


def plan_each(planner: Planner, allocation: Allocation, budgets: Sequence[Budget]) -> list[Point]:
    """A point for every budget, each solve begun from the plan before."""
    points: list[Point] = []
    for budget in budgets:
        start = tuple(points[-1].formats.items()) if points else ()
        planned = planner.plan(replace(allocation, budget=budget, start=start))
        points.append(Point(str(budget), planned.formats(), planned.about(Account)))
    return points


def evaluated(planner: Planner, allocation: Allocation, budget: Budget, point: Point) -> Point:
    """The point with the loss, and the score if there is one, of its lowered network."""
    planned = planner.explain(replace(allocation, budget=budget), point.formats)
    program = planner.lower(planned, point.budget).program
    score = None if planner.scoring is None else planner.score(program, planner.scoring.holdout)
    return replace(point, loss=planner.loss(program), score=score)
