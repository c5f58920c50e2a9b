"""A measured network, and the compiled ones that are made from it: any budget, a whole frontier, no new measuring."""

import io
import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
from rich.console import Console
from rich.table import Table
from torch import fx
from torch.utils import _pytree as pytree

from hawqfx import pipeline
from hawqfx.allocation.budget import Budget, Limit
from hawqfx.errors import HawqfxError, InfeasibleBudget
from hawqfx.frontend.context import Batch, Context
from hawqfx.ir.facts import ByteCost, ChosenFormat, LossIncrease, Sensitivity
from hawqfx.ir.program import Program, Site, WeightSite
from hawqfx.maths.formats import Scheme, described
from hawqfx.maths.pricing import FLOAT_BITS
from hawqfx.pass_manager.base import Observer
from hawqfx.pass_manager.manager import run
from hawqfx.passes.allocation import Allocation, Rule
from hawqfx.session.frontier import Frontier, Point
from hawqfx.session.plan import Plan

if TYPE_CHECKING:
    from hawqfx.export.exporter import Packing

log = logging.getLogger(__name__)

Score = Callable[[Any, Any], float | torch.Tensor]
NOISE = 0.02  # of a latency, between one run of a benchmark and the next
TRIES = 6  # plans that are run for a budget on latency
STEPS = 64  # budgets between the least and the greatest that a search for `drop` may try


@dataclass(frozen=True)
class Scoring:
    """A metric of (output, target), the mean over a batch, higher being better, and the data held out of calibration
    that a drop is validated on."""

    metric: Score
    holdout: tuple[Batch, ...]


class Rules(TypedDict, total=False):
    """What a choice of bits keeps to besides the budget; see compile()."""

    weight_bits: Sequence[int]
    activation_bits: Sequence[int]
    schemes: Sequence[Scheme]
    fix: Mapping[str, int]
    rule: Rule


