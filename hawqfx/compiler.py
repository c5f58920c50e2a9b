"""compile(): from a trained network, a budget and calibration data to a Compiled."""

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import fx

from hawqfx import pipeline
from hawqfx.budget import Budget
from hawqfx.capture import Model, capture
from hawqfx.contract import Analysis, Observer
from hawqfx.errors import HawqfxError
from hawqfx.facts import Bits, Cost, LossIncrease, Sensitivity
from hawqfx.observe import progress_bars
from hawqfx.passes.calibration import Calibration
from hawqfx.passes.rounding import Rounding
from hawqfx.pipeline import DEFAULT_METRIC
from hawqfx.plan import Plan
from hawqfx.program import Program, WeightSite
from hawqfx.runner import run
from hawqfx.study import Draw, Loss, Study, cross_entropy, gather, silent

if TYPE_CHECKING:
    from hawqfx.export import Packing


def compile(
    model: Model,
    budget: Budget | str | None,
    data: Iterable[Any],
    *,
    loss: Loss = cross_entropy,
    sensitivity: str | Analysis = DEFAULT_METRIC,
    weight_bits: Sequence[int] = (2, 3, 4, 5, 6, 7, 8),
    activation_bits: Sequence[int] = (4, 6, 8),
    rounding: Literal["compensated", "nearest"] = "compensated",
    keep_float: Sequence[str] = (),
    plan: Plan | str | Path | None = None,
    draw: Draw | None = None,
    samples: int | None = None,
    batch: int | None = None,
    cache: str | Path | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    observers: Sequence[Observer] = (),
    console: Console | None = None,
) -> "Compiled":
    """The best mixed-precision integer model of a given size.

    model: an eval-mode nn.Module, an fx.GraphModule or an ExportedProgram.  It is not changed.
    budget: a Budget or its text, such as "size=12.5%" or "size=100kB, bops=2%"; percentages are of float32.
    data: an iterable of batches, each a tensor, a pair (inputs, target) or a dict of keyword inputs, with or without
        `labels`.  Without targets, labels are sampled from the model's own output distribution.
    loss: a function of (output, target), the mean over the batch; cross-entropy of logits by default.
    sensitivity: how the loss increase is predicted: "hawq-v2", "fisher", "taylor", "measured", "mse" or "hawq-v1", or
        such a pass with its options, as in HawqV2(probes=100).
    weight_bits, activation_bits: widths to choose from, within 2 to 8; fewer bits of activation than 8 are chosen only
        where a limit (bops) asks for it.
    rounding: "compensated" by the layers' inputs, or to the "nearest" as in the paper.
    keep_float: patterns of names of weights whose layers stay in float.
    plan: a plan, or the path of one, to follow; then `budget` is not needed, and no sensitivity is measured.
    draw: a function of (output, torch.Generator) that draws targets from the model's own distribution, for data
        without targets and for "fisher"; labels by softmax of the logits by default.
    samples: take so many samples of the data and no more; a warning says so when there are fewer.
    batch: the most samples to measure at once; by default as many as free memory allows.
    device: where to measure, such as "cuda"; the model must be there, the data is moved.
    cache: a folder where measurements are kept, batch by batch: a run that was killed goes on where it was, and the
        same model is never measured twice.
    console: where progress bars go, if it is a terminal; by default stderr.

    Raises CaptureError, NothingToQuantize, DataError, LossError, DerivativeError, BudgetError, InfeasibleBudget,
    PlanError, CacheError or WorkerError.
    """
    limits = Budget.parse(budget) if isinstance(budget, str) else budget
    given = Plan.read(plan) if plan is not None else None
    if limits is None and given is None:
        raise HawqfxError("give a budget, such as 'size=12.5%', or a plan")
    metric = pipeline.metric(sensitivity)
    if batch is not None and batch < 1:
        raise HawqfxError(f"batch={batch}: at least one sample is measured at a time")
    device = _usable(device)
    batches = tuple(part.to(device) for part in gather(data, samples))
    _check_device(model, device)
    program = capture(model, batches[0])
    with progress_bars(console or Console(stderr=True)) as progress:
        study = Study(batches, loss, seed, device, progress, draw, batch, None if cache is None else Path(cache))
        found = run(pipeline.finding(tuple(keep_float)), program, study, observers)
        if given is None:
            calibration = Calibration(_widths(weight_bits), _widths(activation_bits))
            quantizers = run(pipeline.quantizing(calibration), found, study, observers)
        else:
            quantizers = given.facts_for(found)
        measured = run(pipeline.pricing(Rounding(rounding)), quantizers, study, observers)
        if given is None:
            measured = run(pipeline.measuring(metric), measured, study, observers)
    session = Session(measured, replace(study, progress=silent), tuple(observers))
    if given is not None:
        return session.lowered(measured, given.budget)
    assert limits is not None
    return session.at(limits)


