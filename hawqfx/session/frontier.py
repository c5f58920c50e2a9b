"""The curve of a budget against the loss: one plan per budget, all from one measurement."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hawqfx import arguments
from hawqfx.allocation.budget import Budget
from hawqfx.errors import UsageError
from hawqfx.ir.facts import Account, LimitUse
from hawqfx.maths.formats import Format
from hawqfx.passes.allocation import Allocation
from hawqfx.session.latency_search import within_latency
from hawqfx.session.plan_text import html_table
from hawqfx.session.planner import Planner, for_budget

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

LIMITS = ("size", "weight_bits", "bops", "activation_memory")  # that a frontier goes along


def checked(points: int, limit: str, budgets: Sequence[Budget | str] | None, evaluate: int) -> list[Budget] | None:
    """The budgets that are given, parsed; None if the frontier goes along a limit.

    Raises:
        UsageError: if there are fewer than two points, no such limit, or budgets that a frontier cannot have.
        BudgetError: if the text of a budget does not parse.
    """
    arguments.whole("evaluate", evaluate, 0, "so many points are lowered and run; zero or more")
    if budgets is None:
        arguments.whole("points", points, 2, "a frontier has at least two")
        if limit not in LIMITS:
            raise UsageError(f"limit={limit!r}: a frontier goes along {', '.join(LIMITS[:-1])} or {LIMITS[-1]}")
        return None
    if isinstance(budgets, (str, Budget)):
        raise UsageError(f"budgets={str(budgets)!r}: give a list of budgets")
    parsed = [Budget.of(each) for each in budgets]
    if not parsed:
        raise UsageError("budgets is empty: give at least one, or leave it out")
    if any(each.drop is not None for each in parsed):
        raise UsageError("a frontier plans for budgets on resources: a budget on drop is searched for, by compile()")
    shapes = [each.latency.shape for each in parsed if each.latency is not None]
    if any(shape != shapes[0] for shape in shapes):
        raise UsageError("the budgets are latencies at several shapes: a frontier has one, so make one of each shape")
    return parsed


@dataclass(frozen=True)
class Point:
    """A plan on the frontier.

    Args:
        budget: as text.
        formats: site -> its format.
        account: the amounts of the limits and the predicted loss.
        loss: the mean loss on the calibration data, if the lowered network was run.
        score: the score on the data held out, if the network was run and there is a score.
        names: site -> what users call it.
    """

    budget: str
    formats: Mapping[str, Format]
    account: Account
    loss: float | None = None
    score: float | None = None
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def bits(self) -> dict[str, int]:
        """Bits of every site; 32 is float."""
        return {key: width.bits for key, width in self.formats.items()}

    def to_json(self) -> dict[str, Any]:
        """The point as dicts, texts and numbers; sites by what users call them."""
        bits = {self.names.get(key, key): bits for key, bits in self.bits.items()}
        limits = {name: {"amount": _taken(use), "unit": use.unit} for name, use in self.account.limits.items()}
        return {
            "budget": self.budget, "limits": limits, "bits": bits, "predicted_loss_increase": self.account.loss,
            "proven": self.account.optimal, "loss": self.loss, "score": self.score,
        }  # fmt: skip

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

    def __repr__(self) -> str:
        ends = f"{self.points[0].budget} to {self.points[-1].budget}" if self.points else "no plans"
        return f"<Frontier of {len(self.points)} plans: {ends}>"

    def _repr_html_(self) -> str:
        """A short table for notebooks."""
        rows = [
            (each.budget, f"{each.account.loss:.4g}", "" if each.loss is None else f"{each.loss:.4f}")
            for each in self.points
        ]
        return html_table(("budget", "predicted loss increase", "loss"), rows)

    def plot(self, axes: "Axes | None" = None) -> "Axes":
        """The curve as a figure: the amount of the limit, or of the first one, against the predicted loss increase,
        with the loss of the plans that were run.

        Args:
            axes: of matplotlib, to draw on; None: those of a new figure.

        Raises:
            UsageError: if matplotlib is not installed.
        """
        from hawqfx.session import figures

        axes = figures.axes_or_new(axes, (7, 4))
        limit = self.limit or next(iter(self.points[0].account.limits))
        uses = [point.account.limits[limit] for point in self.points]
        predicted = [point.account.loss for point in self.points]
        run = [point.loss for point in self.points]
        figures.curve(axes, limit, uses[0].unit, [_taken(use) for use in uses], predicted, run)
        return axes

    def table(self) -> "Table":
        """A row per plan: budget, amounts of its limits, predicted loss increase with its proof, measured loss."""
        from rich.table import Table  # `hawqfx.compile` loads without it

        table = Table("budget", "takes", "of float32", "predicted", "proven", "loss", "score", title="frontier")
        for point in self.points:
            uses = point.account.limits.values()
            table.add_row(
                point.budget,
                ", ".join(f"{_in_digits(_taken(use))} {use.unit}" for use in uses),
                ", ".join(f"{_taken(use) / use.reference:.2%}" for use in uses),
                f"{point.account.loss:.4g}",
                "least" if point.account.optimal else f">= {point.account.bound:.4g}",
                "predicted only" if point.loss is None else f"{point.loss:.4f}",
                "" if point.score is None else f"{point.score:.4f}",
            )
        return table


def rounded_up(amount: float) -> float:
    """An amount in four digits, as people write a budget; not below it, since the least that can be kept may be it."""
    step = 10.0 ** (math.floor(math.log10(amount)) - 3)
    return float(f"{math.ceil(round(amount / step, 6)) * step:.12g}")


def _in_digits(amount: float) -> str:
    """Whole where it is large, in four digits where it is small."""
    return f"{amount:,.0f}" if amount >= 1000 else f"{amount:.4g}"


def _taken(use: LimitUse) -> float:
    """The amount of a limit that a plan takes: the measured one, where the network was run."""
    return use.amount if use.measured is None else use.measured


def plan_each(planner: Planner, allocation: Allocation, budgets: Sequence[Budget], threads: int) -> list[Point]:
    """A point for every budget, each solve begun from the plan before; a plan for a latency is exported and timed.

    Args:
        planner: of the measured network.
        allocation: the rules, whatever the budget.
        budgets: without limits on drop.
        threads: of the runs that a budget on latency is for.

    Raises:
        InfeasibleBudget: if no choice keeps one of the budgets.
    """
    points: list[Point] = []
    for budget in budgets:
        ruled = for_budget(allocation, budget)
        if budget.latency is not None:
            planned = within_latency(planner, ruled, threads).planned
        else:
            planned = planner.plan(replace(ruled, start=tuple(points[-1].formats.items()) if points else ()))
        names = {site.key: site.name for site in planned.sites}
        points.append(Point(str(budget), planned.formats(), planned.about(Account), names=names))
    return points


def evaluated(planner: Planner, allocation: Allocation, budget: Budget, point: Point) -> Point:
    """The point with the loss, and the score if there is one, of its lowered network."""
    planned = planner.explain(for_budget(allocation, budget), point.formats)
    program = planner.lower(planned, point.budget).program
    score = None if planner.scoring is None else planner.score(program, planner.scoring.holdout)
    return replace(point, loss=planner.loss(program), score=score)
