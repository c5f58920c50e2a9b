"""A compiled network: its plan, its model, its files, and what it says of itself."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch
from torch import fx
from torch.utils import _pytree as pytree

from hawqfx import arguments
from hawqfx.allocation.budget import Budget, Limit
from hawqfx.atomic_write import check_writable, scratch_folder, whole_file
from hawqfx.ir.facts import FloatNetwork
from hawqfx.ir.program import Program
from hawqfx.session import report
from hawqfx.session.pins import Pins, of_graph, of_network, stored_codes
from hawqfx.session.plan import Plan
from hawqfx.session.plan_text import html_table
from hawqfx.session.planner import Refinement, Rival
from hawqfx.session.record import Calibrated, Trials, known_facts
from hawqfx.session.rule_options import RuleOptions
from hawqfx.session.saved import Saved

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

    from hawqfx.export.opsets import Packing
    from hawqfx.report.facts import Facts
    from hawqfx.session.session import Session  # which makes this class

log = logging.getLogger(__name__)


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

    session: "Session"
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

    @property
    def _trials(self) -> Trials:
        return Trials(self.rival, self.scores, self.refinements)

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
            self._trials, known_facts(self.planned),
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
        session = self.session
        export(
            self.program, session.example, path, packing, texts, session.observers, most, checked if check else None,
            session.target,
        )  # fmt: skip

    def benchmark(self, backends: Sequence[str] = ("ort-cpu",), *, threads: int = 1, rounds: int = 100) -> "Table":
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

    def table(self) -> "Table":
        """A row per site: kind, shape, mean trace and its standard error, bits, bytes, predicted loss increase."""
        return report.site_table(self.planned, self.budget)

    def summary(self) -> str:
        """The loss and its reason, the table, the cost in bytes and loss, and the nodes in float with their reasons."""
        return report.summary(self.planned, self.budget, self._calibrated(), self._trials, self.checks)

    def report(self, path: str | Path, points: int = 20) -> None:
        """Write a page that shows this network: one HTML file that needs no network, whole or not at all.

        It has the frontier, the bits, sensitivities and noise of every site, the graph, memory, and latencies where
        they are known; what is not known it leaves out and says so.

        Args:
            path: of the file.
            points: budgets on the frontier, at least two.

        Raises:
            UsageError: if there are fewer than two points.
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
            ready = session.measured_for(Budget(**{limit: Limit(1.0, relative=True)}))
            frontier = ready.frontier(points, limit)
            curve = curve_of(frontier, ready.planner.quiet, session.allocation, self.planned)
        calibrated, loaded = self._calibrated(), self.calibrated is not None
        summary = report.summary(self.planned, self.budget, calibrated, self._trials, self.checks)
        return facts_of(
            self.planned, self.program, self.plan, session.context, calibrated, self._trials, curve, session.target,
            summary, loaded,
        )  # fmt: skip

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