@dataclass(frozen=True)
class Session:
    """A measured network, from which a Compiled is made for any budget without measuring again.

    measured: the float program with everything learned of it before a budget was known.  allocation: the rules that a
    choice of bits keeps to, whatever the budget.  scoring: what a budget on `drop` is judged by.  threads: of the runs
    that a budget on latency is for.
    """

    measured: Program
    context: Context
    observers: tuple[Observer, ...]
    allocation: Allocation = field(default_factory=lambda: Allocation(Budget()))
    scoring: Scoring | None = None
    threads: int = 1
    target: str = "any"

    def at(self, budget: Budget | str, *, against_uniform: bool = True, **rules: Unpack[Rules]) -> "Compiled":
        """The network under a budget; `rules` are those of compile(), in place of what was given there.

        against_uniform: uniform bits within the same budget are tried beside the plan, and returned with a warning if
        the loss of the calibration data says that they are better.  Raises BudgetError, InfeasibleBudget, HawqfxError.
        """
        limits = Budget.parse(budget) if isinstance(budget, str) else budget
        allocation = _ruled(self.allocation, rules)
        if limits.latency is not None or limits.drop is not None:
            allocation = _with_float(allocation)
        ready = self._timed() if limits.latency is not None else self
        if limits.drop is not None:
            return ready._smallest(limits, allocation)
        allocation = replace(allocation, budget=limits)
        if limits.latency is not None:
            return ready._in_time(allocation)
        compiled = ready.lowered(ready._planned(allocation), str(limits))
        return ready._or_uniform(compiled, allocation) if against_uniform else compiled

    def frontier(
        self, points: int = 30, limit: str = "size", budgets: Sequence[Budget | str] | None = None, evaluate: int = 0
    ) -> Frontier:
        """The whole curve of a limit against the predicted loss, from the least that the limit can be to where more
        brings nothing, each solve begun from the plan before.

        points: how many budgets, a constant factor apart.  budgets: those, instead.  evaluate: how many of the points,
        evenly chosen, to lower and run on the calibration data; they are marked as measured.
        """
        if budgets is None and points < 2:
            raise HawqfxError(f"points={points}: a frontier has at least two")
        if limit not in ("size", "weight_bits", "bops", "activation_memory"):
            raise HawqfxError(f"limit={limit!r}: a frontier goes along size, weight_bits, bops or activation_memory")
        if budgets is None:
            parsed = [Budget(**{limit: Limit(amount)}) for amount in self._range(self.allocation, limit, points)]
        else:
            parsed = [Budget.parse(each) if isinstance(each, str) else each for each in budgets]
        ready = (self._timed() if any(each.latency is not None for each in parsed) else self)._quiet
        found: list[Point] = []
        for budget in parsed:
            start = found[-1].bits if found else {}
            planned = ready._planned(replace(ready.allocation, budget=budget, start=tuple(start.items())))
            assert planned.account is not None
            found.append(Point(str(budget), planned.bits(), planned.account))
        chosen = {round(k * (len(found) - 1) / max(1, evaluate - 1)) for k in range(min(evaluate, len(found)))}
        for number in chosen:
            compiled = ready.lowered(ready._given(found[number].bits, parsed[number]), found[number].budget)
            score = None if self.scoring is None else ready._score(compiled.program, self.scoring.holdout)
            found[number] = replace(found[number], loss=compiled.calibration_loss()[1], score=score)
        return Frontier(limit if budgets is None else "", tuple(found))

    def uniform(self, weight_bits: int, activation_bits: int = 8) -> "Compiled":
        """The network with one width for all weights and one for all activations, to compare with."""
        widths = self._uniform_bits(weight_bits, activation_bits)
        planned = self.measured.learn(
            {key: ChosenFormat(bits, self._increase(key, bits)) for key, bits in widths.items()}
        )
        return self.lowered(planned, f"uniform W{weight_bits}A{activation_bits}")

    def _uniform_bits(self, weight_bits: int, activation_bits: int) -> dict[str, int]:
        return {
            site.key: weight_bits if isinstance(site, WeightSite) else activation_bits for site in self.measured.sites
        }

    def _increase(self, key: str, bits: int) -> float:
        """What is predicted for a site at a width; NaN where nothing was measured."""
        if bits == FLOAT_BITS:
            return 0.0
        known = self.measured.facts.has(key, LossIncrease)
        return self.measured.facts.get(key, LossIncrease).by_bits.get(bits, math.nan) if known else math.nan

    def lowered(self, planned: Program, budget: str) -> "Compiled":
        """The network with the bits that `planned` knows."""
        return Compiled(self, planned, run(pipeline.lowering(), planned, self.context, self.observers), budget)

    @property
    def _quiet(self) -> "Session":
        """For plans that are only tried."""
        return replace(self, observers=())

    def _planned(self, allocation: Allocation) -> Program:
        return run(pipeline.deciding(allocation), self.measured, self.context, self.observers)

    def _given(self, bits: Mapping[str, int], budget: Budget) -> Program:
        return replace(self.allocation, budget=budget).given(self.measured, bits)

    def _timed(self) -> "Session":
        """The session with the latency of its parts measured."""
        if self.measured.latency_model is not None:
            return self
        from hawqfx.latency.profiler import measure

        table = measure(self.measured, self.context.batches[0], threads=self.threads, progress=self.context.progress)
        return replace(self, measured=replace(self.measured, latency_model=table))

    def _in_time(self, allocation: Allocation) -> "Compiled":
        """The plan for a latency that the exported network keeps when it is run: where it does not, because the solver
        likes what is predicted too fast, the prediction is held to less; and where no prediction is fast enough, the
        network that is predicted to be the fastest is run.  Raises InfeasibleBudget."""
        from hawqfx.latency.profiler import whole_networks

        size = 1 if self.measured.dynamic_batch else self.context.batches[0].size
        example, limits = self.context.batches[0].first(size), allocation.budget
        limit, table = limits.latency, self.measured.latency_model
        assert limit is not None
        assert table is not None
        most = limit.of(table.seconds(dict.fromkeys((site.key for site in self.measured.sites), FLOAT_BITS)))
        wanted, predicted, seconds = most, math.nan, math.inf
        fastest = False
        for _ in range(TRIES):
            held = replace(allocation, budget=replace(limits, latency=Limit(wanted)))
            try:
                planned = self._quiet._planned(held)
            except InfeasibleBudget as error:
                if error.limit != "latency":
                    raise
                fastest, wanted = True, error.least * (1 + 1e-9)
                continue
            compiled = self._quiet.lowered(planned, str(limits))
            predicted = table.seconds(planned.bits())
            (seconds,) = whole_networks([compiled.program], example, self.threads)
            if seconds <= (1 - NOISE) * most:
                assert planned.account is not None
                use = replace(planned.account.limits["latency"], bound=most, measured=seconds)
                account = replace(planned.account, limits={**planned.account.limits, "latency": use})
                return self.lowered(replace(planned, account=account), str(limits))
            if fastest:
                break
            wanted *= (1 - NOISE) * most / seconds
        which = "the fastest network" if fastest else "a network"
        raise InfeasibleBudget(
            f"latency={limit} cannot be met: {which}, predicted to take {1e3 * predicted:.4g} ms, was measured at "
            f"{1e3 * seconds:.4g} ms", "latency", seconds,
        )  # fmt: skip

    def _or_uniform(self, compiled: "Compiled", allocation: Allocation) -> "Compiled":
        """Uniform bits within the same limits if they lose less on the calibration data, else the plan."""
        uniform = self._best_uniform(allocation)
        if uniform is None or uniform == compiled.planned.bits():
            return compiled
        rival = self._quiet.lowered(allocation.given(self.measured, uniform), str(allocation.budget))
        (_, loss), (_, other) = compiled.calibration_loss(), rival.calibration_loss()
        if loss <= other:
            return compiled
        widths = {kind: {uniform[site.key] for site in sites} for kind, sites in self._by_kind().items()}
        log.warning(
            "uniform bits (weights %s, activations %s) keep the budget %s too and lose less on the calibration data, "
            "%.4g against %.4g: they are returned; more calibration data or probes may tell the sites apart",
            *(_listed(widths[kind]) for kind in ("weights", "activations")), allocation.budget, other, loss,
        )  # fmt: skip
        return self.lowered(rival.planned, rival.budget)

    def _by_kind(self) -> dict[str, Sequence[Site]]:
        return {"weights": self.measured.weights, "activations": self.measured.activations}

    def _best_uniform(self, allocation: Allocation) -> dict[str, int] | None:
        """The widest weights, then activations, that are within the limits, one width for all of a kind but for those
        that are fixed; None if there are none."""
        widths, fixed = allocation.widths(self.measured), allocation.fixed(self.measured)
        for weight in _common(widths, self.measured.weights, fixed):
            for activation in _common(widths, self.measured.activations, fixed):
                bits = self._uniform_bits(weight, activation) | fixed
                if allocation.admits(self.measured, bits):
                    return bits
        return None

    def _smallest(self, limits: Budget, rules: Allocation) -> "Compiled":
        """The smallest network whose metric falls by at most limits.drop: sizes are bisected on the calibration data,
        each lowered once, and the one found is validated on the data held out; if it falls short there, sizes above are
        bisected on those."""
        scoring, drop = self.scoring, limits.drop
        if scoring is None or drop is None:
            raise HawqfxError("a budget on drop needs metric=, a function of (output, target), given to compile()")
        others = replace(limits, drop=None)
        sizes = [math.ceil(size) for size in self._range(rules, "size", STEPS)]
        if limits.size is not None:
            most = math.floor(limits.size.of(self.measured.float_bytes()))
            sizes = [*(size for size in sizes if size < most), most]
        floors = []
        for batches in (self.context.batches, scoring.holdout):
            score = self._score(self.measured, batches)
            floors.append(score - drop.of(abs(score)))
        found: dict[int, Compiled | None] = {}

        def at(step: int) -> Compiled | None:
            if step not in found:
                budget = replace(others, size=Limit(sizes[step]))
                try:
                    planned = self._quiet._planned(replace(rules, budget=budget))
                    found[step] = self._quiet.lowered(planned, f"{limits}, met by {budget}")
                except InfeasibleBudget:
                    found[step] = None  # too small a size for the other limits
                self.context.progress("drop", len(found), max(len(found), STEPS.bit_length()))
            return found[step]

        def keeps(step: int, batches: Sequence[Batch], floor: float) -> bool:
            compiled = at(step)
            return compiled is not None and self._score(compiled.program, batches) >= floor

        def least(low: int, batches: Sequence[Batch], floor: float) -> int:
            """The first step that keeps the metric, if the last does: it falls with the size, as far as one can see."""
            high = len(sizes) - 1
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if keeps(middle, batches, floor) else (middle + 1, high)
            return low

        step = least(0, self.context.batches, floors[0])
        if not keeps(step, scoring.holdout, floors[1]):
            log.warning(
                "%s keeps drop=%s on the calibration data and not on the data held out: a larger one is taken",
                replace(others, size=Limit(sizes[step])), drop,
            )  # fmt: skip
            step = least(step, scoring.holdout, floors[1])
        compiled = at(step)
        if compiled is None or not keeps(step, scoring.holdout, floors[1]):
            best = "no size keeps the other limits"
            if compiled is not None:
                best = f"the largest network has {self._score(compiled.program, scoring.holdout):.4g}"
            raise InfeasibleBudget(
                f"drop={drop} cannot be met on the data held out: the metric must be {floors[1]:.4g}, and {best}"
            )
        return self.lowered(compiled.planned, compiled.budget)

    def _range(self, rules: Allocation, limit: str, count: int) -> list[float]:
        """Amounts of a limit from that of the narrowest widths to that of the widest, a constant factor apart."""
        whole = replace(rules, budget=Budget(**{limit: Limit(1.0, relative=True)}))
        ends = []
        for pick in (min, max):
            bits = {key: pick(widths) for key, widths in rules.widths(self.measured).items()}
            account = whole.given(self.measured, bits).account
            assert account is not None
            ends.append(account.limits[limit].amount)
        low, high = ends
        return [low * (high / low) ** (step / (count - 1)) for step in range(count)]

    @torch.no_grad()
    def _score(self, program: Program, batches: Sequence[Batch]) -> float:
        """The mean of the metric over batches, weighed by their size."""
        assert self.scoring is not None
        total = 0.0
        for batch in batches:
            total += batch.size * float(self.scoring.metric(program.run(batch.args, batch.kwargs), batch.target))
        score = total / sum(batch.size for batch in batches)
        if not math.isfinite(score):
            raise HawqfxError(f"the metric is {score}: it must be finite, the mean over a batch, higher being better")
        return score


