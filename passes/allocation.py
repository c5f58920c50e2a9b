"""One number format per site, by integer programming: the least predicted loss increase within the budget.

The integer program and its rules are in hawqfx.allocation: task.py, rules.py, constraints.py, and solver/.
"""

import logging
from dataclasses import dataclass
from typing import ClassVar

from hawqfx.allocation.budget import Budget
from hawqfx.allocation.explain import explained, refusal
from hawqfx.allocation.rules import Order, Rules, default_schemes
from hawqfx.allocation.search_space import NO_FORMATS, Formats
from hawqfx.allocation.solver.problem import Infeasible
from hawqfx.allocation.task import AllocationTask, Effort
from hawqfx.errors import UsageError
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import Account, ByteCost, ChosenFormat, ErrorProducts, FileText, LossIncrease
from hawqfx.ir.program import Program
from hawqfx.maths.formats import Format, Scheme
from hawqfx.maths.latency_model import LatencyModel
from hawqfx.pass_manager.base import Analysis, Kind, option

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Allocation(Analysis):
    """Chooses the format of every site; see the options at their fields."""

    budget: Budget = option(doc="the limits that the plan keeps")
    weight_bits: tuple[int, ...] | None = option(None, "bits that weights may have, 32 being float; None: as measured")
    activation_bits: tuple[int, ...] | None = option(None, "bits that activations may have; None: as measured")
    schemes: tuple[Scheme, ...] | None = option(
        None, "schemes of layers; None: all where latency or the memory of weights is limited, else static alone"
    )
    fix: tuple[tuple[str, int], ...] = option((), "pairs of a pattern of site names and the bits of those sites")
    rule: Order = option("exact", "exact, or hawq-v2: bits in the order of the average trace")
    interactions: int = option(0, "pairs of weights, the strongest, whose errors enter together")
    start: tuple[tuple[str, Format], ...] = option((), "a plan to begin the search from")
    gap: float = option(0.0, "accept a plan proven to be so near to the least loss, relatively")
    seconds: float = option(60.0, "time after which the solver stops with its best plan, and says so")
    gives: ClassVar[tuple[Kind, ...]] = (ChosenFormat, Account)

    def __post_init__(self) -> None:
        if self.rule not in ("exact", "hawq-v2"):
            raise UsageError(f"rule={self.rule!r}: must be 'exact' or 'hawq-v2'")

    @property
    def needs(self) -> tuple[Kind, ...]:  # type: ignore[override]
        """A limit on size needs the text of the file, one on latency the latency model; interactions need products of
        errors."""
        size = (FileText,) if self.budget.size is not None else ()
        latency = (LatencyModel,) if self.budget.latency is not None else ()
        return (LossIncrease, ByteCost, *size, *latency, *((ErrorProducts,) if self.interactions else ()))

    @property
    def rules(self) -> Rules:
        """The formats that the options allow."""
        schemes = default_schemes(self.budget) if self.schemes is None else self.schemes
        return Rules(self.weight_bits, self.activation_bits, schemes, self.fix)

    def task(self, program: Program, also: Formats = NO_FORMATS) -> AllocationTask:
        """The integer program; its space holds the formats `also`, be they worth choosing or not."""
        return AllocationTask.of(program, self.budget, self.rules, self.rule, self.interactions, also)

    def learn(self, program: Program, context: Context) -> Program:
        task, effort = self.task(program), Effort(self.start, self.gap, self.seconds)
        answer = task.solve(effort)
        if isinstance(answer, Infeasible):
            raise refusal(task, answer, effort)
        if not answer.optimal:
            log.warning(
                "the allocation was stopped: its predicted loss is %.6g, and no plan has less than %.6g",
                answer.loss, answer.bound,
            )  # fmt: skip
        return explained(task, task.space.chosen(answer.picks), answer)
