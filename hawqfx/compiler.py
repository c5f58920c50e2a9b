"""compile() and pareto(): from a trained network and calibration data to an integer network, or to the whole curve."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from hawqfx import pipeline
from hawqfx.allocation.budget import Budget, Limit
from hawqfx.errors import DataError, HawqfxError
from hawqfx.frontend.capture import Model, capture
from hawqfx.frontend.context import Batch, Context, Draw, Loss, cross_entropy, gather, silent
from hawqfx.maths.formats import Scheme
from hawqfx.maths.latency_model import LatencyModel
from hawqfx.maths.pricing import FLOAT_BITS
from hawqfx.pass_manager.base import Analysis, Observer
from hawqfx.pass_manager.manager import run
from hawqfx.pass_manager.observers import progress_bars
from hawqfx.passes.allocation import Allocation, Rule
from hawqfx.passes.calibration import Calibration
from hawqfx.passes.rounding import Rounding
from hawqfx.runtime.target import exact_widths
from hawqfx.session.frontier import Frontier
from hawqfx.session.plan import Plan
from hawqfx.session.session import Compiled, Score, Scoring, Session

STRONGEST = 64  # pairs of weights whose interaction enters the integer program


def compile(
    model: Model,
    budget: Budget | str | None,
    data: Iterable[Any],
    *,
    loss: Loss = cross_entropy,
    metric: Score | None = None,
    holdout: Iterable[Any] | None = None,
    sensitivity: str | Analysis | None = None,
    weight_bits: Sequence[int] = (2, 3, 4, 5, 6, 7, 8),
    activation_bits: Sequence[int] = (4, 6, 8),
    schemes: Sequence[Scheme] | None = None,
    rounding: Literal["compensated", "nearest"] = "compensated",
    keep_float: Sequence[str] = (),
    fix: Mapping[str, int] | None = None,
    rule: Rule = "exact",
    interactions: bool = False,
    target: str = "any",
    plan: Plan | str | Path | None = None,
    draw: Draw | None = None,
    samples: int | None = None,
    batch: int | None = None,
    cache: str | Path | None = None,
    device: str | torch.device = "cpu",
    threads: int = 1,
    seed: int = 0,
    observers: Sequence[Observer] = (),
    console: Console | None = None,
) -> Compiled:
    """The best mixed-precision integer model of a given size.

    model: an eval-mode nn.Module, an fx.GraphModule or an ExportedProgram.  It is not changed.
    budget: a Budget or its text, such as "size=12.5%", "size=100kB, bops=2%" or "latency=3ms"; percentages are of
        float32.
    data: an iterable of batches, each a tensor, a pair (inputs, target) or a dict of keyword inputs, with or without
        `labels`.  Without targets, labels are sampled from the model's own output distribution.
    loss: a function of (output, target), the mean over the batch; cross-entropy of logits by default.
    metric: for a budget on `drop`: a function of (output, target), the mean over the batch, higher being better.
    holdout: data with targets that such a drop is validated on; by default the last quarter of `data`, which then
        neither calibrates nor is measured.
    sensitivity: how the loss increase is predicted: "fisher", "hawq-v2", "taylor", "measured", "mse" or "hawq-v1", or
        such a pass with its options, as in HawqV2(probes=100).  By default "fisher", which ranks best and costs least,
        or "hawq-v2" for a loss other than cross-entropy without draw=.
    weight_bits, activation_bits: widths to choose from, within 2 to 8, and 32 for float, which budgets on latency and
        drop may choose in any case.  Fewer bits of activation than 8 are chosen only where a limit asks for it.
    schemes: how layers may compute: "static" in integers, and linear layers "dynamic", with the range of what they
        read taken in each run, or "weight-only", with 4 bits in blocks; see hawqfx.maths.formats.  By default all three
        under a budget on latency or weight_memory, else the static one.
    rounding: "compensated" by the layers' inputs, or to the "nearest" as in the paper.
    keep_float: patterns of names of weights whose layers stay in float.
    fix: pattern of names of sites -> the width that they have.
    rule: "exact", or "hawq-v2" for the paper's own: bits in the order of the average trace.
    interactions: let what the errors of two weights do together enter the predicted loss (needs cross-entropy or
        draw=); benchmarks/interactions.py shows what that brings.
    target: "any", or "x86-avx2" for x86 processors without VNNI, where weights of 8 bits would saturate sums.
    plan: a plan, or the path of one, to follow; then `budget` is not needed, and no sensitivity is measured.
    draw: a function of (output, torch.Generator) that draws targets from the model's own distribution, for data
        without targets and for "fisher"; labels by softmax of the logits by default.
    samples: take so many samples of the data and no more; a warning says so when there are fewer.
    batch: the most samples to measure at once; by default as many as free memory allows.
    device: where to measure, such as "cuda"; the model must be there, the data is moved.
    threads: of the runs that a budget on latency is for.
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
    if limits is not None and limits.drop is not None and metric is None:
        raise HawqfxError("a budget on drop needs metric=, a function of (output, target), higher being better")
    chosen = pipeline.metric(sensitivity, drawn=loss is cross_entropy or draw is not None)
    if batch is not None and batch < 1:
        raise HawqfxError(f"batch={batch}: at least one sample is measured at a time")
    weighs = limits is not None and (limits.latency is not None or limits.weight_memory is not None)
    offered = _schemes(schemes, weighs)
    weights, activations = exact_widths(target, _widths(weight_bits)), _widths(activation_bits)
    device = _usable(device)
    batches = tuple(part.to(device) for part in gather(data, samples))
    scoring = None
    if metric is not None:
        batches, held = _held_out(batches, holdout, device)
        scoring = Scoring(metric, held)
    _check_device(model, device)
    program = capture(model, batches[0])
    with progress_bars(console or Console(stderr=True)) as progress:
        context = Context(batches, loss, seed, device, progress, draw, batch, None if cache is None else Path(cache))
        folded = run(pipeline.folding(), program, context, observers)
        found = run(pipeline.finding(tuple(keep_float)), replace(folded, original=folded.graph), context, observers)
        if given is None:
            integer = [tuple(bits for bits in widths if bits < FLOAT_BITS) for widths in (weights, activations)]
            calibration = Calibration(integer[0], integer[1], offered)
            quantizers = run(pipeline.quantizing(calibration), found, context, observers)
        else:
            quantizers = given.facts_for(found)
            for site in found.weights:
                exact_widths(target, [given.bits[site.key]])
        measured = run(pipeline.pricing(Rounding(rounding)), quantizers, context, observers)
        if given is None:
            measured = run(pipeline.measuring(chosen, interactions), measured, context, observers)
        rules = Allocation(
            Budget(),
            weights if FLOAT_BITS in weights else None,
            activations if FLOAT_BITS in activations else None,
            None if schemes is None else offered,
            tuple((fix or {}).items()),
            rule,
            STRONGEST if interactions else 0,
        )
        session = Session(measured, context, tuple(observers), rules, scoring, threads, target)
        if given is not None:
            compiled = session.lowered(measured, given.budget)
        else:
            assert limits is not None
            compiled = session.at(limits)
    # bars are over: later calls are silent
    return replace(compiled, session=replace(compiled.session, context=replace(context, progress=silent)))


