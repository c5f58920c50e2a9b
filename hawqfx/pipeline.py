"""The recipe: how a captured network becomes an integer one, read from top to bottom.

compile(), measure_latency() and `hawqfx passes` all take their passes from here.  A compilation runs

    validate    hawqfx.options: the arguments, checked
    prepare     rewrite, price
    measure     measure
    decide      decide, finish, lower (a session repeats them for every budget, with AtPlan and LearnedRounding in
                between where plans are refined or codes learned)
    export      legalize
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hawqfx.allocation.budget import Budget
from hawqfx.errors import UsageError
from hawqfx.export.legalize.pipeline import legalization
from hawqfx.pass_manager.base import Analysis, Pass
from hawqfx.passes.allocation import Allocation
from hawqfx.passes.at_plan import AtPlan
from hawqfx.passes.bias_correction import BiasCorrection
from hawqfx.passes.calibration import Calibration
from hawqfx.passes.cost import Cost
from hawqfx.passes.decompose import Decompose
from hawqfx.passes.equalize import Equalize
from hawqfx.passes.find_sites import FindSites
from hawqfx.passes.fisher import Fisher
from hawqfx.passes.float_reference import FloatReference
from hawqfx.passes.fold_batchnorm import FoldBatchnorm
from hawqfx.passes.fold_constants import FoldConstants
from hawqfx.passes.gauss_newton import GaussNewton
from hawqfx.passes.hawq_v1 import HawqV1
from hawqfx.passes.hawq_v2 import HawqV2
from hawqfx.passes.histograms import Histograms
from hawqfx.passes.insert_copies import InsertCopies
from hawqfx.passes.interactions import Interactions
from hawqfx.passes.learned_rounding import LearnedRounding
from hawqfx.passes.lowering import Lowering
from hawqfx.passes.measured import Measured
from hawqfx.passes.mse import Mse
from hawqfx.passes.normalize_tables import NormalizeTables
from hawqfx.passes.perturbation import Perturbation
from hawqfx.passes.rounding import Rounding
from hawqfx.passes.sequential_rounding import SequentialRounding
from hawqfx.passes.smooth_inputs import SmoothInputs
from hawqfx.passes.smoothing import Smoothing
from hawqfx.passes.taylor import Taylor
from hawqfx.sensitivity.metrics import SensitivityMetric


@dataclass(frozen=True)
class Recipe:
    """The passes of a compilation, stage by stage.

    Args:
        rewrite: from the captured graph to one whose sites are known.
        price: the quantizers of every site, their errors, and their costs.
        measure: the loss increase of every site in every format.
        decide: one format per site, within the budget.
        finish: what follows from the formats together.
        lower: the chosen quantizers, in the graph.
        legalize: the form that onnxruntime's kernels take.
    """

    rewrite: Sequence[Pass]
    price: Sequence[Pass]
    measure: Sequence[Pass]
    decide: Sequence[Pass]
    finish: Sequence[Pass]
    lower: Sequence[Pass]
    legalize: Sequence[Pass]

    @property
    def costs(self) -> list[Pass]:
        """The passes among those of `price` that need neither data nor codes."""
        return [step for step in self.price if isinstance(step, Cost)]

    @property
    def prepare(self) -> list[Pass]:
        """The passes that run before anything is measured."""
        return [*self.rewrite, *self.price]

    @property
    def passes(self) -> list[Pass]:
        """All passes, in order."""
        return [*self.prepare, *self.measure, *self.decide, *self.finish, *self.lower, *self.legalize]


def recipe(
    *,
    keep_float: tuple[str, ...] = (),
    smoothing: Smoothing | None = None,
    quantizers: Analysis | None = None,
    rounding: Rounding | None = None,
    metric: Analysis | None = None,
    interactions: bool = False,
    allocation: Allocation | None = None,
    bias_correction: bool = True,
    new_scales: bool = True,
) -> Recipe:
    """The recipe, with default options where none are given.

    Args:
        keep_float: patterns, as in a shell, of the names of weights whose layers stay in float.
        smoothing: Smoothing with its options.
        quantizers: Calibration, or another pass that gives Quantizers.
        rounding: Rounding with its options.
        metric: the pass that predicts loss increases.
        interactions: whether the errors of two weights together are measured too.
        allocation: Allocation with its options.
        bias_correction: whether mean errors are taken out of the biases.
        new_scales: whether rounding chooses scales of weights; not where a plan has them.
    """
    rounding = replace(rounding or Rounding(), scales=new_scales)
    finish: list[Pass] = [BiasCorrection()] * bias_correction
    if rounding.method == "sequential":
        finish = [SequentialRounding(biases=bias_correction, scales=new_scales)]
    return Recipe(
        rewrite=[
            FoldConstants(),
            FoldBatchnorm(),
            FloatReference(),
            Decompose(),
            Equalize(keep_float=keep_float),
            NormalizeTables(keep_float=keep_float),
            InsertCopies(keep_float),
            replace(smoothing or Smoothing(), keep_float=keep_float),
            SmoothInputs(),
            FindSites(keep_float),
        ],
        price=[
            Histograms(),
            quantizers or Calibration(),
            rounding,
            Perturbation(),
            Cost(),
        ],
        measure=[metric or GaussNewton(), *[Interactions()] * interactions],
        decide=[allocation or Allocation(Budget())],
        finish=finish,
        lower=[Lowering()],
        legalize=legalization(),
    )


def profiling(threads: int = 1, shape: Mapping[str, int] | None = None, cache: Path | None = None) -> Sequence[Pass]:
    """The times of a network's parts in onnxruntime at a shape, which a limit on latency needs."""
    from hawqfx.latency.profile_latency import ProfileLatency  # loads onnx and onnxruntime

    return [ProfileLatency(threads, shape, cache)]