def _usable(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise HawqfxError(f"device={str(device)!r} cannot be used: {error}") from error
    return found


def _check_device(model: Model, device: torch.device) -> None:
    state = model.state_dict if isinstance(model, torch.export.ExportedProgram) else model.state_dict()
    stray = next((tensor.device for tensor in state.values() if tensor.device.type != device.type), None)
    if stray is not None:
        raise HawqfxError(f"the model is on {stray} and device={str(device)!r}: move it with model.to({str(device)!r})")


def _widths(bits: Sequence[int]) -> tuple[int, ...]:
    widths = tuple(sorted(set(bits)))
    if not widths or not all(2 <= width <= 8 for width in widths):
        raise HawqfxError(f"bit widths must be from 2 to 8, not {tuple(bits)}")
    return widths


@dataclass(frozen=True)
class Session:
    """A measured network, from which a Compiled is made for any budget without measuring again.

    measured: the float program with everything learned of it before a budget was known.
    """

    measured: Program
    study: Study
    observers: tuple[Observer, ...]

    def at(self, budget: Budget | str) -> "Compiled":
        """The network under a budget."""
        limits = Budget.parse(budget) if isinstance(budget, str) else budget
        planned = run(pipeline.deciding(limits), self.measured, self.study, self.observers)
        return self.lowered(planned, str(limits))

    def uniform(self, weight_bits: int, activation_bits: int = 8) -> "Compiled":
        """The network with one width for all weights and one for all activations, to compare with."""
        widths = {
            site.key: weight_bits if isinstance(site, WeightSite) else activation_bits for site in self.measured.sites
        }
        planned = self.measured.learn({key: Bits(bits, self._increase(key, bits)) for key, bits in widths.items()})
        return self.lowered(planned, f"uniform W{weight_bits}A{activation_bits}")

    def _increase(self, key: str, bits: int) -> float:
        """What is predicted for a site at a width; NaN where nothing was measured."""
        known = self.measured.facts.has(key, LossIncrease)
        return self.measured.facts.get(key, LossIncrease).by_bits.get(bits, math.nan) if known else math.nan

    def lowered(self, planned: Program, budget: str) -> "Compiled":
        """The network with the bits that `planned` knows."""
        return Compiled(self, planned, run(pipeline.lowering(), planned, self.study, self.observers), budget)


@dataclass(frozen=True)
class Compiled:
    """A compiled network.  planned: the float program with the chosen bits.  program: the lowered one."""

    session: Session
    planned: Program
    program: Program
    budget: str

    @property
    def model(self) -> fx.GraphModule:
        """The fake-quantized network, called as the model was; gradients pass straight through the quantizers."""
        return self.program.graph

    @property
    def plan(self) -> Plan:
        return Plan.of(self.planned, self.budget)

    def at(self, budget: Budget | str) -> "Compiled":
        """The same network under another budget; nothing is measured again."""
        return self.session.at(budget)

    def uniform(self, weight_bits: int, activation_bits: int = 8) -> "Compiled":
        """The same network with one width for all weights and one for all activations, to compare with."""
        return self.session.uniform(weight_bits, activation_bits)

    @property
    def weight_bytes(self) -> int:
        """What the plan promises: bytes of the exported file that belong to weights."""
        costs = (self.planned.facts.get(site.key, Cost).bytes for site in self.planned.weights)
        chosen = self.planned.bits()
        return self.planned.fixed_bytes() + sum(
            by_bits[chosen[site.key]] for site, by_bits in zip(self.planned.weights, costs, strict=True)
        )

    @property
    def predicted_loss(self) -> float:
        """The sum of the predicted loss increases over the sites."""
        return sum(self.planned.facts.get(site.key, Bits).increase for site in self.planned.sites)

    @torch.no_grad()
    def calibration_loss(self) -> tuple[float, float]:
        """The mean loss over the calibration data, of the float network and of the compiled one."""
        totals = []
        for program in (self.session.measured, self.program):
            losses = (
                float(self.session.study.loss_of(program.run(batch.args, batch.kwargs), batch, index)) * batch.size
                for index, batch in enumerate(self.session.study.batches)
            )
            totals.append(sum(losses) / self.session.study.samples)
        return totals[0], totals[1]

    def export(self, path: str | Path, packing: "Packing" = "portable") -> None:
        """Write the packed integer model as ONNX, whole or not at all; see hawqfx.export.  Raises ExportError."""
        from hawqfx import __version__
        from hawqfx.export import export

        metadata = {"hawqfx_version": __version__, "hawqfx_plan": self.plan.digest, "hawqfx_packing": packing}
        export(self.program, self.session.study.batches[0], path, packing, metadata)

    def export_float(self, path: str | Path) -> None:
        """Write the float32 network, with batch-norm folded, to compare with."""
        from hawqfx.export import export

        export(self.session.measured, self.session.study.batches[0], path)

    def table(self) -> Table:
        """Every site: kind, shape, mean trace and its standard error, bits, bytes, predicted loss increase."""
        columns = ("site", "kind", "shape", "mean trace", "+-", "bits", "bytes", "loss increase")
        table = Table(*columns, title=f"budget {self.budget}")
        for site in self.planned.sites:
            bits = self.planned.facts.get(site.key, Bits)
            trace = error = size = "-"
            if self.planned.facts.has(site.key, Sensitivity):
                fact = self.planned.facts.get(site.key, Sensitivity)
                trace, error = f"{fact.curvature:.2e}", f"{fact.stderr:.0e}"
            if self.planned.facts.has(site.key, Cost):
                size = str(self.planned.facts.get(site.key, Cost).bytes[bits.bits])
            shape = "x".join(map(str, site.shape))
            table.add_row(site.key, site.kind, shape, trace, error, str(bits.bits), size, f"{bits.increase:.1e}")
        return table

    def summary(self) -> str:
        """The table as text, what it costs in bytes and loss, and what stayed in float and why."""
        console = Console(file=io.StringIO(), width=110)
        console.print(self.table())
        reference = self.planned.float_bytes()
        float_loss, loss = self.calibration_loss()
        console.print(
            f"weights {self.weight_bytes} bytes, {self.weight_bytes / reference:.2%} of float32's {reference}"
        )
        console.print(
            f"loss on {self.session.study.samples} calibration samples {loss:.4f}, float32 {float_loss:.4f}; "
            f"predicted increase, in the unit of the metric, {self.predicted_loss:.4g}"
        )
        for node, reason in self.planned.left_float.items():
            console.print(f"in float: {node}: {reason}")
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()