def pareto(
    model: Model,
    data: Iterable[Any],
    *,
    points: int = 30,
    limit: str = "size",
    budgets: Sequence[Budget | str] | None = None,
    evaluate: int = 5,
    **options: Any,
) -> Frontier:
    """The whole curve of a budget against the predicted loss, from one measurement.

    points, limit, budgets, evaluate: see Session.frontier.  options: those of compile().
    """
    first = Budget(**{limit: Limit(1.0, relative=True)})
    return compile(model, first, data, **options).session.frontier(points, limit, budgets, evaluate)


def measure_latency(
    model: Model,
    data: Iterable[Any],
    *,
    threads: int = 1,
    batch: int | None = None,
    keep_float: Sequence[str] = (),
    cache: str | Path | None = None,
    console: Console | None = None,
) -> LatencyModel:
    """Times the parts of a model in onnxruntime on this machine; `Timetable.seconds` adds them up for any bits.

    data: as for compile(); one batch is enough.  threads: of onnxruntime.  batch: samples in a run, by default one.
    cache: the folder where timings are kept, by default the user's.  A budget on latency does all that by itself.
    """
    from hawqfx.latency.profiler import measure

    batches = gather(data)
    with progress_bars(console or Console(stderr=True)) as progress:
        context = Context(batches[:1], cross_entropy, progress=progress)
        steps = [
            *pipeline.folding(),
            *pipeline.finding(tuple(keep_float)),
            *pipeline.quantizing(Calibration((8,), (8,))),
            *pipeline.pricing(Rounding("nearest")),
        ]
        program = run(steps, capture(model, batches[0]), context)
        folder = None if cache is None else Path(cache)
        return measure(program, batches[0], threads=threads, batch=batch, cache=folder, progress=progress)


def _held_out(
    batches: tuple[Batch, ...], holdout: Iterable[Any] | None, device: torch.device
) -> tuple[tuple[Batch, ...], tuple[Batch, ...]]:
    """The data that calibrates, and the data that validates."""
    if holdout is not None:
        return batches, tuple(batch.to(device) for batch in gather(holdout))
    total = sum(batch.size for batch in batches)
    kept, held, seen = [], [], 0
    for batch in batches:
        left = max(0, total - total // 4 - seen)
        seen += batch.size
        if left:
            kept.append(batch.first(left))
        if left < batch.size:
            held.append(batch.last(batch.size - left))
    if not held:
        raise DataError("the data is too little to hold some out for the metric: give holdout=")
    return tuple(kept), tuple(held)


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


def _schemes(wanted: Sequence[Scheme] | None, weighs: bool) -> tuple[Scheme, ...]:
    known: tuple[Scheme, ...] = ("static", "dynamic", "weight-only")
    if wanted is None:
        return known if weighs else known[:1]
    odd = [scheme for scheme in wanted if scheme not in known]
    if odd or not wanted:
        raise HawqfxError(f"schemes={tuple(wanted)}: must be some of {', '.join(known)}")
    return tuple(scheme for scheme in known if scheme in wanted)


def _widths(bits: Sequence[int]) -> tuple[int, ...]:
    widths = tuple(sorted(set(bits)))
    if not widths or not all(2 <= width <= 8 or width == FLOAT_BITS for width in widths) or widths == (FLOAT_BITS,):
        raise HawqfxError(f"bit widths must be from 2 to 8, with 32 for float beside them, not {tuple(bits)}")
    return widths