def weighing(target: str = "any") -> Sequence[Pass]:
    """The sizes of the exported file's parts, which a limit on size needs."""
    from hawqfx.export.weigh_file import WeighFile  # loads onnx

    return [WeighFile(target)]


# how the loss increase of a site in a format is predicted, by name on the command line
METRICS: Mapping[str, type[Analysis]] = {
    "gauss-newton": GaussNewton,
    "hawq-v2": HawqV2,
    "fisher": Fisher,
    "taylor": Taylor,
    "measured": Measured,
    "mse": Mse,
    "hawq-v1": HawqV1,
}

# sees the direction of each error at the price of backward passes; it draws targets from the model's own distribution
DEFAULT_METRIC = "gauss-newton"
# for losses of which no distribution is known
GENERAL_METRIC = "hawq-v2"


def metric(name: str | Analysis | None, *, drawn: bool = True) -> Analysis:
    """The metric of a name, with default options; a pass stays as it is.

    Args:
        name: of METRICS, or a pass; None: the default.
        drawn: whether targets can be drawn from the model's distribution; if not, the default is the metric that every
            loss has.

    Raises:
        UsageError: if there is no such name.
    """
    if name is None:
        name = DEFAULT_METRIC if drawn else GENERAL_METRIC
    if isinstance(name, Analysis):
        return name
    if not isinstance(name, str) or name not in METRICS:
        raise UsageError(f"sensitivity={name!r}: must be one of {', '.join(METRICS)}, or such a pass")
    return METRICS[name]()


def derivatives(recipe: Recipe) -> int:
    """How often the passes that measure differentiate the loss: 0, 1 or 2 times."""
    metrics = [step for step in recipe.measure if isinstance(step, SensitivityMetric)]
    return max((2 if step.second_order else int(not step.exact) for step in metrics), default=0)


def every_pass() -> list[Pass]:
    """The recipe, then the passes that it takes when asked to."""
    steps = recipe().passes
    optional = [
        *(make() for make in METRICS.values()),
        Interactions(),
        AtPlan(),
        BiasCorrection(),
        LearnedRounding(),
        *weighing(),
        *profiling(),
    ]
    return steps + [step for step in optional if step.name not in {known.name for known in steps}]
