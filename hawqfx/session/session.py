"""A measured network, and the compiled ones that are made from it: any budget, a whole frontier, no new measuring."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
from rich.table import Table
from torch import fx
from torch.utils import _pytree as pytree

from hawqfx import arguments, pipeline
from hawqfx.allocation.budget import Budget, Limit
from hawqfx.allocation.rules import Order, known_schemes
from hawqfx.atomic_write import check_writable, scratch_folder, whole_file
from hawqfx.errors import HawqfxError
from hawqfx.frontend.context import Context
from hawqfx.frontend.data import Batch
from hawqfx.ir.facts import FileText, FloatNetwork, LossIncrease, Quantizers
from hawqfx.ir.program import Program
from hawqfx.maths.formats import Scheme, format_of
from hawqfx.maths.latency_model import LatencyModel
from hawqfx.pass_manager.base import Observer, Pass
from hawqfx.pass_manager.manager import run
from hawqfx.passes.allocation import Allocation
from hawqfx.passes.learned_rounding import LearnedRounding
from hawqfx.session import report
from hawqfx.session.drop_search import smallest
from hawqfx.session.frontier import Frontier, checked, evaluated, plan_each
from hawqfx.session.latency_search import within_latency
from hawqfx.session.pins import Pins, of_graph, of_network, stored_codes
from hawqfx.session.plan import Plan
from hawqfx.session.plan_text import html_table
from hawqfx.session.planner import Candidate, Planner, Refinement, Rival, Scoring, for_budget
from hawqfx.session.record import Calibrated, Trials, known_facts
from hawqfx.session.refine import refined
from hawqfx.session.saved import Saved
from hawqfx.session.size_search import within_size
from hawqfx.session.uniform import calibrated_uniform, plan_or_uniform

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from hawqfx.export.opsets import Packing
    from hawqfx.report.facts import Facts


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
        limits = Budget.of(budget)
        self._require_measured()
        allocation = _ruled(self.allocation, rules)
        if "schemes" in rules:
            self._check_calibrated(allocation.schemes or ())
        ready = self._measured_for(limits)
        planner, rounds = ready.planner, self.refine if refine is None else refine

        def found(held: Budget) -> Candidate:
            if held.drop is not None:
                return smallest(planner, held, allocation)
            ruled = for_budget(allocation, held)
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
            budgets: these, instead of `points` along `limit`; the plan of one on latency is exported and timed.
            evaluate: number of points, evenly chosen, to lower and run on the calibration data; they are marked as
                measured.

        Raises:
            HawqfxError: if there are fewer than two points, no such limit, or a budget on drop.
            InfeasibleBudget: if no choice keeps one of the budgets.
        """
        parsed = checked(points, limit, budgets, evaluate)
        self._require_measured()
        if parsed is None:
            ready = self._measured_for(Budget(**{limit: Limit(1.0, relative=True)}))
            amounts = ready.planner.range_of(self.allocation, limit, points)
            parsed = [Budget(**{limit: Limit(amount)}) for amount in amounts]
        else:
            ready = self._measured_for(*parsed)
        curve = plan_each(ready.planner.quiet, self.allocation, parsed, self.threads)
        for number in {round(k * (len(curve) - 1) / max(1, evaluate - 1)) for k in range(min(evaluate, len(curve)))}:
            curve[number] = evaluated(ready.planner.quiet, self.allocation, parsed[number], curve[number])
        return Frontier(limit if budgets is None else "", tuple(curve))

    def uniform(self, weight_bits: int, activation_bits: int = 8) -> "Compiled":
        """The network with one format for all weights and one for all activations, to compare with; weights that were
        calibrated in blocks alone take the longest, and activations are in float then.

        Raises:
            HawqfxError: if a site was not calibrated in these formats.
        """
        try:
            chosen = calibrated_uniform(self.measured, format_of(weight_bits), format_of(activation_bits))
        except ValueError as error:
            raise HawqfxError(f"uniform({weight_bits}, {activation_bits}): {error}") from error
        self._require_measured()
        for key, width in chosen.items():
            if not width.is_float and width not in self.measured.facts.get(key, Quantizers).by_format:
                raise HawqfxError(f"{key!r} was not calibrated at {width}: give such bits to compile()")
        return self.lowered(self.planner.given(chosen), f"uniform W{weight_bits}A{activation_bits}")

    def lowered(self, planned: Program, budget: str) -> "Compiled":
        """The network with the formats that `planned` knows."""
        return self._compiled(self.planner.lower(planned, budget))

    def _require_measured(self) -> None:
        """Raises HawqfxError if the network follows a plan: then nothing is known of other formats."""
        if not all(self.measured.facts.has(site.key, LossIncrease) for site in self.measured.sites):
            raise HawqfxError(
                "this network follows a plan, and no other formats were calibrated or measured: compile() the model "
                "with a budget for other plans"
            )

    def _check_calibrated(self, schemes: Sequence[Scheme]) -> None:
        known = (self.measured.facts.get(site.key, Quantizers).by_format for site in self.measured.sites)
        calibrated = {width.scheme for by_format in known for width in by_format}
        if not calibrated & set(schemes):
            raise HawqfxError(f"schemes={tuple(schemes)} were not calibrated: give schemes= to compile()")

    def _compiled(self, candidate: Candidate) -> "Compiled":
        if self.learning is not None:
            learned = run([self.learning], candidate.planned, self.context, self.observers)
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
    unknown = rules.keys() - RuleOptions.__annotations__
    if unknown:
        raise HawqfxError(f"{', '.join(sorted(unknown))}: the rules are {', '.join(RuleOptions.__annotations__)}")
    changes: dict[str, Any] = dict(rules)
    for name in ("weight_bits", "activation_bits"):
        if name in changes:
            changes[name] = arguments.bits(name, changes[name])
    if "schemes" in rules:
        changes["schemes"] = known_schemes(rules["schemes"])
    if "fix" in rules:
        changes["fix"] = arguments.fixed(rules["fix"])
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
        calibrated: the data and the losses there; None: those of the session.
        pins: what the plan was made with; None: the session's data and the codes.
        checks: what was found in the files that were exported, by their names.
    """

    session: Session
    planned: Program
    program: Program
    budget: str
    rival: Rival | None = None
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    refinements: tuple[Refinement, ...] = ()
    calibrated: Calibrated | None = None
    pins: Pins | None = None
    checks: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def model(self) -> fx.GraphModule:
        """The fake-quantized network, called as the model was; gradients pass straight through the quantizers."""
        return self.program.graph

    @property
    def plan(self) -> Plan:
        pins = self.pins or Pins.of(self.planned, self.session.context.batches)
        return Plan.of(self.planned, self.budget, pins)

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
        return self._calibrated().losses

    def _calibrated(self) -> Calibrated:
        """The data and the losses there, which are computed where they are not known."""
        if self.calibrated is not None:
            return self.calibrated
        context, scoring = self.session.context, self.session.scoring
        float_losses, losses = self.session.planner.losses(self.session.measured, self.program)
        held = 0 if scoring is None else sum(batch.size for batch in scoring.holdout)
        return Calibrated(context.samples, held, (float_losses.mean, losses.mean), context.loss_reason)

    def save(self, path: str | Path) -> None:
        """Write plan, codes and ranges in one file, whole or not at all, from which hawqfx.load() makes this network
        again.  The first two samples of the calibration inputs are in it, as an example to run the model on; all of
        the first batch, where the model takes batches of one size.

        Raises:
            ExportError: if the file cannot be written.
        """
        check_writable(Path(path))
        Saved(
            self.plan, stored_codes(self.planned), self.session.example, self.session.keep_float, self.session.target,
            of_graph(self.planned), of_network(self.program), self._calibrated(),
            Trials(self.rival, self.scores, self.refinements), known_facts(self.planned),
        ).write(Path(path))  # fmt: skip

    def export(self, path: str | Path, packing: "Packing" = "portable", *, check: bool = True) -> None:
        """Write the packed integer model as ONNX, whole or not at all; see hawqfx.export.

        Args:
            path: of the file.
            packing: "portable" loads in onnxruntime 1.20 and later, "native" in 1.24 and later.
            check: run the file in onnxruntime on the first batch of the calibration data before it takes its place, and
                refuse it if it computes anything else than the graph; the summary then says what was found.

        Raises:
            ExportError: if the file cannot be made or written, is above the plan's limit on size, which is for the
                portable packing, or does not compute what the graph computes.
        """
        from hawqfx.export.exporter import export, metadata

        def checked(written: Path) -> None:
            from hawqfx.runtime.check import check as check_file

            batch = self.session.context.batches[0]
            found = check_file(self.program, self.session.measured, written, batch)
            self.checks[Path(path).name] = str(found)
            if found.saturated is not None:
                log.warning("%s: %s", path, found)

        plan = self.plan
        texts = metadata(plan.digest, set(self.planned.schemes().values()), self.session.target, packing)
        size = plan.account.limits.get("size") if plan.account is not None and packing == "portable" else None
        most = math.inf if size is None else size.bound
        example, observers = self.session.example, self.session.observers
        export(self.program, example, path, packing, texts, observers, most, checked if check else None)

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
        with scratch_folder() as folder:
            path = folder / "model.onnx"
            self.export(path, check=False)
            results = every(path, self.model, backends, sample, reference, threads=threads, rounds=rounds)
        return table(results)

    def export_float(self, path: str | Path) -> None:
        """Write the float32 network, with batch-norm folded and else as it was, to compare with.

        Raises:
            ExportError: if the file cannot be made or written.
        """
        from hawqfx.export.exporter import export

        graph = self.planned.about(FloatNetwork).graph
        export(self.planned.with_graph(graph), self.session.example, path)

    def table(self) -> Table:
        """A row per site: kind, shape, mean trace and its standard error, bits, bytes, predicted loss increase."""
        return report.site_table(self.planned, self.budget)

    def summary(self) -> str:
        """The loss and its reason, the table, the cost in bytes and loss, and the nodes in float with their reasons."""
        trials = Trials(self.rival, self.scores, self.refinements)
        return report.summary(self.planned, self.budget, self._calibrated(), trials, self.checks)

    def report(self, path: str | Path, points: int = 20) -> None:
        """Write a page that shows this network: one HTML file that needs no network, whole or not at all.

        It has the frontier, the bits, sensitivities and noise of every site, the graph, memory, and latencies where
        they are known; what is not known it leaves out and says so.

        Args:
            path: of the file.
            points: budgets on the frontier, at least two.

        Raises:
            HawqfxError: if there are fewer than two points.
            ExportError: if the file cannot be written.
        """
        from hawqfx.report.page import page

        check_writable(Path(path))
        arguments.whole("points", points, 2, "a frontier has at least two")
        with whole_file(Path(path)) as temporary:
            temporary.write_text(page(self._facts(points)), encoding="utf-8")

    def _facts(self, points: int) -> "Facts":
        """What the page shows, with so many budgets on its frontier."""
        from hawqfx.session.page import can_plan, curve_of, facts_of, limit_of

        session, curve = self.session, None
        if can_plan(session.measured):
            limit = limit_of(self.planned)
            ready = session._measured_for(Budget(**{limit: Limit(1.0, relative=True)}))
            frontier = ready.frontier(points, limit)
            curve = curve_of(frontier, ready.planner.quiet, session.allocation, self.planned)
        trials = Trials(self.rival, self.scores, self.refinements)
        calibrated = self._calibrated()
        summary = report.summary(self.planned, self.budget, calibrated, trials, self.checks)
        return facts_of(
            self.planned,
            self.program,
            self.plan,
            session.context,
            calibrated,
            trials,
            curve,
            session.target,
            summary,
            loaded=self.calibrated is not None,
        )

    def __repr__(self) -> str:
        bits = f"{len(self.planned.weights)} weights, {len(self.planned.activations)} activations"
        return f"<Compiled {self.budget}: {bits}, {self.weight_bytes:,} bytes of weights>"

    def plot(self, axes: "Axes | None" = None) -> "Axes":
        """The bits of every weight as a figure, in the order of the network, each as wide as its share of the elements.

        Args:
            axes: of matplotlib, to draw on; None: those of a new figure.

        Raises:
            HawqfxError: if matplotlib is not installed.
        """
        from hawqfx.session import figures

        axes = figures.axes_or_new(axes, (10, 3.5))
        formats = self.planned.formats()
        figures.strip(axes, self.planned.weights, [formats[site.key] for site in self.planned.weights])
        return axes

    def _repr_html_(self) -> str:
        """A short table for notebooks."""
        from hawqfx.session.page import figures

        rows = [
            (figure.label, f"{figure.value} {figure.note}".strip()) for figure in figures(self.planned, self.budget)
        ]
        return html_table(("", "compiled network"), rows)
