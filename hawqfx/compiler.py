"""compile(), pareto() and measure_latency(): a trained network and calibration data become an integer network."""

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from hawqfx import pipeline
from hawqfx.allocation.budget import Budget, Limit
from hawqfx.allocation.rules import Order, default_schemes
from hawqfx.frontend import decoders
from hawqfx.frontend.capture import Model, capture
from hawqfx.frontend.context import Context, silent
from hawqfx.frontend.criteria import Draw, Loss
from hawqfx.frontend.data import check_fits, gather
from hawqfx.frontend.losses import cross_entropy
from hawqfx.frontend.shapes import check_shape
from hawqfx.frontend.single_precision import in_single_precision, single
from hawqfx.frontend.trial import try_loss
from hawqfx.ir.program import Program
from hawqfx.maths.formats import BLOCKS, Scheme
from hawqfx.maths.latency_model import LatencyModel
from hawqfx.options import Options, validated, with_loss
from hawqfx.pass_manager.base import Analysis, Observer
from hawqfx.pass_manager.manager import run
from hawqfx.pass_manager.observers import progress_bars
from hawqfx.passes.calibration import Calibration
from hawqfx.passes.learned_rounding import LearnedRounding
from hawqfx.passes.rounding import Rounding
from hawqfx.session.compiled import Compiled
from hawqfx.session.frontier import Frontier, checked
from hawqfx.session.plan import Plan, check_codes, check_sites
from hawqfx.session.planner import Planner, Score
from hawqfx.session.session import Session

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger(__name__)


