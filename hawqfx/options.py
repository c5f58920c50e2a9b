"""compile()'s arguments, checked before anything is measured."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from hawqfx import arguments, pipeline
from hawqfx.allocation.budget import Budget
from hawqfx.allocation.rules import Order, default_schemes, known_schemes
from hawqfx.errors import DataError, UsageError
from hawqfx.export.targets import exact_widths
from hawqfx.frontend.capture import Model
from hawqfx.frontend.context import Context, Progress
from hawqfx.frontend.criteria import Draw, Loss
from hawqfx.frontend.data import Batch, check_alike, gather
from hawqfx.frontend.decoder_inputs import with_decoder_inputs
from hawqfx.frontend.default_loss import default_criterion
from hawqfx.frontend.losses import criterion_of, cross_entropy
from hawqfx.frontend.single_precision import single
from hawqfx.ir.facts import Sensitivity
from hawqfx.ir.program import Program
from hawqfx.maths.formats import FLOAT_BITS, Scheme
from hawqfx.pass_manager.base import Analysis, Observer
from hawqfx.passes.allocation import Allocation
from hawqfx.passes.calibration import Calibration
from hawqfx.passes.learned_rounding import LearnedRounding
from hawqfx.passes.rounding import Rounding
from hawqfx.passes.smoothing import Smoothing
from hawqfx.session.plan import FollowPlan, Plan
from hawqfx.session.planner import Score, Scoring
from hawqfx.session.saved import read_plan

log = logging.getLogger(__name__)

STRONGEST = 64  # pairs of weights whose interaction enters the integer program


@dataclass(frozen=True)
class Options:
    """The checked arguments of a compilation; made by `validated`.

    Args:
        budget: the limits; None where a plan is followed without one.
        plan: the plan to follow, if there is one.
        recipe: the passes.
        context: batches, loss, seed, device.
        chooses_loss: whether the loss is chosen once the network is captured; see hawqfx.frontend.default_loss.
        scoring: the judge of a budget on `drop`.
        allocation: the rules that a choice of formats keeps to, whatever the budget.
        observers: of the passes.
        threads: of the runs that a budget on latency is for.
        target: the processors that files are made for.
        refine: times that a plan is measured where it stands and solved again.
        learning: fits the codes of a chosen plan, if codes are learned.
        keep_float: patterns of names of weights whose layers stay in float.
        reround: whether the bits of the plan alone are taken.
        dynamic_shapes: dimensions of inputs that vary besides the batch, as torch.export takes them.
    """

    budget: Budget | None
    plan: Plan | None
    recipe: pipeline.Recipe
    context: Context
    chooses_loss: bool
    scoring: Scoring | None
    allocation: Allocation
    observers: tuple[Observer, ...]
    threads: int
    target: str
    refine: int
    learning: LearnedRounding | None
    keep_float: tuple[str, ...]
    reround: bool
    dynamic_shapes: Any


def validated(
    model: Model,
    budget: Budget | str | None,
    data: Iterable[Any],
    *,
    loss: Loss | Literal["auto"],
    metric: Score | None,
    holdout: Iterable[Any] | None,
    sensitivity: str | Analysis | None,
    weight_bits: Sequence[int],
    activation_bits: Sequence[int],
    schemes: Sequence[Scheme] | None,
    block_sizes: Sequence[int],
    rounding: Literal["learned", "sequential", "compensated", "nearest"] | Rounding | LearnedRounding,
    bias_correction: bool | None,
    keep_float: Sequence[str],
    fix: Mapping[str, int] | None,
    rule: Order,
    interactions: bool,
    refine: int,
    target: str,
    plan: Plan | str | Path | None,
    reround: bool,
    draw: Draw | None,
    samples: int | None,
    dynamic_shapes: Any,
    batch: int | None,
    cache: str | Path | None,
    device: str | torch.device,
    threads: int,
    seed: int,
    observers: Sequence[Observer],
    progress: Progress,
) -> Options:
    """The arguments of compile() as options; see there for each.

    Raises:
        UsageError: if an argument is out of range, or arguments contradict each other.
        BudgetError: if the budget's text is not understood.
        PlanError: if the plan cannot be read.
        DataError: if the data are empty, not finite or of different shapes.
    """
    arguments.model(model)
    if torch.is_inference_mode_enabled():
        raise UsageError("compile() takes gradients: call it outside of torch.inference_mode()")
    limits = None if budget is None else Budget.of(budget)
    given = None if plan is None else read_plan(plan)
    _check_budget(limits, given, metric, holdout)
    if reround and given is None:
        raise UsageError("reround=True takes the bits of a plan: give plan= too")
    if batch is not None:
        arguments.whole("batch", batch, 1, "at least one sample is measured at a time")
    if samples is not None:
        arguments.whole("samples", samples, 1, "at least one sample is needed")
    arguments.whole("threads", threads, 1, "onnxruntime needs at least one")
    arguments.whole("refine", refine, 0, "a plan is refined zero times or more")
    if refine and limits is not None and (limits.latency is not None or limits.drop is not None):
        raise UsageError(f"refine={refine}: plans for a latency or a drop are not refined: leave it out")
    arguments.whole("seed", seed)
    kept = arguments.patterns("keep_float", keep_float)
    for name, function in (("loss", None if loss == "auto" else loss), ("metric", metric), ("draw", draw)):
        if function is not None and not callable(function):
            raise UsageError(f"{name}={function!r}: must be a function")
    if not all(isinstance(observer, Observer) for observer in observers):
        raise UsageError(f"observers={observers!r}: give instances of hawqfx.pass_manager.base.Observer")
    drawn = loss == "auto" or criterion_of(loss, draw).knows_distribution
    predictor = pipeline.metric(sensitivity, drawn=drawn)
    if rule == "hawq-v2" and given is None and Sensitivity not in predictor.gives:
        able = ", ".join(name for name, kind in pipeline.METRICS.items() if Sensitivity in kind.gives)
        raise UsageError(f"rule='hawq-v2' orders by the trace, which {predictor.name} does not measure: take {able}")
    offered = default_schemes(limits) if schemes is None else known_schemes(schemes)
    weights = exact_widths(target, arguments.bits("weight_bits", weight_bits))
    activations = arguments.bits("activation_bits", activation_bits)
    blocks = arguments.block_sizes(block_sizes)
    rules = arguments.fixed(fix)
    for pattern, width in rules:
        if given is None and width != FLOAT_BITS and width not in {*weights, *activations}:
            raise UsageError(f"fix {pattern!r}: {width} bits are in neither weight_bits= nor activation_bits=")
    place = usable_device(device)
    check_device(model, place)
    varying = dynamic_shapes is not None or isinstance(model, torch.export.ExportedProgram)
    batches = _batches(model, data, samples, varying, place)
    scoring = None
    if metric is not None:
        held_data = None
        if holdout is not None:
            held_data = _batches(model, holdout, None, varying, place, "holdout")
            if not varying:
                check_alike(held_data[0], batches[0], "holdout")
        batches, held = _held_out(batches, held_data)
        if holdout is None and (limits is None or limits.drop is None):
            log.warning(
                "metric= holds out %d samples, the last quarter of the data, for budgets on drop and for scores; "
                "they neither calibrate nor are measured: give holdout=, or leave metric= out",
                sum(part.size for part in held),
            )
        scoring = Scoring(metric, held)
    learning = rounding if isinstance(rounding, LearnedRounding) else None
    if rounding == "learned":
        learning = LearnedRounding()
    first = _first_rounding(rounding)
    folder = arguments.cache_folder(cache)
    return Options(
        budget=limits,
        plan=given,
        recipe=pipeline.recipe(
            keep_float=kept,
            smoothing=_smoothing(given, offered),
            quantizers=_quantizers(given, reround, weights, activations, offered, blocks, target),
            rounding=first,
            metric=predictor,
            interactions=interactions,
            bias_correction=first.method != "nearest" if bias_correction is None else bias_correction,
            new_scales=given is None or reround,
        ),
        context=Context(
            batches,
            cross_entropy if loss == "auto" else loss,
            seed,
            place,
            progress,
            draw,
            batch,
            folder,
            "" if loss == "auto" else f"{getattr(loss, '__name__', type(loss).__name__)}, as given by loss=",
        ),
        chooses_loss=loss == "auto",
        scoring=scoring,
        allocation=Allocation(
            Budget(),
            weight_bits=weights if FLOAT_BITS in weights else None,
            activation_bits=activations if FLOAT_BITS in activations else None,
            schemes=None if schemes is None else offered,
            fix=rules,
            rule=rule,
            interactions=STRONGEST if interactions else 0,
        ),
        observers=tuple(observers),
        threads=threads,
        target=target,
        refine=refine,
        learning=learning,
        keep_float=kept,
        reround=reround,
        dynamic_shapes=dynamic_shapes,
    )


def _first_rounding(
    rounding: Literal["learned", "sequential", "compensated", "nearest"] | Rounding | LearnedRounding,
) -> Rounding:
    """The rounding that plans are made with, and that learning begins with.

    Raises:
        UsageError: if there is no such rounding.
    """
    if isinstance(rounding, Rounding):
        return rounding
    if isinstance(rounding, LearnedRounding) or rounding == "learned":
        return Rounding()
    if rounding not in ("sequential", "compensated", "nearest"):
        raise UsageError(
            f"rounding={rounding!r}: must be 'learned', 'sequential', 'compensated' or 'nearest', or a Rounding or "
            "LearnedRounding"
        )
    return Rounding(rounding)


def with_loss(options: Options, program: Program) -> Options:
    """The options with the loss that the captured network's output and the targets ask for, unless the user gave one.

    Raises:
        LossError: if the output has no tensor that a default loss looks at.
        DataError: if no default loss fits the targets.
    """
    if not options.chooses_loss:
        return options
    criterion, reason = default_criterion(program, options.context.batches)
    criterion_of(criterion, options.context.draw)  # refuses draw= where it cannot be used, before anything is measured
    return replace(options, context=replace(options.context, loss=criterion, loss_reason=reason))


def usable_device(device: str | torch.device) -> torch.device:
    """The device of a name.

    Raises:
        UsageError: if tensors cannot be made there.
    """
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device={str(device)!r} cannot be used: {error}") from error
    return place


def check_device(model: Model, device: torch.device) -> None:
    """Raises UsageError if the model is on another device."""
    state = model.state_dict if isinstance(model, torch.export.ExportedProgram) else model.state_dict()
    stray = next((tensor.device for tensor in state.values() if tensor.device.type != device.type), None)
    if stray is not None:
        raise UsageError(f"the model is on {stray} and device={str(device)!r}: move it with model.to({str(device)!r})")


def _check_budget(
    limits: Budget | None, plan: Plan | None, metric: Score | None, holdout: Iterable[Any] | None
) -> None:
    if limits is None and plan is None:
        raise UsageError("give a budget, such as 'size=12.5%', or a plan")
    if limits is not None and plan is not None:
        raise UsageError(
            f"budget={str(limits)!r} beside plan=: a plan has its budget already; give None for the budget to follow "
            "the plan, or no plan"
        )
    if limits is not None and limits.drop is not None and metric is None:
        raise UsageError("a budget on drop needs metric=, a function of (output, target), higher being better")
    if holdout is not None and metric is None:
        raise UsageError("holdout= is data that metric= is validated on: give metric= too, or leave it out")


def _quantizers(
    plan: Plan | None,
    reround: bool,
    weights: tuple[int, ...],
    activations: tuple[int, ...],
    schemes: tuple[Scheme, ...],
    blocks: tuple[int, ...],
    target: str,
) -> Analysis:
    """The pass that gives the quantizer of every site in every format."""
    if plan is None:
        integer = [tuple(bits for bits in every if bits < FLOAT_BITS) for every in (weights, activations)]
        return Calibration(integer[0], integer[1], schemes, blocks)
    for key, quantizer in plan.quantizers.items():
        if quantizer is not None and quantizer.per_channel:  # a weight
            exact_widths(target, [max(quantizer.rows, default=plan.bits[key])])
    return plan.calibration() if reround else FollowPlan(plan)


def _smoothing(plan: Plan | None, schemes: tuple[Scheme, ...]) -> Smoothing:
    """The pass that gives the exponents of linear layers' inputs; none where inputs stay in float."""
    if plan is not None:
        return Smoothing(given=plan.exponents)
    return Smoothing(given={} if set(schemes) == {"weight-only"} else None)


def _batches(
    model: Model,
    data: Iterable[Any],
    samples: int | None,
    varying: bool,
    device: torch.device,
    name: str = "data",
) -> tuple[Batch, ...]:
    """The batches of some data as the model takes them, in float32 and on the device."""
    batches = with_decoder_inputs(model, gather(data, samples, varying, name))
    return tuple(batch.map(single).to(device) for batch in batches)


def _held_out(
    batches: tuple[Batch, ...], holdout: tuple[Batch, ...] | None
) -> tuple[tuple[Batch, ...], tuple[Batch, ...]]:
    """The data for calibration, and the data for validation."""
    if holdout is not None:
        return batches, holdout
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
