"""The trace of the Fisher information, which is the Gauss-Newton matrix of the loss, times the squared error.

For labels y drawn from the model's own output distribution and the loss -log p(y), the gradient has mean zero and its
second moment is the Fisher information.  If the loss of a batch is the mean over c independent draws,

    Tr(F) = c E ||g||^2,   g the gradient of the batch's loss,

for a weight, and also for an activation, because samples do not mix.  A probe is one ordinary backward pass, without
second derivatives.  If the loss is -log p and the labels are drawn from the model, Tr(F) is the expected Tr(H) of
HAWQ-V2 (Martens 2020, "New insights and perspectives on the natural gradient method", sections 5 and 9).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hawqfx.frontend.context import Context
from hawqfx.ir.program import Program
from hawqfx.maths import curvature
from hawqfx.maths.seeding import generator
from hawqfx.pass_manager.base import option
from hawqfx.sensitivity.double_backward import Operators
from hawqfx.sensitivity.forward import Forward, forward
from hawqfx.sensitivity.metrics import TOLERANCE_DOC, CurvatureMetric
from hawqfx.sensitivity.quantity import Measurement, Quantity


class _Backward(Measurement):
    """The graph of one forward pass, for any number of backward passes."""

    def __init__(self, context: Context, index: int, run: Forward) -> None:
        self.context, self.index, self.run = context, index, run

    def sample(self, probe: int, wanted: Sequence[Quantity]) -> Mapping[Quantity, float]:
        random = generator(self.context.seed, "drawn", self.index, probe, device=self.context.device)
        target = self.context.drawn(self.run.output, random, self.context.batches[self.index].target)
        loss = self.context.loss_at(self.run.output, target, self.index)
        sites = [quantity.site for quantity in wanted]
        gradients = self.run.gradients(loss, sites, again=False)
        for site in sites:
            self.run.check_gradient(self.index, site, gradients[site])
        draws = self.context.draws(target, self.index)
        return {q: draws * sum(curvature.dot(g, g) for g in gradients[q.site]) for q in wanted}

    def worth(self, quantity: Quantity) -> float:
        return self.run.mean_square(quantity.site)


@dataclass(frozen=True)
class Fisher(CurvatureMetric):
    """The trace of the Fisher matrix, by one ordinary backward pass per probe."""

    probes: int = option(50, "the largest number of backward passes on a batch")
    tolerance: float = option(0.1, TOLERANCE_DOC)

    def open(self, program: Program, context: Context, index: int, operators: Operators) -> Measurement:
        context.require_distribution(self.name)
        return _Backward(context, index, forward(program, context.batches[index], operators))