def compile(
    model: Model,
    budget: Budget | str | None,
    data: Iterable[Any],
    *,
    loss: Loss | Literal["auto"] = "auto",
    metric: Score | None = None,
    holdout: Iterable[Any] | None = None,
    sensitivity: str | Analysis | None = None,
    weight_bits: Sequence[int] = (2, 3, 4, 5, 6, 7, 8),
    activation_bits: Sequence[int] = (4, 6, 8),
    schemes: Sequence[Scheme] | None = None,
    block_sizes: Sequence[int] = BLOCKS,
    rounding: Literal["learned", "sequential", "compensated", "nearest"] | Rounding | LearnedRounding = "sequential",
    bias_correction: bool | None = None,
    keep_float: Sequence[str] = (),
    fix: Mapping[str, int] | None = None,
    rule: Order = "exact",
    interactions: bool = False,
    refine: int = 0,
    target: str = "any",
    plan: Plan | str | Path | None = None,
    reround: bool = False,
    draw: Draw | None = None,
    tokens: Literal["causal"] | None = None,
    samples: int | None = None,
    dynamic_shapes: Any = None,
    batch: int | None = None,
    cache: str | Path | None = None,
    device: str | torch.device = "cpu",
    threads: int = 1,
    seed: int = 0,
    observers: Sequence[Observer] = (),
    console: "Console | None" = None,
) -> Compiled:
    """The best mixed-precision integer model of a given size.

    Args:
        model: an eval-mode nn.Module, an fx.GraphModule or an ExportedProgram.  It is not changed.
        budget: a Budget or its text, such as "size=12.5%", "size=100kB, bops=2%" or "latency=3ms"; percentages are of
            float32.
        data: an iterable of batches, each a tensor, a pair (inputs, target) or a dict of keyword inputs, with or
            without `labels`.  The target of several outputs is a tuple or mapping like them, with None where there is
            none.  Without targets, networks are compared by the expected loss over targets of the float network's own
            distribution.
        loss: a function of (output, target), the mean over the batch, or a criterion of hawqfx.frontend.criteria.
            "auto" goes by the last operators of the network and the shapes of output and target: cross-entropy of
            logits or of a softmax, (N, classes, ...) or (N, L, classes), binary cross-entropy of sigmoids, or the
            squared error; the summary begins with the choice.  Labels that repeat the tokens of the input are shifted,
            as in transformers.  Without targets, outputs (N, classes) are logits, (N, L, classes) of integer inputs are
            those of tokens, and what else ends in no softmax or sigmoid has the squared error to the float output.
            `logits` are judged alone; of other tuples and mappings all floating-point tensors are, by the sum of their
            losses, squared errors among them over the variance of the float output.
        metric: for a budget on `drop`: a function of (output, target), the mean over the batch, higher being better.
        holdout: data with targets that such a drop is validated on; by default the last quarter of `data`, which then
            neither calibrates nor is measured.
        sensitivity: how the loss increase is predicted: "gauss-newton", "fisher", "hawq-v2", "taylor", "measured",
            "mse" or "hawq-v1", or such a pass with its options, as in HawqV2(probes=100).  By default "gauss-newton",
            or "hawq-v2" for a loss of one's own without draw=.
        weight_bits: bits that weights may have, within 2 to 8, and 32 for float, which a budget on latency may choose
            in any case.
        activation_bits: bits that activations may have, likewise.  Fewer than 8 are chosen only where a limit asks for
            it.
        schemes: how layers may compute: "static" in integers, and linear layers "dynamic", with the range of their
            input taken in each run, or "weight-only", with 2, 3, 4 or 8 bits in blocks, as tables may have too; see
            hawqfx.maths.formats.  By default all three under a budget on latency or weight_memory, else the static one.
        block_sizes: inputs that share a scale in weight-only layers and tables, within 32, 64 and 128.
        rounding: "sequential": compensated by the layers' inputs while formats are chosen, and then anew, layer by
            layer, from inputs that are quantized; "compensated" without the latter; to the "nearest" as in the paper;
            or "learned": sequential, and then fitted block by block to the float network by gradient, for minutes.  A
            LearnedRounding has its options, such as LearnedRounding(steps=1000), and a Rounding those of the others,
            such as Rounding(block=1024), the most columns of a weight that are compensated together; by default 8,192,
            or fewer as free memory allows, and the summary says where.
        bias_correction: whether the mean errors of output channels are taken out of the biases, by the calibration
            data; None: with every rounding but "nearest", which is the paper's.  See hawqfx.passes.bias_correction and
            sequential_rounding.
        keep_float: patterns of names of weights whose layers stay in float.
        fix: pattern of names of sites -> the bits that they have.
        rule: "exact", or "hawq-v2" for the paper's own: bits in the order of the average trace.
        interactions: let the joint effect of the errors of two weights enter the predicted loss (not for a loss of
            one's own without draw=); benchmarks/interactions.py shows its effect.
        refine: times that the plan is measured again where it stands, with half of the data, and solved again one width
            around; the new plan is taken if it loses less on the other half by more than two standard errors.  Plans of
            the default metric seldom gain by it, those of others do; see benchmarks/uniform.py.  Not for budgets on
            latency or drop, nor for a loss of one's own without draw=.
        target: "any", or "x86-avx2" for x86 processors without VNNI, where sums of signed codes of 8 bits saturate.
        plan: a plan to follow, or the path of one, of JSON or of Compiled.save(); `budget` is None then, and no
            sensitivity is measured.  The weights, the data and rounding= must be those that it was made with, so that
            the network is the same; hawqfx.load() needs no data.
        reround: take the bits of the plan alone, for other weights or data: ranges are calibrated and codes rounded
            anew.
        draw: a function of (output, torch.Generator) that draws targets from the model's own distribution, for data
            without targets, "gauss-newton" and "fisher", where the loss is one's own.  The known losses have such a
            distribution, by whose expectation networks are compared; see hawqfx.frontend.criteria.
        tokens: "causal" for a causal language model of transformers that is to generate text: its cache goes in and out
            of the network as tensors, and batches are texts, (N, L) tokens or mappings with input_ids; see
            hawqfx.frontend.decoders.
        samples: number of samples of the data to take; a warning says so when there are fewer.
        dynamic_shapes: dimensions of inputs that vary besides the batch, as torch.export takes them, such as
            {"input_ids": {1: torch.export.Dim("sequence")}}; the batches of `data` may differ there, and the file takes
            any size, under the names of the Dims.
        batch: the most samples to measure at once; by default as many as free memory allows.
        cache: a folder for measurements, batch by batch: a run that was killed goes on where it was, and the same model
            is never measured twice.
        device: where to measure, such as "cuda"; the model must be there, the data is moved.
        threads: of the runs that a budget on latency is for.
        seed: of every random draw.
        observers: of the passes; see hawqfx.pass_manager.observers.
        console: where progress bars go, if it is a terminal; by default stderr.

    Raises:
        HawqfxError: UsageError, CaptureError, NothingToQuantize, DataError, LossError, DerivativeError, BudgetError,
            InfeasibleBudget, PlanError, CacheError or WorkerError; each message says what to do.
    """
    if plan is not None:
        _warn_of_ignored({name: value for name, value in locals().items() if name in _CHOOSING})
    if tokens is not None:
        decoding = decoders.inputs(model, data, holdout, tokens, samples, dynamic_shapes)
        model, data, holdout, dynamic_shapes, samples = *decoding, None
    with torch.enable_grad(), progress_bars(console) as progress:
        options = validated(
            model, budget, data, loss=loss, metric=metric, holdout=holdout, sensitivity=sensitivity,
            weight_bits=weight_bits, activation_bits=activation_bits, schemes=schemes,
            block_sizes=block_sizes, rounding=rounding, bias_correction=bias_correction, keep_float=keep_float, fix=fix,
            rule=rule, interactions=interactions, refine=refine, target=target, plan=plan, reround=reround, draw=draw,
            samples=samples,
            dynamic_shapes=dynamic_shapes, batch=batch, cache=cache, device=device, threads=threads, seed=seed,
            observers=observers, progress=progress,
        )  # fmt: skip
        prepared, options = prepare(model, options)
        measured = measure(prepared, options)
        compiled = decide(measured, options)
    # bars are over: later calls are silent
    quiet = replace(compiled.session, context=replace(options.context, progress=silent))
    return replace(compiled, session=quiet)


