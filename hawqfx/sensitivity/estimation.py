"""Estimates the quantities of a metric over all batches: draws probes, and stops when the error is small enough.

A metric draws independent samples of each quantity on one batch, one sample per probe.  Every probe is seeded by (seed,
batch, probe, site), and each batch decides alone which quantities need more probes.  So the estimates do not depend on
the order of batches, on restarts, or on the number of processes.
"""

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hawqfx.errors import LossError
from hawqfx.frontend.context import Context
from hawqfx.frontend.data import Batch
from hawqfx.ir.facts import Quantizers, RoundedWeights
from hawqfx.ir.program import Program
from hawqfx.ir.sites import ActivationSite
from hawqfx.maths import curvature
from hawqfx.maths.curvature import Moments
from hawqfx.maths.formats import Format
from hawqfx.pass_manager.base import Kind
from hawqfx.sensitivity.batching import fit_into_memory, parted
from hawqfx.sensitivity.cache import MeasurementCache, digest
from hawqfx.sensitivity.distributed import Team, Workers
from hawqfx.sensitivity.double_backward import Operators, twice_differentiable
from hawqfx.sensitivity.malloc import keep_freed_memory
from hawqfx.sensitivity.quantity import Estimate, Measurement, Quantity

log = logging.getLogger(__name__)

ROUND = 4  # probes between two looks at the standard errors; the processes of a team share a round
# Parts of the data that share probes.  Few samples of a trained network have most of its curvature: with as many parts
# as probes, the probes of these few would be all that counts.  More probes of larger parts cost more.  On ResNet-20 and
# 128 images, 128 probes of 128 parts leave a tau of .90 to the truth, 8 of each of 16 parts .94.  Where samples are
# many, parts of SAMPLES serve as well, and a probe of them costs less.
PARTS, SAMPLES = 16, 32
LEAST = 8  # probes before the first look: fewer may agree by chance, where a sample is one of few values


class Metric(Protocol):
    """A metric as the estimation sees it; hawqfx.sensitivity.metrics has the base classes and describes the members."""

    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> tuple[Kind, ...]: ...
    @property
    def probes(self) -> int: ...
    @property
    def tolerance(self) -> float: ...
    @property
    def second_order(self) -> bool: ...
    @property
    def exact(self) -> bool: ...
    @property
    def shares_probes(self) -> bool: ...
    def quantities(self, program: Program) -> Sequence[Quantity]: ...
    def open(self, program: Program, context: Context, index: int, operators: Operators) -> Measurement: ...


