"""The trace of the Fisher information, which is the Gauss-Newton matrix of the loss, times the squared error.

For labels y drawn from the model's own output distribution and the loss -log p(y), the gradient has mean zero and its
second moment is the Fisher information.  With c independent draws in a batch, over which the loss is the mean,

    Tr(F) = c E ||g||^2,   g the gradient of the batch's loss,

for a weight, and likewise for an activation, whose samples do not mix.  One ordinary backward pass per probe, and no
second derivatives.  Where the loss is -log p and the labels are the model's own, Tr(F) is the expected Tr(H) of HAWQ-V2
(Martens 2020, "New insights and perspectives on the natural gradient method", sections 5 and 9).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hawqfx.errors import LossError
from hawqfx.frontend.context import Context, cross_entropy, generator
from hawqfx.ir.program import Program
from hawqfx.maths import curvature
from hawqfx.sensitivity.double_backward import Operators
from hawqfx.sensitivity.estimation import CurvatureMetric, Forward, Measurement, Quantity, check_gradient, forward


class _Backward(Measurement):
    """Keeps the graph of one forward pass, for any number of backward passes."""

    def __init__(self, context: Context, index: int, run: Forward) -> None:
        self.context, self.index, self.run = context, index, run

    def sample(self, probe: int, wanted: Sequence[Quantity]) -> Mapping[Quantity, float]:
        random = generator(self.context.seed, "drawn", self.index, probe, device=self.context.device)
        target = self.context.drawn(self.run.output, random)
        loss = self.context.loss_at(self.run.output, target, self.index)
        sites = [quantity.site for quantity in wanted]
        gradients = self.run.gradients(loss, sites, again=False)
        for site in sites:
            check_gradient(self.index, site, gradients[site])
        draws = self.context.draws(target, self.index)
        return {q: draws * sum(curvature.dot(g, g) for g in gradients[q.site]) for q in wanted}

    def worth(self, quantity: Quantity) -> float:
        return self.run.mean_square(quantity.site)


@dataclass(frozen=True)
class Fisher(CurvatureMetric):
    """`probes`: the most backward passes per batch.  `tolerance`: see Metric."""

    probes: int = 50
    tolerance: float = 0.1

    def open(self, program: Program, context: Context, index: int, operators: Operators) -> Measurement:
        if context.draw is None and context.loss is not cross_entropy:
            raise LossError(
                "fisher draws targets from the distribution that the loss is the negative logarithm of, and knows only "
                'that of cross-entropy: give draw=, a function of (output, generator), or use sensitivity="hawq-v2"'
            )
        return _Backward(context, index, forward(program, context.batches[index], operators))
