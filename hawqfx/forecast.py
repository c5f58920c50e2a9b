"""What a compilation would measure, how long it would take, and in how much memory; before it is begun.

The network is captured, its sites are found, and a forward and a backward pass of a few samples are timed, and so is a
product of matrices.  From these, by the number of passes of each step:

    smoothing, calibration,    four forward passes over the samples
    rounding
    the metric                 a backward pass or a Hessian-vector product for each probe, or a forward pass for each
                               site and width, on the samples that each sees
    compensated codes          about ten factors and solutions of K x K for a weight of K columns; a backward pass, and
                               codes that descend in every format in blocks, for tables that are looked up
    the plan and uniform bits  six forward passes, four of them fake-quantized
    sequential codes           of both, a forward pass of either network, and the rows of each weight in all scales

Memory, at the peak: what the process holds already and the libraries that it will load; the weights with their codes;
and the largest of the second moments of all layers' inputs, with a few matrices as large as the largest of them, the
tensors of the passes of the metric, and what sequential rounding keeps of all samples.

Learned rounding, interactions, refinement and budgets on latency and drop come on top, and are named.
"""

import inspect
import math
import time
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hawqfx.allocation.budget import Budget
from hawqfx.analysis.compensation import MOST_COLUMNS
from hawqfx.analysis.table_moments import tables
from hawqfx.compiler import compile, find_sites
from hawqfx.frontend import decoders
from hawqfx.frontend.capture import Model
from hawqfx.frontend.context import Context, silent
from hawqfx.ir.program import Program
from hawqfx.learning.side_by_side import bytes_kept
from hawqfx.maths.block_scales import SETTLED
from hawqfx.maths.rounding import SCALES, SWEEPS
from hawqfx.options import Options, validated
from hawqfx.pass_manager.base import Pass
from hawqfx.passes.calibration import Calibration
from hawqfx.passes.rounding import Rounding
from hawqfx.passes.smoothing import Smoothing
from hawqfx.sensitivity.estimation import PARTS, SAMPLES
from hawqfx.sensitivity.forward import forward
from hawqfx.sensitivity.metrics import SensitivityMetric

_TIMED = 8  # samples of the passes that are timed
_FAKE = 3.0  # a fake-quantized forward pass in forward passes: each tensor is also rounded
_SECOND = 1.7  # a quadratic form of the Hessian in gradients (benchmarks/sensitivity.py)
_FACTORS = 10.0  # for each weight: two halves by three dampings, two that judge, one for all, and their inverses
# of memory; the shares are those of benchmarks/forecast.py
_LIBRARIES = 100e6  # bytes of what is loaded after the capture
_COPIES, _CODES = 1.5, 0.5  # float weights: with a lowered copy; and int8 codes of each format, twice as they are made
_MATRICES = 9.0  # of the largest moment: damped, factored, inverted
_GRADIENT, _PRODUCT = 1.0, 1.75  # tensors of a forward pass that a gradient keeps, and a form of the Hessian
_FIXED = 5.0  # seconds of torch.export's imports and of rewrites


@dataclass(frozen=True)
class Forecast:
    """What a compilation would do.

    Args:
        budget: as text; empty where a plan is followed.
        loss: the loss that is measured, and why.
        samples: that calibrate and are measured.
        weights: sites that are weights.
        activations: sites that are activations.
        metric: the name of the pass that predicts loss increases.
        passes: of how many samples, and of what kind, it will ask.
        seconds: of all, in order of magnitude; a factor of two either way.
        bytes: of memory at the peak, within a third.
        more: options that add to that, which is not foreseen.
    """

    budget: str
    loss: str
    samples: int
    weights: int
    activations: int
    metric: str
    passes: str
    seconds: float
    bytes: float
    more: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        more = f"; {', '.join(self.more)} on top" if self.more else ""
        return (
            f"would choose the bits of {self.weights} weights and {self.activations} activations for {self.budget!r}\n"
            f"loss: {self.loss}\n"
            f"by {self.metric} on {self.samples} samples: {self.passes}\n"
            f"in about {_rounded(self.seconds)} s, a factor of two either way, and {self.bytes / 1e9:.1f} GB{more}"
        )


def _rounded(seconds: float) -> str:
    digits = max(0, int(math.log10(max(1.0, seconds))))
    return f"{round(seconds, -digits):.0f}"


def forecast(model: Model, budget: Budget | str | None, data: Iterable[Any], **options: Any) -> Forecast:
    """What compile() would do with these arguments.

    Args:
        model: as for compile().
        budget: as for compile().
        data: as for compile().
        options: those of compile().

    Raises:
        HawqfxError: as compile() does before anything is measured.
    """
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(compile).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in ("console", "tokens")
    }
    tokens = options.pop("tokens", None)
    if tokens is not None:
        shapes = options.pop("dynamic_shapes", None)
        model, data, _, shapes = decoders.inputs(model, data, None, tokens, options.pop("samples", None), shapes)
        options["dynamic_shapes"] = shapes
    with torch.enable_grad():
        checked = validated(model, budget, data, **{**known, **options, "progress": silent})
        # the sites are as many without the factors of inputs, which take a run over all of the data
        rewrite = [replace(step, given={}) if isinstance(step, Smoothing) else step for step in checked.recipe.rewrite]
        return _of(*find_sites(model, replace(checked, recipe=replace(checked.recipe, rewrite=rewrite))))


