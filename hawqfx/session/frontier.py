"""The curve of a budget against the loss: one plan per budget, all from one measurement."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table

from hawqfx.ir.facts import Account


@dataclass(frozen=True)
class Point:
    """A plan on the frontier.  loss, score: on data, if the lowered network was run; else None."""

    budget: str
    bits: Mapping[str, int]
    account: Account
    loss: float | None = None
    score: float | None = None

    @property
    def measured(self) -> bool:
        """Whether the plan was lowered and run, rather than predicted."""
        return self.loss is not None


@dataclass(frozen=True)
class Frontier:
    """Plans from the tightest budget to the loosest.  `limit`: what goes along the curve; empty for any budgets."""

    limit: str
    points: tuple[Point, ...]

    def table(self) -> Table:
        """Budget, what it takes of each limit, predicted loss increase with its proof, and what was measured."""
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