# arguments that say how formats are chosen, which a plan has behind it
_CHOOSING = {
    "sensitivity", "weight_bits", "activation_bits", "schemes", "block_sizes", "fix", "rule", "interactions", "refine",
}  # fmt: skip


def _warn_of_ignored(choosing: Mapping[str, Any]) -> None:
    """Tell which arguments have no effect beside a plan: those that differ from the defaults of compile()."""
    parameters = inspect.signature(compile).parameters

    def plain(value: Any) -> Any:
        return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else value

    ignored = [
        f"{name}=" for name, value in choosing.items() if value and plain(value) != plain(parameters[name].default)
    ]
    if ignored:
        log.warning("plan= has its formats: %s have no effect", ", ".join(ignored))


def prepare(model: Model, options: Options) -> tuple[Program, Options]:
    """The captured network with its sites, and the quantizers, codes and costs of each; and the options with the loss
    that the network's output asks for."""
    found, options = find_sites(model, options)
    return run(options.recipe.price, found, options.context, options.observers), options


def find_sites(model: Model, options: Options) -> tuple[Program, Options]:
    """The captured network with its sites, and the options with the loss that the network's output asks for.  The
    user's functions are tried on the first batch before that.

    Raises:
        HawqfxError: if the data do not fit, or the loss, the metric, the shape of a latency or a pattern of names
            cannot be used.
    """
    captured = in_single_precision(capture(model, options.context.batches[0], options.dynamic_shapes))
    inputs = captured.graph.graph.find_nodes(op="placeholder")
    held = options.scoring.holdout if options.scoring is not None else ()
    check_fits((*options.context.batches, *held), inputs, lambda batch: captured.flat_inputs(batch.args, batch.kwargs))
    if options.budget is not None and options.budget.latency is not None and options.budget.latency.shape:
        check_shape(captured, options.context.batches[0], options.budget.latency.shape)
    options = with_loss(options, captured)
    try_loss(captured, options.context, 0 if options.plan else pipeline.derivatives(options.recipe))
    if options.scoring is not None:
        planner = Planner(captured, options.context, scoring=options.scoring)
        planner.score(captured, options.scoring.holdout[:1])  # refuses a metric that fails
    found = run(options.recipe.rewrite, captured, options.context, options.observers)
    options.allocation.rules.fixed(found)  # refuses patterns that match nothing
    return found, options


