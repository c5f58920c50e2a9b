"""A measured network, from which the compiled ones are made: any budget, a whole frontier, no new measuring."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Unpack

from hawqfx import pipeline
from hawqfx.allocation.budget import Budget, Limit
from hawqfx.errors import UsageError
from hawqfx.frontend.context import Context
from hawqfx.frontend.data import Batch
from hawqfx.ir.facts import FileText, LossIncrease, Quantizers
from hawqfx.ir.program import Program
from hawqfx.maths.formats import Scheme, format_of
from hawqfx.pass_manager.base import Observer, Pass
from hawqfx.pass_manager.manager import run
from hawqfx.passes.allocation import Allocation
from hawqfx.passes.learned_rounding import LearnedRounding
from hawqfx.session.compiled import Compiled
from hawqfx.session.drop_search import smallest
from hawqfx.session.frontier import Frontier, checked, evaluated, plan_each, rounded_up
from hawqfx.session.latency_search import timing, within_latency
from hawqfx.session.planner import Candidate, Planner, Scoring, for_budget
from hawqfx.session.refine import refined
from hawqfx.session.rule_options import RuleOptions, ruled
from hawqfx.session.size_search import within_size
from hawqfx.session.uniform import calibrated_uniform, plan_or_uniform


@dataclass(frozen=True)
class Session:
    """A measured network, from which a Compiled is made for any budget without measuring again.

    Args:
        measured: the float program with all facts that no budget changes.
        context: the calibration data and the loss.
        observers: of the passes that run.
        allocation: the rules that a choice of formats keeps to, whatever the budget.
        scoring: the judge of a budget on `drop`.
        threads: of the runs that a budget on latency is for.
        target: the processors that files are made for.
        refine: times that a plan is measured where it stands and solved again.
        learning: fits the codes of a chosen plan, if codes are learned.
        finish: the passes between the choice of formats and lowering.
        keep_float: patterns of names of weights whose layers stay in float.
    """

    measured: Program
    context: Context
    observers: tuple[Observer, ...]
    allocation: Allocation = field(default_factory=lambda: Allocation(Budget()))
    scoring: Scoring | None = None
    threads: int = 1
    target: str = "any"
    refine: int = 0
    learning: LearnedRounding | None = None
    finish: Sequence[Pass] = ()
    keep_float: tuple[str, ...] = ()

    @property
    def example(self) -> Batch:
        """Inputs to run the model on: two samples, where the graph takes any number."""
        batch = self.context.batches[0]
        return batch.first(2) if self.measured.dynamic_batch else batch

    @property
    def planner(self) -> Planner:
        return Planner(self.measured, self.context, self.observers, self.scoring, self.finish)

    def at(
        self,
        budget: Budget | str,
        *,
        against_uniform: bool = True,
        refine: int | None = None,
        **rules: Unpack[RuleOptions],
    ) -> Compiled:
        """The network under a budget.

        Args:
            budget: a Budget or its text.
            against_uniform: try uniform bits within the same budget beside the plan, and return them with a warning if
                they lose less on the calibration data by more than two standard errors of the paired differences.
            refine: times that the plan is measured where it stands and solved again, in place of those given to
                compile(); budgets on latency or drop do without.
            rules: those of compile(), in place of the rules given there.

        Raises:
            BudgetError: if the text is no budget.
            InfeasibleBudget: if no choice keeps it.
            UsageError: if the rules contradict each other, or a score is missing.
        """
        limits = Budget.of(budget)
        self._require_measured()
        allocation = ruled(self.allocation, rules)
        if "schemes" in rules:
            self._check_calibrated(allocation.schemes or ())
        ready = self.measured_for(limits)
        planner, rounds = ready.planner, self.refine if refine is None else refine

        def found(held: Budget) -> Candidate:
            if held.drop is not None:
                return smallest(planner, held, allocation)
            limited = for_budget(allocation, held)
            if held.latency is not None:
                return within_latency(planner, limited, self.threads)
            candidate = planner.lower(planner.plan(limited), str(held))

            def improve(start: Candidate) -> Candidate:
                return refined(planner, start, limited, rounds)

            return plan_or_uniform(planner, candidate, limited, improve) if against_uniform else improve(candidate)

        if limits.size is not None or limits.drop is not None:
            return ready._compiled(within_size(planner, limits, found, self.target))
        return ready._compiled(found(limits))

    def frontier(
        self, points: int = 30, limit: str = "size", budgets: Sequence[Budget | str] | None = None, evaluate: int = 0
    ) -> Frontier:
        """The whole curve of a limit against the predicted loss, from the least that the limit can be to where more
        brings nothing.

        Args:
            points: number of budgets, a constant factor apart.
            limit: size, weight_bits, bops or activation_memory.
            budgets: these, instead of `points` along `limit`; the plan of one on latency is exported and timed.
            evaluate: number of points, evenly chosen, to lower and run on the calibration data; they are marked as
                measured.

        Raises:
            UsageError: if there are fewer than two points, no such limit, or a budget on drop.
            InfeasibleBudget: if no choice keeps one of the budgets.
        """
        parsed = checked(points, limit, budgets, evaluate)
        self._require_measured()
        if parsed is None:
            ready = self.measured_for(Budget(**{limit: Limit(1.0, relative=True)}))
            amounts = ready.planner.range_of(self.allocation, limit, points)
            parsed = [Budget(**{limit: Limit(rounded_up(amount))}) for amount in amounts]
        else:
            ready = self.measured_for(*parsed)
        curve = plan_each(ready.planner.quiet, self.allocation, parsed, self.threads)
        for number in {round(k * (len(curve) - 1) / max(1, evaluate - 1)) for k in range(min(evaluate, len(curve)))}:
            curve[number] = evaluated(ready.planner.quiet, self.allocation, parsed[number], curve[number])
        return Frontier(limit if budgets is None else "", tuple(curve))

    def uniform(self, weight_bits: int, activation_bits: int = 8) -> Compiled:
        """The network with one format for all weights and one for all activations, to compare with; weights that were
        calibrated in blocks alone take the longest, and activations are in float then.

        Raises:
            UsageError: if a site was not calibrated in these formats.
        """
        try:
            chosen = calibrated_uniform(self.measured, format_of(weight_bits), format_of(activation_bits))
        except ValueError as error:
            raise UsageError(f"uniform({weight_bits}, {activation_bits}): {error}") from error
        self._require_measured()
        for site in self.measured.sites:
            width = chosen[site.key]
            if not width.is_float and width not in self.measured.facts.get(site.key, Quantizers).by_format:
                raise UsageError(f"{site.name!r} was not calibrated at {width}: give such bits to compile()")
        return self.lowered(self.planner.given(chosen), f"uniform W{weight_bits}A{activation_bits}")

    def lowered(self, planned: Program, budget: str) -> Compiled:
        """The network with the formats that `planned` knows."""
        return self._compiled(self.planner.lower(planned, budget))

    def _require_measured(self) -> None:
        """Raises UsageError if the network follows a plan: then nothing is known of other formats."""
        if not all(self.measured.facts.has(site.key, LossIncrease) for site in self.measured.sites):
            raise UsageError(
                "this network follows a plan, and no other formats were calibrated or measured: compile() the model "
                "with a budget for other plans"
            )

    def _check_calibrated(self, schemes: Sequence[Scheme]) -> None:
        known = (self.measured.facts.get(site.key, Quantizers).by_format for site in self.measured.sites)
        calibrated = {width.scheme for by_format in known for width in by_format}
        if not calibrated & set(schemes):
            raise UsageError(f"schemes={tuple(schemes)} were not calibrated: give schemes= to compile()")

    def _compiled(self, candidate: Candidate) -> Compiled:
        if self.learning is not None:
            learned = run([self.learning], candidate.planned, self.context, self.observers)
            program = self.planner.lower(learned, candidate.budget).program
            candidate = replace(candidate, planned=learned, program=program)
        return Compiled(
            self, candidate.planned, candidate.program, candidate.budget, candidate.rival, candidate.scores,
            candidate.refinements,
        )  # fmt: skip

    def measured_for(self, *budgets: Budget) -> "Session":
        """The session whose program knows what the limits of some budgets are counted by.

        Args:
            budgets: a limit on size or on drop, which is kept by the smallest file, needs the text of the file, and one
                on latency the latency model at its shape.

        Returns:
            The session with these facts, which are made where they are not known.
        """
        steps: list[Pass] = []
        if any(each.size is not None or each.drop is not None for each in budgets):
            steps += [] if self.measured.knows(FileText) else pipeline.weighing(self.target)
        latency = next((each.latency for each in budgets if each.latency is not None), None)
        if latency is not None:  # before a file is weighed, since a shape may be refused
            steps = [*timing(self.measured, self.context, latency, self.threads), *steps]
        return replace(self, measured=run(steps, self.measured, self.context, self.observers))
