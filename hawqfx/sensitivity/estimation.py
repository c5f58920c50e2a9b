"""Measures quantities of sites on every batch: seeded, stopped when known well enough, restartable, on any number of
processes.

A metric draws independent samples of each quantity on one batch, a probe at a time.  Every probe is seeded by (seed,
batch, probe, site), and whether a quantity needs more probes is decided within its batch, so the result depends on no
order of batches, no restart and no number of processes.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hawqfx.errors import HawqfxError, LossError
from hawqfx.frontend.context import Batch, Context
from hawqfx.ir.facts import Fact, LossIncrease, QuantizationError, Quantizers, RoundedWeights, Sensitivity
from hawqfx.ir.program import ActivationSite, Program, WeightSite
from hawqfx.maths import curvature
from hawqfx.maths.curvature import Moments
from hawqfx.pass_manager.base import Analysis, Kind
from hawqfx.sensitivity import malloc
from hawqfx.sensitivity.cache import MeasurementCache, digest
from hawqfx.sensitivity.distributed import Team, Workers, local_count
from hawqfx.sensitivity.double_backward import Operators, twice_differentiable

log = logging.getLogger(__name__)

ROUND = 4  # probes between two looks at the standard errors; the processes of a team share a round
LEAST = 8  # probes before the first look: fewer may agree by chance, where a sample is one of few values


class Quantity(NamedTuple):
    """What is measured of a site; `bits` is 0 for what belongs to no one width."""

    site: str
    bits: int = 0

    def __str__(self) -> str:
        return f"{self.bits} {self.site}"


class Estimate(NamedTuple):
    """A mean over the data, its standard error over the probes, and the fewest probes on a batch."""

    mean: float
    stderr: float
    probes: int


class Measurement(ABC):
    """A metric at work on one batch."""

    @abstractmethod
    def sample(self, probe: int, wanted: Sequence[Quantity]) -> Mapping[Quantity, float]:
        """An independent, unbiased sample of every quantity wanted, for the batch as a whole."""

    def worth(self, quantity: Quantity) -> float:
        """What a unit of the quantity is worth beside those of other sites of the same kind and width."""
        return 1.0


class SensitivityMetric(Analysis):
    """An analysis that measures.  Its fields and the class variables here say how.

    probes: the most probes per batch.  tolerance: probing a quantity stops when its standard error over all batches
    will be below this fraction of its mean, or of the average over all sites of its kind; 0: never before `probes`.
    second_order: needs second derivatives.  exact: one sample is the truth for its batch.
    """

    probes: int = 1
    tolerance: float = 0.0
    second_order: ClassVar[bool] = False
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.exact and self.probes < 2:
            raise HawqfxError(f"probes={self.probes}: a standard error needs at least two")

    @abstractmethod
    def quantities(self, program: Program) -> Sequence[Quantity]: ...

    @abstractmethod
    def open(self, program: Program, context: Context, index: int, operators: Operators) -> Measurement: ...

    @abstractmethod
    def conclude(self, program: Program, context: Context, found: Mapping[Quantity, Estimate]) -> Program:
        """The program with the facts that follow."""

    def learn(self, program: Program, context: Context) -> Program:
        return self.conclude(program, context, measure(self, program, context))


class CurvatureMetric(SensitivityMetric):
    """A metric that predicts curvature x squared error, with one quantity per site.

    average: the quantity is a trace, of which every element of the tensor has its share.
    """

    average: ClassVar[bool] = True
    needs: ClassVar[tuple[Kind, ...]] = (WeightSite, ActivationSite, QuantizationError)
    gives: ClassVar[tuple[Kind, ...]] = (Sensitivity, LossIncrease)

    def quantities(self, program: Program) -> Sequence[Quantity]:
        return [Quantity(site.key) for site in program.sites]

    def conclude(self, program: Program, context: Context, found: Mapping[Quantity, Estimate]) -> Program:
        facts: dict[str, Fact] = {}
        for site in program.sites:
            mean, stderr, probes = found[Quantity(site.key)]
            if mean == stderr == 0.0:
                log.warning("the loss has no curvature at %r: it gets sensitivity zero", site.key)
            share = site.numel if self.average else 1
            facts[site.key] = Sensitivity(mean / share, stderr / share, probes)
        increases: dict[str, Fact] = {
            key: fact.times(program.facts.get(key, QuantizationError).squared_error)
            for key, fact in facts.items()
            if isinstance(fact, Sensitivity)
        }
        return program.learn(facts).learn(increases)


class WidthMetric(SensitivityMetric):
    """A metric with one quantity per site and width, the loss increase itself."""

    needs: ClassVar[tuple[Kind, ...]] = (WeightSite, ActivationSite, Quantizers, RoundedWeights)
    gives: ClassVar[tuple[Kind, ...]] = (LossIncrease,)

    def quantities(self, program: Program) -> Sequence[Quantity]:
        return [Quantity(s.key, bits) for s in program.sites for bits in program.facts.get(s.key, Quantizers).by_bits]

    def conclude(self, program: Program, context: Context, found: Mapping[Quantity, Estimate]) -> Program:
        facts: dict[str, Fact] = {}
        for site in program.sites:
            widths = {q.bits: estimate for q, estimate in found.items() if q.site == site.key}
            facts[site.key] = LossIncrease(
                {bits: estimate.mean for bits, estimate in widths.items()},
                {bits: estimate.stderr for bits, estimate in widths.items()},
            )
        return program.learn(facts)


def measure(metric: SensitivityMetric, program: Program, context: Context) -> dict[Quantity, Estimate]:
    """Every quantity of the metric, over all batches of the study.

    Raises DerivativeError, LossError, CacheError or WorkerError.
    """
    quantities = list(metric.quantities(program))
    workers = Workers.here(context.device)
    cache = None
    if context.cache is not None or workers.count > 1:
        name = digest(_identity(metric, program, context))
        workers.agree(name)
        cache = MeasurementCache.open(context.cache, name) if context.cache is not None else None
    context = _split(metric, program, context, workers, cache)
    kept = _kept(cache, len(context.batches), workers)
    mine, team = workers.share([index for index, have in enumerate(kept) if not have])
    table = torch.zeros(len(context.batches), len(quantities), len(_Known._fields), dtype=torch.float64)
    with malloc.kept(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be differentiated twice
        operators = twice_differentiable(program, context.batches[0]) if metric.second_order else {}
        for done, index in enumerate(mine):
            known = _on_batch(_Task(metric, program, context, operators, quantities, team), index, done, len(mine))
            if team.member == 0:
                table[index] = torch.tensor([known[quantity] for quantity in quantities], dtype=torch.float64)
                if cache is not None:
                    cache.put(index, {str(quantity): part for quantity, part in known.items()})
    if cache is not None and workers.rank == 0:
        for index, have in enumerate(kept):
            if have:
                found = cache.get(index) or {}
                table[index] = torch.tensor([found[str(q)] for q in quantities], dtype=torch.float64)
    table = workers.total(table)
    everything = {q: [_Known(*row) for row in table[:, number].tolist()] for number, q in enumerate(quantities)}
    return _estimates(metric, context, everything)


class _Known(NamedTuple):
    """What is known of a quantity on one batch: moments of its samples, and the relative error that they leave."""

    samples: float
    mean: float
    squares: float
    error: float


def _estimates(
    metric: SensitivityMetric, context: Context, known: Mapping[Quantity, Sequence[_Known]]
) -> dict[Quantity, Estimate]:
    """The mean over all batches; says aloud which quantities are not known as well as asked."""
    shares = [batch.size / context.samples for batch in context.batches]
    estimates, errors = {}, {}
    for quantity, batches in known.items():
        parts = [Moments(int(part.samples), part.mean, part.squares) for part in batches]
        mean, stderr = curvature.pooled(parts, shares, exact=metric.exact)
        estimates[quantity] = Estimate(mean, stderr, min(part.samples for part in parts))
        errors[quantity] = math.sqrt(sum(share * part.error**2 for share, part in zip(shares, batches, strict=True)))
    loose = sorted((q for q in errors if errors[q] > metric.tolerance > 0), key=lambda q: -errors[q])
    if loose:
        log.warning(
            "%s: %d of %d quantities have a standard error over %.0f%% after %d probes a batch, the worst %s: "
            "%.0f%%; more probes or more data make it smaller",
            metric.name, len(loose), len(known), 100 * metric.tolerance, metric.probes, loose[0].site,
            100 * errors[loose[0]],
        )  # fmt: skip
    return estimates


def _identity(metric: SensitivityMetric, program: Program, context: Context) -> list[object]:
    """Everything that the numbers depend on."""
    parts: list[object] = [repr(metric), str(program.graph.graph), program.constants(), context.seed, context.batch]
    parts += [context.loss, context.draw, context.device.type, [batch.tensors for batch in context.batches]]
    parts += [[batch.target for batch in context.batches], [repr(site) for site in program.sites]]
    for site in program.sites:
        if Quantizers in metric.needs:
            parts.append(repr(program.facts.get(site.key, Quantizers)))
        if RoundedWeights in metric.needs and not isinstance(site, ActivationSite):
            parts.append(dict(program.facts.get(site.key, RoundedWeights).codes))
    return parts


def _kept(cache: MeasurementCache | None, batches: int, workers: Workers) -> list[bool]:
    """Which batches the shelf has, as process 0 sees it."""
    have = torch.zeros(batches, dtype=torch.int64)
    if cache is not None and workers.rank == 0:
        have = torch.tensor([int(cache.get(index) is not None) for index in range(batches)])
    return [bool(flag) for flag in workers.total(have)]


@dataclass(frozen=True)
class _Task:
    metric: SensitivityMetric
    program: Program
    context: Context
    operators: Operators
    quantities: Sequence[Quantity]
    team: Team


def _on_batch(task: _Task, index: int, done: int, batches: int) -> dict[Quantity, _Known]:
    metric, context, team = task.metric, task.context, task.team
    share = context.batches[index].size / context.samples
    context.progress(metric.name, done * metric.probes, batches * metric.probes)
    try:
        measurement = metric.open(task.program, context, index, task.operators)
    except LossError as error:
        culprit = _first_not_finite(task.program, context.batches[index])
        if culprit is not None:
            error.add_note(f"the first tensor that is not finite there is {culprit!r}")
        raise
    worth = {quantity: measurement.worth(quantity) for quantity in task.quantities}
    samples: dict[Quantity, list[float]] = {quantity: [] for quantity in task.quantities}
    wanted, probe, worst = list(task.quantities), 0, ""
    errors = dict.fromkeys(task.quantities, 0.0)
    while wanted and probe < metric.probes:
        count = min(ROUND, metric.probes - probe)
        block = torch.zeros(count, len(wanted), dtype=torch.float64)
        for k in range(team.member, count, team.size):
            drawn = measurement.sample(probe + k, wanted)
            block[k] = torch.tensor([drawn[quantity] for quantity in wanted], dtype=torch.float64)
        for quantity, column in zip(wanted, team.total(block).T.tolist(), strict=True):
            samples[quantity] += column
        probe += count
        errors = _relative_errors(task, samples, worth, share)
        if metric.tolerance > 0 and probe >= LEAST:
            wanted = [quantity for quantity in wanted if errors[quantity] > metric.tolerance]
        worst = "" if metric.exact or not errors else f"+-{max(errors.values()):.0%}"
        context.progress(metric.name, done * metric.probes + probe, batches * metric.probes, worst)
    context.progress(metric.name, (done + 1) * metric.probes, batches * metric.probes, worst)
    return {quantity: _Known(*Moments.of(values), errors[quantity]) for quantity, values in samples.items()}


@torch.no_grad()
def _first_not_finite(program: Program, batch: Batch) -> str | None:
    found: list[str] = []

    def look(node: str, value: Tensor) -> Tensor:
        if not bool(torch.isfinite(value).all()):
            found.append(node)
        return value

    program.run(batch.args, batch.kwargs, look)
    return found[0] if found else None


def _relative_errors(
    task: _Task, samples: Mapping[Quantity, Sequence[float]], worth: Mapping[Quantity, float], share: float
) -> dict[Quantity, float]:
    """The standard error that every quantity would have over all batches, if they were like this one, relative to its
    own mean or to the average of its kind, whichever is larger."""
    if task.metric.exact:
        return dict.fromkeys(samples, 0.0)
    moments = {quantity: Moments.of(values) for quantity, values in samples.items()}
    kind = {site.key: isinstance(site, ActivationSite) for site in task.program.sites}
    by_kind: dict[tuple[bool, int], list[float]] = {}
    for quantity, part in moments.items():
        by_kind.setdefault((kind[quantity.site], quantity.bits), []).append(worth[quantity] * abs(part.mean))
    errors = {}
    for quantity, part in moments.items():
        contributions = by_kind[kind[quantity.site], quantity.bits]
        average = math.fsum(contributions) / len(contributions)
        yardstick = max(worth[quantity] * abs(part.mean), average)
        error = worth[quantity] * math.sqrt(part.variance * share)
        errors[quantity] = error / yardstick if yardstick > 0 else math.inf * error if error else 0.0
    return errors


def _split(
    metric: SensitivityMetric, program: Program, context: Context, workers: Workers, cache: MeasurementCache | None
) -> Context:
    """The study in batches that memory holds: as small as the user says, or as free memory asks."""
    largest = max(batch.size for batch in context.batches)
    if not program.dynamic_batch:
        if context.batch is not None and context.batch < largest:
            raise HawqfxError(
                f"batch={context.batch}: the exported program has a fixed batch of {largest}: use dynamic_shapes"
            )
        return context
    wanted = min(context.batch or _fitting(metric, program, context, largest), largest)
    wanted = workers.from_first(wanted)
    if cache is not None:
        if workers.rank == 0:
            wanted = cache.batch_size(wanted)
        wanted = workers.from_first(wanted)
    if wanted >= largest:
        return context
    if not context.batch:
        log.info("batches of %d samples are measured in parts of %d, to fit into memory", largest, wanted)
    return replace(context, batches=tuple(piece for batch in context.batches for piece in batch.split(wanted)))


# bytes at the peak per byte of the forward pass, rounded up from what benchmarks/sensitivity.py measures: 2.1 for a
# Hessian-vector product of ResNet-50, 1.9 for ResNet-20
_ALIVE = {False: 2, True: 3}


def _fitting(metric: SensitivityMetric, program: Program, context: Context, largest: int) -> int:
    """The largest part of a batch, by halves, whose measurement fits into half of the free memory."""
    free = _free_memory(context.device)
    sample = program.forward_bytes() * _ALIVE[metric.second_order]
    size = largest
    while free is not None and size > 1 and size * sample > free / 2:
        size = -(-size // 2)
    return size


def _free_memory(device: torch.device) -> int | None:
    """Bytes for this process; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return 1024 * int(available.split()[1]) // local_count()