def _bits(width: int) -> str:
    """A width in a table."""
    return described(width).removesuffix(" bits")


def _ruled(allocation: Allocation, rules: Rules) -> Allocation:
    changes: dict[str, Any] = dict(rules)
    for name in ("weight_bits", "activation_bits"):
        if name in changes:
            changes[name] = tuple(sorted(set(changes[name])))
    if "schemes" in rules:
        changes["schemes"] = tuple(rules["schemes"])
    if "fix" in rules:
        changes["fix"] = tuple(rules["fix"].items())
    return replace(allocation, **changes)


def _with_float(rules: Allocation) -> Allocation:
    """Rules that also let any site stay in float, unless they say which widths."""
    every = (2, 3, 4, 5, 6, 7, 8, FLOAT_BITS)
    weights, activations = (every if given is None else given for given in (rules.weight_bits, rules.activation_bits))
    return replace(rules, weight_bits=weights, activation_bits=activations)


def _common(widths: Mapping[str, Sequence[int]], sites: Sequence[Site], fixed: Mapping[str, int]) -> list[int]:
    """The widths that all sites may take but for those that are fixed, widest first."""
    every = [set(widths[site.key]) for site in sites if site.key not in fixed]
    return sorted(set.intersection(*every), reverse=True) if every else [FLOAT_BITS]


