"""A measured network, and the compiled ones that are made from it: any budget, a whole frontier, no new measuring."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
from rich.table import Table
from torch import fx
from torch.utils import _pytree as pytree

from hawqfx import pipeline
from hawqfx.allocation.budget import Budget, Limit
from hawqfx.allocation.rules import Order, known_schemes
from hawqfx.errors import HawqfxError
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import FileText, FloatNetwork, Quantizers
from hawqfx.ir.program import Program
from hawqfx.maths.formats import Scheme, format_of
from hawqfx.maths.latency_model import LatencyModel
from hawqfx.pass_manager.base import Observer, Pass
from hawqfx.pass_manager.manager import run
from hawqfx.passes.allocation import Allocation
from hawqfx.passes.bias_correction import BiasCorrection
from hawqfx.passes.learned_rounding import LearnedRounding
from hawqfx.session import report
from hawqfx.session.drop_search import smallest
from hawqfx.session.frontier import Frontier, evaluated, plan_each
from hawqfx.session.latency_search import within_latency
from hawqfx.session.plan import Plan
from hawqfx.session.planner import Candidate, Planner, Refinement, Rival, Scoring, with_float
from hawqfx.session.refine import refined
from hawqfx.session.size_search import within_size
from hawqfx.session.uniform import plan_or_uniform, uniform_formats

if TYPE_CHECKING:
    from hawqfx.export.opsets import Packing


class RuleOptions(TypedDict, total=False):
    """Rules that a choice of formats keeps to besides the budget; see compile()."""

    weight_bits: Sequence[int]
    activation_bits: Sequence[int]
    schemes: Sequence[Scheme]
    fix: Mapping[str, int]
    rule: Order


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
        correction: corrects the biases of a chosen plan, if that is asked for.
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
    correction: BiasCorrection | None = None

    @property
    def planner(self) -> Planner:
        return Planner(self.measured, self.context, self.observers, self.scoring)

    def at(
        self,
        budget: Budget | str,
        *,
        against_uniform: bool = True,
        refine: int | None = None,
        **rules: Unpack[RuleOptions],
    ) -> "Compiled":
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
            HawqfxError: if the rules contradict each other, or a score is missing.
        """
        limits = Budget.parse(budget) if isinstance(budget, str) else budget
        allocation = _ruled(self.allocation, rules)
        if "schemes" in rules:
            self._check_calibrated(allocation.schemes or ())
        if limits.latency is not None:
            allocation = with_float(allocation)  # a float kernel may be faster than the conversions of an integer one
        ready = self._measured_for(limits)
        planner, rounds = ready.planner, self.refine if refine is None else refine

        def found(held: Budget) -> Candidate:
            if held.drop is not None:
                return smallest(planner, held, allocation)
            ruled = replace(allocation, budget=held)
            if held.latency is not None:
                return within_latency(planner, ruled, self.threads)
            candidate = planner.lower(planner.plan(ruled), str(held))

            def improve(start: Candidate) -> Candidate:
                return refined(planner, start, ruled, rounds)

            return plan_or_uniform(planner, candidate, ruled, improve) if against_uniform else improve(candidate)

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
            budgets: these, instead of `points` along `limit`.
            evaluate: number of points, evenly chosen, to lower and run on the calibration data; they are marked as
                measured.

        Raises:
            HawqfxError: if there are fewer than two points, or no such limit.
        """
        if budgets is None and points < 2:
            raise HawqfxError(f"points={points}: a frontier has at least two")
        if limit not in ("size", "weight_bits", "bops", "activation_memory"):
            raise HawqfxError(f"limit={limit!r}: a frontier goes along size, weight_bits, bops or activation_memory")
        if budgets is None:
            ready = self._measured_for(Budget(**{limit: Limit(1.0, relative=True)}))
            amounts = ready.planner.range_of(self.allocation, limit, points)
            parsed = [Budget(**{limit: Limit(amount)}) for amount in amounts]
        else:
            parsed = [Budget.parse(each) if isinstance(each, str) else each for each in budgets]
            ready = self._measured_for(*parsed)
        planner = ready.planner.quiet
        curve = plan_each(planner, self.allocation, parsed)
        for number in {round(k * (len(curve) - 1) / max(1, evaluate - 1)) for k in range(min(evaluate, len(curve)))}:
            curve[number] = evaluated(planner, self.allocation, parsed[number], curve[number])
        return Frontier(limit if budgets is None else "", tuple(curve))

    def uniform(self, weight_bits: int, activation_bits: int = 8) -> "Compiled":
        """The network with one format for all weights and one for all activations, to compare with.

        Raises:
            HawqfxError: if a site was not calibrated in these formats.
        """
        try:
            chosen = uniform_formats(self.measured, format_of(weight_bits), format_of(activation_bits))
        except ValueError as error:
            raise HawqfxError(f"uniform({weight_bits}, {activation_bits}): {error}") from error
        for key, width in chosen.items():
            if not width.is_float and width not in self.measured.facts.get(key, Quantizers).by_format:
                raise HawqfxError(f"{key!r} was not calibrated at {width}: give such bits to compile()")
        return self.lowered(self.planner.uniform(chosen), f"uniform W{weight_bits}A{activation_bits}")

    def lowered(self, planned: Program, budget: str) -> "Compiled":
        """The network with the formats that `planned` knows."""
        return self._compiled(self.planner.lower(planned, budget))

    def _check_calibrated(self, schemes: Sequence[Scheme]) -> None:
        known = (self.measured.facts.get(site.key, Quantizers).by_format for site in self.measured.sites)
        calibrated = {width.scheme for by_format in known for width in by_format}
        if not calibrated & set(schemes):
            raise HawqfxError(f"schemes={tuple(schemes)} were not calibrated: give schemes= to compile()")

    def _compiled(self, candidate: Candidate) -> "Compiled":
        steps = [step for step in (self.learning, self.correction) if step is not None]
        if steps:
            learned = run(steps, candidate.planned, self.context, self.observers)
            program = self.planner.lower(learned, candidate.budget).program
            candidate = replace(candidate, planned=learned, program=program)
        return Compiled(
            self, candidate.planned, candidate.program, candidate.budget, candidate.rival, candidate.scores,
            candidate.refinements,
        )  # fmt: skip

    def _measured_for(self, *budgets: Budget) -> "Session":
        """The session whose program knows what the limits of some budgets are counted by: the text of the file for a
        size and for a drop, which is kept by the smallest file, and the latency model for a latency."""
        steps: list[Pass] = []
        if any(each.size is not None or each.drop is not None for each in budgets):
            steps += [] if self.measured.knows(FileText) else pipeline.weighing(self.target)
        if any(each.latency is not None for each in budgets):
            steps += [] if self.measured.knows(LatencyModel) else pipeline.profiling(self.threads)
        return replace(self, measured=run(steps, self.measured, self.context, self.observers))


def _ruled(allocation: Allocation, rules: RuleOptions) -> Allocation:
    """The allocation with these rules in place of its own."""
    changes: dict[str, Any] = dict(rules)
    for name in ("weight_bits", "activation_bits"):
        if name in changes:
            changes[name] = tuple(sorted(set(changes[name])))
    if "schemes" in rules:
        changes["schemes"] = known_schemes(rules["schemes"])
    if "fix" in rules:
        changes["fix"] = tuple(rules["fix"].items())
    return replace(allocation, **changes)


@dataclass(frozen=True)
class Compiled:
    """A compiled network.

    Args:
        session: the measured network that it was made of.
        planned: the float program with the chosen formats.
        program: the lowered one.
        budget: the text that the plan is for.
        rival: uniform bits within the same limits, if they were tried beside the plan.
        scores: under a budget on `drop`, the metric of the float network and of this one, by the name of the data.
        refinements: the plans that were tried after the first one.
    """

    session: Session
    planned: Program
    program: Program
    budget: str
    rival: Rival | None = None
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    refinements: tuple[Refinement, ...] = ()

    @property
    def model(self) -> fx.GraphModule:
        """The fake-quantized network, called as the model was; gradients pass straight through the quantizers."""
        return self.program.graph

    @property
    def plan(self) -> Plan:
        return Plan.of(self.planned, self.budget)

    def at(
        self,
        budget: Budget | str,
        *,
        against_uniform: bool = True,
        refine: int | None = None,
        **rules: Unpack[RuleOptions],
    ) -> "Compiled":
        """The same network under another budget, or other rules, from the same sensitivities.  See Session.at."""
        return self.session.at(budget, against_uniform=against_uniform, refine=refine, **rules)

    def uniform(self, weight_bits: int, activation_bits: int = 8) -> "Compiled":
        """The same network with one format for all weights and one for all activations, to compare with."""
        return self.session.uniform(weight_bits, activation_bits)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the exported file that belong to weights: packed integers, scales, biases, and float constants."""
        return self.planned.weight_bytes()

    @property
    def file_bytes(self) -> int | None:
        """The size that the plan promises: the most bytes that the exported file has, in the portable packing, and at
        most 1% more than it has; None for a plan without a limit on size, whose file was not weighed."""
        return report.file_bytes(self.planned)

    @property
    def predicted_loss(self) -> float:
        """The sum of the predicted loss increases over the sites."""
        return report.predicted_loss(self.planned)

    def calibration_loss(self) -> tuple[float, float]:
        """The mean loss over the calibration data, of the float network and of the compiled one."""
        float_losses, losses = self.session.planner.losses(self.session.measured, self.program)
        return float_losses.mean, losses.mean

    def export(self, path: str | Path, packing: "Packing" = "portable") -> None:
        """Write the packed integer model as ONNX, whole or not at all; see hawqfx.export.

        Raises:
            ExportError: if the file cannot be made or written, or is above the plan's limit on size, which is for the
                portable packing.
        """
        from hawqfx.export.exporter import export, metadata

        plan = self.plan
        texts = metadata(plan.digest, set(self.planned.schemes().values()), self.session.target, packing)
        size = plan.account.limits.get("size") if plan.account is not None and packing == "portable" else None
        most = math.inf if size is None else size.bound
        example = self.session.context.batches[0]
        export(self.program, example, path, packing, texts, self.session.observers, most)

    def benchmark(self, backends: Sequence[str] = ("ort-cpu",), *, threads: int = 1, rounds: int = 100) -> Table:
        """Latency, throughput, memory and answers beside the float network's, on the first sample of the calibration
        data; see hawqfx.runtime.backends.

        Raises:
            BackendError: if a backend has no such name, or lacks what it needs.
        """
        from hawqfx.runtime.backends import every, table

        batch = self.session.context.batches[0]
        sample = batch.first(1 if self.planned.dynamic_batch else batch.size)
        answer = self.session.measured.run(sample.args, sample.kwargs)
        reference = [leaf.detach().numpy() for leaf in pytree.tree_leaves(answer) if isinstance(leaf, torch.Tensor)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            self.export(path)
            results = every(path, self.model, backends, sample, reference, threads=threads, rounds=rounds)
        return table(results)

    def export_float(self, path: str | Path) -> None:
        """Write the float32 network, with batch-norm folded and else as it was, to compare with.

        Raises:
            ExportError: if the file cannot be made or written.
        """
        from hawqfx.export.exporter import export

        graph = self.planned.about(FloatNetwork).graph
        export(replace(Program(graph), facts=self.planned.facts), self.session.context.batches[0], path)

    def table(self) -> Table:
        """A row per site: kind, shape, mean trace and its standard error, bits, bytes, predicted loss increase."""
        return report.site_table(self.planned, self.budget)

    def summary(self) -> str:
        """The loss and its reason, the table, the cost in bytes and loss, and the nodes in float with their reasons."""
        return report.summary(
            self.planned,
            self.budget,
            self.session.context.samples,
            self.calibration_loss(),
            self.rival,
            self.refinements,
            self.scores,
            self.session.context.loss_reason,
        )