@dataclass(frozen=True)
class Forward:
    """One forward pass with its graph: the output, and the tensors of every site."""

    output: object
    tensors: Mapping[str, list[Tensor]]

    def gradients(self, loss: Tensor, sites: Sequence[str], *, again: bool) -> dict[str, list[Tensor]]:
        """Those of the tensors of some sites; `again`: ready to be differentiated once more."""
        tensors = [tensor for site in sites for tensor in self.tensors[site]]
        found = iter(curvature.gradient(loss, tensors, again=again))
        return {site: [next(found) for _ in self.tensors[site]] for site in sites}

    def mean_square(self, site: str) -> float:
        """Of the site's elements: what a unit of trace is worth, since at equal bits the squared error per element is
        proportional to it."""
        tensors = [tensor.detach() for tensor in self.tensors[site]]
        return sum(curvature.dot(x, x) for x in tensors) / sum(x.numel() for x in tensors)


def forward(program: Program, batch: Batch, operators: Operators) -> Forward:
    """Runs the model so that a loss of its output can be differentiated by the tensors of all sites.

    For an activation the derivative is that by a perturbation added to the tensor.
    """
    weights = {site.key: program.tensor(site.key).detach().requires_grad_() for site in program.weights}
    tensors: dict[str, list[Tensor]] = {key: [weight] for key, weight in weights.items()}
    site_of = {node: site.key for site in program.activations for node in site.nodes}

    def look(node: str, value: Tensor) -> Tensor:
        if not value.requires_grad:
            value = value.detach().requires_grad_()
        tensors.setdefault(site_of[node], []).append(value)
        return value

    with torch.enable_grad():
        output = program.run(batch.args, batch.kwargs, look, weights, operators=operators)
    return Forward(output, tensors)


def check_gradient(index: int, site: str, gradients: Sequence[Tensor]) -> None:
    """Raises LossError that names the site if its gradient is not finite.  Sites come in the order of the graph."""
    if not all(map(curvature.is_finite, gradients)):
        raise LossError(f"the gradient at {site!r} is not finite on batch {index}: the loss overflows there")


def sample_axis(tensor: Tensor, samples: int) -> int:
    """The dimension of a tensor that the batch is part of: the first that it divides."""
    return next(axis for axis, size in enumerate(tensor.shape) if size % samples == 0)
