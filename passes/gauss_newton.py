"""Half the Gauss-Newton form of the quantizers' own errors, 1/2 d^T G d with d = Q_b(x) - x, by backward passes alone.

G is the Hessian of the loss without the curvature of the network, which for -log p is the Fisher information (Martens
2020, "New insights and perspectives on the natural gradient method", sections 5 and 9).  For targets drawn from the
model's own distribution, and g the gradient of the mean loss over c independent draws,

    d^T G d = c E[(d . g)^2],

for a weight, and also for an activation, because samples do not mix.  So one ordinary backward pass samples the form of
every site in every format.  HAWQ-V2 (equation 8) takes the mean over all directions, Tr(H)/n ||d||^2, in place of d's
own; errors are not random directions, and the two differ several times between layers.

A sample is c times a squared normal variable, nearly: n of them have a relative standard error of sqrt(2 / n).  Draws
of labels and draws of samples serve the same expectation, so the passes are shared out over the data: each sees one of
a few equal parts of the samples.  The unit is that of the loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hawqfx.frontend.context import Context
from hawqfx.ir.facts import Fact, LossIncrease, Quantizers, Sensitivity
from hawqfx.ir.program import Program
from hawqfx.ir.quantizers import errors_at
from hawqfx.maths import curvature
from hawqfx.maths.formats import Format
from hawqfx.maths.seeding import generator
from hawqfx.pass_manager.base import Kind, option
from hawqfx.sensitivity.batching import free_memory
from hawqfx.sensitivity.double_backward import Operators
from hawqfx.sensitivity.forward import Forward, forward
from hawqfx.sensitivity.metrics import WidthMetric
from hawqfx.sensitivity.quantity import Estimate, Measurement, Quantity

_MOST_KEPT = 1 << 30  # bytes of errors


class _Slopes(Measurement):
    """The graph of one forward pass, for any number of backward passes.

    The errors of all formats are kept from one pass to the next, if they take at most a quarter of the free memory, and
    a gigabyte: those of a language model are as large as the model in each format, and take little time beside the
    backward passes.
    """

    def __init__(self, program: Program, context: Context, index: int, run: Forward) -> None:
        self.program, self.context, self.index, self.run = program, context, index, run
        self.sites = {site.key: site for site in program.sites}
        self.kept: dict[Quantity, list[Tensor]] = {}
        needed = sum(
            len(program.facts.get(key, Quantizers).by_format) * tensor.nbytes
            for key, tensors in run.tensors.items()
            for tensor in tensors
        )
        self.keeps = needed < min(_MOST_KEPT, free_memory(context.device) // 4)

    def sample(self, probe: int, wanted: Sequence[Quantity]) -> Mapping[Quantity, float]:
        random = generator(self.context.seed, "drawn", self.index, probe, device=self.context.device)
        target = self.context.drawn(self.run.output, random, self.context.batches[self.index].target)
        loss = self.context.loss_at(self.run.output, target, self.index)
        gradients = self.run.gradients(loss, list(dict.fromkeys(quantity.site for quantity in wanted)), again=False)
        for site, own in gradients.items():
            self.run.check_gradient(self.index, site, own)
        draws = self.context.draws(target, self.index)
        return {quantity: draws * self._value(quantity, gradients[quantity.site]) for quantity in wanted}

    def _value(self, quantity: Quantity, gradients: Sequence[Tensor]) -> float:
        """g . g over the tensors of a site, or half of (d . g)^2."""
        if quantity.format is None:
            return sum(curvature.dot(g, g) for g in gradients)
        return 0.5 * sum(map(curvature.dot, gradients, self._errors(quantity.site, quantity.format))) ** 2

    def _errors(self, site: str, width: Format) -> list[Tensor]:
        quantity = Quantity(site, width)
        if quantity in self.kept:
            return self.kept[quantity]
        errors = errors_at(self.program, self.sites[site], width, self.run.tensors[site])
        if self.keeps:
            self.kept[quantity] = errors
        return errors


@dataclass(frozen=True)
class GaussNewton(WidthMetric):
    """Half the Gauss-Newton form of each site's own error, and the trace, by ordinary backward passes."""

    probes: int = option(128, "backward passes, shared out over a few equal parts of the samples")
    shares_probes: ClassVar[bool] = True
    gives: ClassVar[tuple[Kind, ...]] = (Sensitivity, LossIncrease)

    def quantities(self, program: Program) -> Sequence[Quantity]:
        return [*(Quantity(site.key) for site in program.sites), *super().quantities(program)]

    def conclude(self, program: Program, estimates: Mapping[Quantity, Estimate]) -> Program:
        sensitivities: dict[str, Fact] = {}
        for site in program.sites:
            mean, stderr, probes = estimates[Quantity(site.key)]
            sensitivities[site.key] = Sensitivity(mean / site.numel, stderr / site.numel, probes)
        forms = {quantity: estimate for quantity, estimate in estimates.items() if quantity.format is not None}
        return super().conclude(program, forms).learn(sensitivities)

    def open(self, program: Program, context: Context, index: int, operators: Operators) -> Measurement:
        context.require_distribution(self.name)
        return _Slopes(program, context, index, forward(program, context.batches[index], operators))