def estimate(metric: Metric, program: Program, context: Context) -> dict[Quantity, Estimate]:
    """Estimates every quantity of a metric over all batches.

    Batches that the cache has are not measured again; the other batches are shared among the processes.

    Args:
        metric: the metric.
        program: the program to measure.
        context: the batches, the loss, the seed and the cache.

    Returns:
        The estimates, in the order of the metric's quantities.

    Raises:
        DerivativeError: if the metric needs second derivatives and an operator has none.
        LossError: if the loss or a gradient is not finite.
        CacheError: if the cache cannot be read or written.
        WorkerError: if the processes measure different things.
    """
    workers = Workers.current(context.device)
    cache = _open_cache(metric, program, context, workers)
    context = fit_into_memory(program, context, workers, cache, second_order=metric.second_order)
    if metric.shares_probes:
        context = parted(program, context, min(metric.probes, max(PARTS, context.samples // SAMPLES)))
    known = _known_batches(cache, context, workers)
    flags = workers.total(torch.tensor([int(index in known) for index in range(len(context.batches))]))
    table = _Table(metric.quantities(program), len(context.batches))
    _measure_batches(metric, program, context, workers, cache, table, [bool(flag) for flag in flags])
    for index, numbers in known.items():
        table.enter(index, {quantity: _Summary(*numbers[str(quantity)]) for quantity in table.quantities})
    return _pooled(metric, context, table.of_all(workers))


class _Summary(NamedTuple):
    """The samples of a quantity on one batch.

    Args:
        samples: their number, a whole number.
        mean: their mean.
        squares: the sum of squared deviations from it.
        error: the relative standard error that they leave.
    """

    samples: float
    mean: float
    squares: float
    error: float


class _Table:
    """The summaries of all quantities on all batches.  A process enters the batches that it measures or reads."""

    def __init__(self, quantities: Sequence[Quantity], batches: int) -> None:
        self.quantities = list(quantities)
        self._numbers = torch.zeros(batches, len(self.quantities), len(_Summary._fields), dtype=torch.float64)

    def enter(self, index: int, summaries: Mapping[Quantity, _Summary]) -> None:
        """Enters the summaries of batch `index`."""
        rows = [summaries[quantity] for quantity in self.quantities]
        self._numbers[index] = torch.tensor(rows, dtype=torch.float64)

    def of_all(self, workers: Workers) -> dict[Quantity, list[_Summary]]:
        """The summaries of each quantity by batch, with the entries of all processes."""
        numbers = workers.total(self._numbers)
        return {
            quantity: [_Summary(*row) for row in numbers[:, column].tolist()]
            for column, quantity in enumerate(self.quantities)
        }


def _open_cache(metric: Metric, program: Program, context: Context, workers: Workers) -> MeasurementCache | None:
    """The cache of this measurement, if the user gives a folder; checks that all processes measure the same."""
    if context.cache is None and workers.count == 1:
        return None
    name = digest(_identity(metric, program, context))
    workers.require_same(name)
    return MeasurementCache.open(context.cache, name) if context.cache is not None else None


def _identity(metric: Metric, program: Program, context: Context) -> list[object]:
    """Everything that the numbers depend on."""
    parts: list[object] = [repr(metric), str(program.graph.graph), program.constants(), context.seed, context.batch]
    parts += [context.criterion.identity, context.device.type, [batch.tensors for batch in context.batches]]
    parts += [[batch.target for batch in context.batches], [repr(site) for site in program.sites]]
    for site in program.sites:
        if Quantizers in metric.needs:
            parts.append(repr(program.facts.get(site.key, Quantizers)))
        if RoundedWeights in metric.needs and not isinstance(site, ActivationSite):
            codes = program.facts.get(site.key, RoundedWeights).codes
            parts.append({str(width): each for width, each in codes.items()})
    return parts


def _known_batches(
    cache: MeasurementCache | None, context: Context, workers: Workers
) -> dict[int, dict[str, list[float]]]:
    """The numbers of each batch that the cache has, in process 0; in the others none, since all are added up.

    Each file is read once: another run may write it, or a disk fail, between two looks.
    """
    if cache is None or workers.rank != 0:
        return {}
    found = {index: cache.get(index, samples) for index, samples in enumerate(_ranges(context))}
    return {index: numbers for index, numbers in found.items() if numbers is not None}


def _ranges(context: Context) -> list[range]:
    """Which of all samples are in each batch."""
    ends = list(itertools.accumulate(batch.size for batch in context.batches))
    return [range(end - batch.size, end) for end, batch in zip(ends, context.batches, strict=True)]


def _measure_batches(
    metric: Metric,
    program: Program,
    context: Context,
    workers: Workers,
    cache: MeasurementCache | None,
    table: _Table,
    cached: Sequence[bool],
) -> None:
    """Measures this process's share of the batches that the cache lacks, and enters them into table and cache."""
    mine, team = workers.share([index for index, known in enumerate(cached) if not known])
    with keep_freed_memory(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be differentiated twice
        operators = twice_differentiable(program, context.batches[0]) if metric.second_order else {}
        task = _Task(metric, program, context, operators, table.quantities, team, len(mine))
        for done, index in enumerate(mine):
            summaries = _measure_batch(task, index, done)
            if team.member == 0:
                table.enter(index, summaries)
                if cache is not None:
                    cache.put(
                        index,
                        _ranges(context)[index],
                        {str(quantity): summary for quantity, summary in summaries.items()},
                    )


@dataclass(frozen=True)
class _Task:
    """The work of a team of processes.

    Args:
        metric: the metric.
        program: the program.
        context: with batches that fit into memory.
        operators: replacements for operators, for second derivatives.
        quantities: to measure.
        team: the processes that share each batch.
        batches: the number of batches of the team.
    """

    metric: Metric
    program: Program
    context: Context
    operators: Operators
    quantities: Sequence[Quantity]
    team: Team
    batches: int

    @property
    def probes(self) -> int:
        """The largest number of probes on a batch."""
        if self.metric.shares_probes:
            return math.ceil(self.metric.probes / len(self.context.batches))
        return self.metric.probes

    def report(self, done: int, probe: int, note: str = "") -> None:
        """Tells the progress: after `done` batches and some probes of the next one."""
        probes = self.probes
        self.context.progress(self.metric.name, done * probes + probe, self.batches * probes, note)

    def share(self, index: int) -> float:
        """The part of all samples that is in batch `index`."""
        return self.context.batches[index].size / self.context.samples


def _measure_batch(task: _Task, index: int, done: int) -> dict[Quantity, _Summary]:
    """Draws probes on batch `index` until every quantity is known well enough, or `task.probes` are drawn."""
    metric = task.metric
    task.report(done, 0)
    measurement = _open_measurement(task, index)
    worth = {quantity: measurement.worth(quantity) for quantity in task.quantities}
    samples: dict[Quantity, list[float]] = {quantity: [] for quantity in task.quantities}
    errors = dict.fromkeys(task.quantities, 0.0)
    wanted, probe, note = list(task.quantities), 0, ""
    while wanted and probe < task.probes:
        count = min(ROUND, task.probes - probe)
        for quantity, drawn in _draw(measurement, task.team, probe, count, wanted).items():
            samples[quantity] += drawn
        probe += count
        errors = _relative_errors(task, samples, worth, task.share(index))
        if metric.tolerance > 0 and probe >= LEAST:
            wanted = [quantity for quantity in wanted if errors[quantity] > metric.tolerance]
        note = "" if metric.exact or not errors else f"+-{max(errors.values()):.0%}"
        task.report(done, probe, note)
    task.report(done + 1, 0, note)
    return {quantity: _Summary(*Moments.of(values), errors[quantity]) for quantity, values in samples.items()}


def _open_measurement(task: _Task, index: int) -> Measurement:
    """The metric at work on batch `index`; an error of the loss gains a note with the first tensor that overflows."""
    try:
        return task.metric.open(task.program, task.context, index, task.operators)
    except LossError as error:
        culprit = _first_not_finite(task.program, task.context.batches[index])
        if culprit is not None:
            error.add_note(f"the first tensor that is not finite there is {culprit!r}")
        raise


@torch.no_grad()
def _first_not_finite(program: Program, batch: Batch) -> str | None:
    """What users call the first activation that is not finite."""
    names = {name: site.name for site in program.activations for name in site.tensors}
    found: list[str] = []

    def check(node: str, value: Tensor) -> Tensor:
        if not bool(torch.isfinite(value).all()):
            found.append(names[node])
        return value

    program.run(batch.args, batch.kwargs, check)
    return found[0] if found else None


def _draw(
    measurement: Measurement, team: Team, start: int, count: int, wanted: Sequence[Quantity]
) -> dict[Quantity, list[float]]:
    """The samples of `count` probes from number `start`, which the processes of a team share out."""
    block = torch.zeros(count, len(wanted), dtype=torch.float64)
    for row in range(team.member, count, team.size):
        drawn = measurement.sample(start + row, wanted)
        block[row] = torch.tensor([drawn[quantity] for quantity in wanted], dtype=torch.float64)
    return dict(zip(wanted, team.total(block).T.tolist(), strict=True))


def _relative_errors(
    task: _Task, samples: Mapping[Quantity, Sequence[float]], worth: Mapping[Quantity, float], share: float
) -> dict[Quantity, float]:
    """The relative standard errors that all batches together would leave if they were like this one.

    An error is relative to the quantity's own mean or to the average of its kind, whichever is larger.
    """
    if task.metric.exact or task.metric.shares_probes:  # nothing stops early
        return dict.fromkeys(samples, 0.0)
    moments = {quantity: Moments.of(values) for quantity, values in samples.items()}
    sizes = {quantity: worth[quantity] * abs(part.mean) for quantity, part in moments.items()}
    averages = _averages_by_kind(task.program, sizes)
    errors = {}
    for quantity, part in moments.items():
        reference = max(sizes[quantity], averages[quantity])
        error = worth[quantity] * math.sqrt(part.variance * share)
        errors[quantity] = error / reference if reference > 0 else math.inf * error if error else 0.0
    return errors


def _averages_by_kind(program: Program, sizes: Mapping[Quantity, float]) -> dict[Quantity, float]:
    """For each quantity, the average size over the sites of its kind (weight or activation) in its format."""
    is_activation = {site.key: isinstance(site, ActivationSite) for site in program.sites}
    kinds: dict[tuple[bool, Format | None], list[float]] = {}
    for quantity, size in sizes.items():
        kinds.setdefault((is_activation[quantity.site], quantity.format), []).append(size)
    averages = {kind: math.fsum(values) / len(values) for kind, values in kinds.items()}
    return {quantity: averages[is_activation[quantity.site], quantity.format] for quantity in sizes}


def _pooled(
    metric: Metric, context: Context, summaries: Mapping[Quantity, Sequence[_Summary]]
) -> dict[Quantity, Estimate]:
    """The estimates over all batches; warns of quantities that are not known as well as the tolerance asks."""
    shares = [batch.size / context.samples for batch in context.batches]
    estimates, errors = {}, {}
    for quantity, batches in summaries.items():
        parts = [Moments(int(part.samples), part.mean, part.squares) for part in batches]
        if metric.shares_probes:
            mean, stderr = curvature.spread(parts, shares)
        else:
            mean, stderr = curvature.pooled(parts, shares, exact=metric.exact)
        estimates[quantity] = Estimate(mean, stderr, min(part.samples for part in parts))
        errors[quantity] = math.sqrt(sum(share * part.error**2 for share, part in zip(shares, batches, strict=True)))
    _warn_of_errors(metric, errors)
    return estimates


def _warn_of_errors(metric: Metric, errors: Mapping[Quantity, float]) -> None:
    loose = sorted((q for q in errors if errors[q] > metric.tolerance > 0), key=lambda q: -errors[q])
    if loose:
        log.warning(
            "%s: %d of %d quantities have a standard error over %.0f%% after %d probes a batch, the worst %s: "
            "%.0f%%; more probes or more data make it smaller",
            metric.name, len(loose), len(errors), 100 * metric.tolerance, metric.probes, loose[0].site,
            100 * errors[loose[0]],
        )  # fmt: skip
