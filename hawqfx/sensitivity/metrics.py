"""Base classes of metrics: analyses that predict the loss increase of a format from samples on the batches."""

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from hawqfx.errors import LossError, UsageError
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import Fact, LossIncrease, QuantizationError, Quantizers, RoundedWeights, Sensitivity
from hawqfx.ir.program import Program
from hawqfx.ir.sites import ActivationSite, WeightSite
from hawqfx.pass_manager.base import Analysis, Kind
from hawqfx.sensitivity.double_backward import Operators
from hawqfx.sensitivity.estimation import estimate
from hawqfx.sensitivity.quantity import Estimate, Measurement, Quantity

log = logging.getLogger(__name__)

# the documentation of the options that metrics share
TOLERANCE_DOC = "relative standard error at which probing of a quantity stops; 0: all probes are drawn"


class SensitivityMetric(Analysis):
    """An analysis that measures quantities on the batches.

    Attributes:
        probes: the largest number of probes on a batch.
        tolerance: probing a quantity stops when its standard error over all batches will be below this fraction of its
            mean, or of the average over all sites of its kind; with 0 all `probes` are drawn.
        second_order: whether the metric needs second derivatives.
        exact: whether one sample is the true value for its batch.
        shares_probes: whether `probes` counts those of all batches together: the samples are parted in a few equal
            parts that share them, and the standard error is that of the spread over the parts.
    """

    probes: int = 1
    tolerance: float = 0.0
    second_order: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    shares_probes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.exact and self.probes < 2:
            raise UsageError(f"probes={self.probes}: a standard error needs at least two")

    @abstractmethod
    def quantities(self, program: Program) -> Sequence[Quantity]:
        """The quantities to measure on a program."""

    @abstractmethod
    def open(self, program: Program, context: Context, index: int, operators: Operators) -> Measurement:
        """Begins the work on one batch.

        Args:
            program: the program to measure.
            context: the batches, the loss and the seed.
            index: number of the batch.
            operators: replacements for operators; empty unless the metric is `second_order`.

        Raises:
            LossError: if the loss or a gradient is not finite on the batch.
        """

    @abstractmethod
    def conclude(self, program: Program, estimates: Mapping[Quantity, Estimate]) -> Program:
        """The program with the facts that follow from the estimates."""

    def learn(self, program: Program, context: Context) -> Program:
        return self.conclude(program, estimate(self, program, context))


class CurvatureMetric(SensitivityMetric):
    """A metric that predicts curvature times squared error, with one quantity per site.

    Attributes:
        average: whether the quantity is a trace, of which every element of the tensor has an equal part.
    """

    average: ClassVar[bool] = True
    needs: ClassVar[tuple[Kind, ...]] = (WeightSite, ActivationSite, QuantizationError)
    gives: ClassVar[tuple[Kind, ...]] = (Sensitivity, LossIncrease)

    def quantities(self, program: Program) -> Sequence[Quantity]:
        return [Quantity(site.key) for site in program.sites]

    def conclude(self, program: Program, estimates: Mapping[Quantity, Estimate]) -> Program:
        _refuse_constant(estimates, "has no curvature at any site: it is constant, or linear in the output")
        sensitivities: dict[str, Fact] = {}
        increases: dict[str, Fact] = {}
        for site in program.sites:
            mean, stderr, probes = estimates[Quantity(site.key)]
            if mean == stderr == 0.0:
                log.warning("the loss has no curvature at %r: it gets sensitivity zero", site.key)
            elements = site.numel if self.average else 1
            sensitivity = Sensitivity(mean / elements, stderr / elements, probes)
            sensitivities[site.key] = sensitivity
            increases[site.key] = sensitivity.times(program.facts.get(site.key, QuantizationError).squared_error)
        return program.learn(sensitivities).learn(increases)


class WidthMetric(SensitivityMetric):
    """A metric with one quantity per site and format: the loss increase itself."""

    needs: ClassVar[tuple[Kind, ...]] = (WeightSite, ActivationSite, Quantizers, RoundedWeights)
    gives: ClassVar[tuple[Kind, ...]] = (LossIncrease,)

    def quantities(self, program: Program) -> Sequence[Quantity]:
        return [
            Quantity(site.key, width)
            for site in program.sites
            for width in program.facts.get(site.key, Quantizers).by_format
        ]

    def conclude(self, program: Program, estimates: Mapping[Quantity, Estimate]) -> Program:
        _refuse_constant(estimates, "changes with no site at any format: it is constant")
        increases: dict[str, Fact] = {}
        for site in program.sites:
            by_format = {q.known_format: value for q, value in estimates.items() if q.site == site.key}
            factor = dict.fromkeys(by_format, 1.0)
            if isinstance(site, WeightSite):  # measured on the samples that its codes are fitted to
                factor = dict(program.facts.get(site.key, RoundedWeights).optimism)
            increases[site.key] = LossIncrease(
                {width: value.mean * factor[width] for width, value in by_format.items()},
                {width: value.stderr * factor[width] for width, value in by_format.items()},
            )
        return program.learn(increases)


def _refuse_constant(estimates: Mapping[Quantity, Estimate], symptom: str) -> None:
    """Raises LossError if every estimate is exactly zero: such a loss says nothing of any site."""
    if all(estimate.mean == estimate.stderr == 0.0 for estimate in estimates.values()):
        raise LossError(
            f"the loss {symptom}, so that no site matters. Cross-entropy of a single output is constant, for example: "
            "give loss= for such a network, as in loss=lambda output, target: (output - target).square().mean() with "
            "data of pairs (inputs, float outputs)"
        )