def _of(program: Program, options: Options) -> Forecast:
    context, recipe = options.context, options.recipe
    samples = context.samples
    once, gradient = _times(program, context)
    of_weight, of_activation = _formats(recipe.price)
    metric = next((step for step in recipe.measure if isinstance(step, SensitivityMetric)), None)
    kind, seconds = "nothing", 0.0
    name = "the plan that is followed" if options.plan else recipe.measure[0].name
    if metric is not None and options.plan is None:
        pairs = of_weight * len(program.weights) + of_activation * len(program.activations)
        kind, seconds = _of_metric(metric, pairs, samples, once, gradient)
    compensates = any(isinstance(step, Rounding) and step.method != "nearest" for step in recipe.price)
    factor, rows = _solving(program, {site.key for site in program.weights})
    rounding = _FACTORS * (factor + of_weight * rows) if compensates else 0.0
    looked_up = tables(program) if compensates and context.knows_distribution else set()
    if looked_up:
        rounding += samples * gradient + _blocks(recipe.price) * SETTLED * SWEEPS * _solving(program, looked_up)[1]
    total = _FIXED + samples * once * (4 + 2 + 4 * _FAKE) + seconds + rounding
    if recipe.finish:
        total += 2 * (samples * once * (1 + _FAKE) + (len(SCALES) + 2 * SWEEPS) * rows)
    more = [
        text
        for text, there in (
            ("learned rounding", options.learning is not None),
            ("refinement", options.refine > 0),
            ("timing for latency", options.budget is not None and options.budget.latency is not None),
            ("the search for a drop", options.budget is not None and options.budget.drop is not None),
        )
        if there
    ]
    return Forecast(
        "" if options.budget is None else str(options.budget),
        context.loss_reason,
        samples,
        len(program.weights),
        len(program.activations),
        name,
        kind,
        total,
        _peak(program, context, metric if options.plan is None else None, of_weight, compensates, bool(recipe.finish)),
        tuple(more),
    )


def _peak(
    program: Program,
    context: Context,
    metric: SensitivityMetric | None,
    formats: int,
    compensates: bool,
    sequential: bool,
) -> float:
    """Bytes at the peak, where weights have so many formats."""
    moments = (
        [2 * 8 * min(_columns(program, site.key), MOST_COLUMNS) ** 2 for site in program.weights]
        if compensates
        else [0]
    )
    measuring = 0.0
    if metric is not None and not metric.exact:
        size = context.batch or _largest(context)
        if metric.shares_probes:
            size = min(size, -(-context.samples // _parts(metric, context.samples)))
        measuring = (_PRODUCT if metric.second_order else _GRADIENT) * size * program.forward_bytes()
    keeping = bytes_kept(program) * context.samples if sequential else 0
    held = psutil.Process().memory_info().rss + _LIBRARIES
    weights = (_COPIES + _CODES * formats) * program.float_bytes()
    return held + weights + max(sum(moments) + _MATRICES / 2 * max(moments), measuring, keeping)


def _times(program: Program, context: Context) -> tuple[float, float]:
    """Seconds of a forward pass, and of a forward and a backward one, for a sample."""
    batch = context.batches[0]
    if program.dynamic_batch:
        batch = batch.first(_TIMED)

    def plain() -> None:
        with torch.no_grad():
            program.run(batch.args, batch.kwargs)

    def slopes() -> None:
        run = forward(program, batch, {})
        leaves = [leaf for leaf in pytree.tree_leaves(run.output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        total = torch.stack([leaf.float().sum() for leaf in leaves]).sum()
        run.gradients(total, [site.key for site in program.sites], again=False)

    return _fastest(plain) / batch.size, _fastest(slopes) / batch.size


def _fastest(work: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _of_metric(metric: SensitivityMetric, widths: int, samples: int, once: float, gradient: float) -> tuple[str, float]:
    """What a metric asks for in words, and its seconds, for so many widths of all sites."""
    if metric.exact:
        # each begins at its site, in the middle of the network on average
        return f"{widths} forward passes of each sample", widths * samples * once / 2
    count = metric.probes
    if metric.shares_probes:
        parts = _parts(metric, samples)
        return f"{count} backward passes, each on a {parts}th of them", count / parts * samples * gradient
    kind = "Hessian-vector products" if metric.second_order else "backward passes"
    cost = gradient * (_SECOND if metric.second_order else 1.0)
    return f"at most {count} {kind} of each sample", count * samples * cost


def _parts(metric: SensitivityMetric, samples: int) -> int:
    """The parts of the samples that passes are shared out over."""
    return min(metric.probes, max(PARTS, samples // SAMPLES))


def _formats(price: Sequence[Pass]) -> tuple[int, int]:
    """The number of formats that a weight may have, and that an activation may have."""
    known = _calibration(price)
    static = len(known.weight_bits) if {"static", "dynamic"} & set(known.schemes) else 0
    return static + _blocks(price), len(known.activation_bits) if static else 0


def _blocks(price: Sequence[Pass]) -> int:
    """The number of formats in blocks that a weight may have."""
    known = _calibration(price)
    return len(known.blockwise(max(known.blocks))) if "weight-only" in known.schemes else 0


def _calibration(price: Sequence[Pass]) -> Calibration:
    return next((step for step in price if isinstance(step, Calibration)), Calibration())


def _columns(program: Program, key: str) -> int:
    return program.tensor(key)[0].numel()


def _solving(program: Program, keys: Set[str]) -> tuple[float, float]:
    """Seconds of a factor of the second moment of some weights, and of rounding their rows in one format, by the speed
    of a product of matrices."""
    size = 512
    square = torch.randn(size, size, dtype=torch.float64)
    speed = size**3 / _fastest(lambda: square @ square)
    sizes = [(_columns(program, site.key), site.shape[0]) for site in program.weights if site.key in keys]
    sizes = [(min(k, MOST_COLUMNS), rows) for k, rows in sizes]
    return sum(k**3 for k, _ in sizes) / speed, sum(rows * k * k for k, rows in sizes) / speed


def _largest(context: Context) -> int:
    return max(batch.size for batch in context.batches)