def _listed(widths: set[int]) -> str:
    return "/".join(map(_bits, sorted(widths)))


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

    def at(self, budget: Budget | str, *, against_uniform: bool = True, **rules: Unpack[Rules]) -> "Compiled":
        """The same network under another budget, or other rules; no sensitivity is measured again.  See Session.at."""
        return self.session.at(budget, against_uniform=against_uniform, **rules)

    def uniform(self, weight_bits: int, activation_bits: int = 8) -> "Compiled":
        """The same network with one width for all weights and one for all activations, to compare with."""
        return self.session.uniform(weight_bits, activation_bits)

    @property
    def weight_bytes(self) -> int:
        """What the plan promises: bytes of the exported file that belong to weights."""
        costs = (self.planned.facts.get(site.key, ByteCost).bytes for site in self.planned.weights)
        chosen = self.planned.bits()
        return self.planned.fixed_bytes() + sum(
            by_bits[chosen[site.key]] for site, by_bits in zip(self.planned.weights, costs, strict=True)
        )

    @property
    def predicted_loss(self) -> float:
        """The sum of the predicted loss increases over the sites."""
        return sum(self.planned.facts.get(site.key, ChosenFormat).increase for site in self.planned.sites)

    @torch.no_grad()
    def calibration_loss(self) -> tuple[float, float]:
        """The mean loss over the calibration data, of the float network and of the compiled one."""
        totals = []
        for program in (self.session.measured, self.program):
            losses = (
                float(self.session.context.loss_of(program.run(batch.args, batch.kwargs), batch, index)) * batch.size
                for index, batch in enumerate(self.session.context.batches)
            )
            totals.append(sum(losses) / self.session.context.samples)
        return totals[0], totals[1]

    def export(self, path: str | Path, packing: "Packing" = "portable") -> None:
        """Write the packed integer model as ONNX, whole or not at all; see hawqfx.export.  Raises ExportError."""
        from hawqfx import __version__
        from hawqfx.export.exporter import export

        schemes = sorted(set(self.planned.schemes().values()))
        metadata = {
            "hawqfx_version": __version__, "hawqfx_plan": self.plan.digest, "hawqfx_packing": packing,
            "hawqfx_target": self.session.target, "hawqfx_schemes": ", ".join(schemes),
        }  # fmt: skip
        export(self.program, self.session.context.batches[0], path, packing, metadata)

    def benchmark(self, backends: Sequence[str] = ("ort-cpu",), *, threads: int = 1, rounds: int = 100) -> Table:
        """Latency, throughput, memory and answers beside the float network's, on the first sample of the calibration
        data.  See hawqfx.runtime.backends; raises BackendError."""
        from hawqfx.runtime.backends import every, table

        batch = self.session.context.batches[0]
        sample = batch.first(1 if self.planned.dynamic_batch else batch.size)
        answer = self.session.measured.run(sample.args, sample.kwargs)
        reference = [leaf.detach().numpy() for leaf in pytree.tree_leaves(answer) if isinstance(leaf, torch.Tensor)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            self.export(path)
            found = every(path, self.model, backends, sample, reference, threads=threads, rounds=rounds)
        return table(found)

    def export_float(self, path: str | Path) -> None:
        """Write the float32 network, with batch-norm folded and else as it was, to compare with."""
        from hawqfx.export.exporter import export

        assert self.planned.original is not None
        export(replace(self.planned, graph=self.planned.original), self.session.context.batches[0], path)

    def table(self) -> Table:
        """Every site: kind, shape, mean trace and its standard error, bits, bytes, predicted loss increase."""
        columns = ("site", "kind", "shape", "mean trace", "+-", "bits", "bytes", "loss increase")
        table = Table(*columns, title=f"budget {self.budget}")
        for site in self.planned.sites:
            bits = self.planned.facts.get(site.key, ChosenFormat)
            trace = error = size = "-"
            if self.planned.facts.has(site.key, Sensitivity):
                fact = self.planned.facts.get(site.key, Sensitivity)
                trace, error = f"{fact.curvature:.2e}", f"{fact.stderr:.0e}"
            if self.planned.facts.has(site.key, ByteCost):
                size = str(self.planned.facts.get(site.key, ByteCost).bytes[bits.bits])
            shape = "x".join(map(str, site.shape))
            table.add_row(site.key, site.kind, shape, trace, error, _bits(bits.bits), size, f"{bits.increase:.1e}")
        return table

    def summary(self) -> str:
        """The table as text, what it costs in bytes and loss, and what stayed in float and why."""
        console = Console(file=io.StringIO(), width=110)
        console.print(self.table())
        reference = self.planned.float_bytes()
        console.print(self.plan.explain())
        float_loss, loss = self.calibration_loss()
        console.print(
            f"weights {self.weight_bytes} bytes, {self.weight_bytes / reference:.2%} of float32's {reference}"
        )
        console.print(
            f"loss on {self.session.context.samples} calibration samples {loss:.4f}, float32 {float_loss:.4f}; "
            f"predicted increase, in the unit of the metric, {self.predicted_loss:.4g}"
        )
        for node, reason in self.planned.left_float.items():
            console.print(f"in float: {node}: {reason}")
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()