def measure(prepared: Program, options: Options) -> Program:
    """The program that knows the loss increase of every site; a plan that is followed needs none."""
    if options.plan is not None:
        return prepared
    return run(options.recipe.measure, prepared, options.context, options.observers)


def decide(measured: Program, options: Options) -> Compiled:
    """The network under the budget, or the one of the plan that is followed."""
    session = Session(
        measured, options.context, options.observers, options.allocation, options.scoring, options.threads,
        options.target, options.refine, options.learning, options.recipe.finish, options.keep_float,
    )  # fmt: skip
    plan = options.plan
    if plan is not None and options.reround:
        check_sites(plan, measured)
        return session.lowered(session.planner.given(plan.formats), plan.budget)
    if plan is not None:
        compiled = session.lowered(measured, plan.budget)
        check_codes(plan, compiled.plan)
        return compiled
    assert options.budget is not None
    return session.at(options.budget)


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

    Args:
        model: as for compile().
        data: as for compile().
        points: see Session.frontier, as for limit, budgets and evaluate.
        limit: see there.
        budgets: see there.
        evaluate: see there.
        options: those of compile().

    Raises:
        HawqfxError: as compile() and Session.frontier do.
    """
    parsed = checked(points, limit, budgets, evaluate)
    if parsed is None:
        first = Budget(**{limit: Limit(1.0, relative=True)})
    else:  # that of the most schemes, since the first budget says which are calibrated
        first = max(reversed(parsed), key=lambda each: len(default_schemes(each)))
    return compile(model, first, data, **options).session.frontier(points, limit, budgets, evaluate)


def measure_latency(
    model: Model,
    data: Iterable[Any],
    *,
    threads: int = 1,
    shape: Mapping[str, int] = {},
    keep_float: Sequence[str] = (),
    tokens: Literal["causal"] | None = None,
    dynamic_shapes: Any = None,
    cache: str | Path | None = None,
    console: "Console | None" = None,
) -> LatencyModel:
    """Times the parts of a model in onnxruntime on this machine; `seconds` of the result adds them up for any formats.

    A budget on latency does all that by itself.

    Args:
        model: as for compile().
        data: as for compile(); one batch is enough.
        threads: of onnxruntime.
        shape: sizes of the run by the names of dimensions that vary, such as {"batch": 8, "sequence": 1}; those that
            are left out have the size of the first batch, and one sample.
        keep_float: patterns of names of weights whose layers stay in float.
        tokens: as for compile().
        dynamic_shapes: as for compile().
        cache: the folder of timings, by default the user's.
        console: where progress bars go.

    Raises:
        HawqfxError: as compile() does before anything is measured; BudgetError, if the network cannot take the shape.
    """
    if tokens is not None:
        model, data, _, dynamic_shapes = decoders.inputs(model, data, None, tokens, None, dynamic_shapes)
    varying = dynamic_shapes is not None or isinstance(model, torch.export.ExportedProgram)
    batches = tuple(batch.map(single) for batch in gather(data, varying=varying))
    recipe = pipeline.recipe(
        keep_float=tuple(keep_float), quantizers=Calibration((8,), (8,)), rounding=Rounding("nearest")
    )
    with progress_bars(console) as progress:
        context = Context(batches[:1], cross_entropy, progress=progress)
        steps = [*recipe.prepare, *pipeline.profiling(threads, shape, None if cache is None else Path(cache))]
        captured = in_single_precision(capture(model, batches[0], dynamic_shapes))
        check_shape(captured, batches[0], shape)  # before anything is calibrated
        return run(steps, captured, context).about(LatencyModel)
