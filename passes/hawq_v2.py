"""HAWQ-V2's metric: the average Hessian trace of the loss times the squared error (sections 3.1 and 3.3, equation 8).

A probe is one Hessian-vector product, which serves every weight and every activation at once.  For an activation, the
Hessian of the mean loss over a batch of N samples is block-diagonal (batch-norm has frozen statistics), and each block
is 1/N of the Hessian of its sample.  So a probe over the whole batch gives the mean of Tr(H_a) over the samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from hawqfx.frontend.context import Context
from hawqfx.ir.program import Program
from hawqfx.maths import curvature
from hawqfx.maths.seeding import generator
from hawqfx.pass_manager.base import option
from hawqfx.sensitivity.double_backward import Operators
from hawqfx.sensitivity.forward import Forward, forward
from hawqfx.sensitivity.metrics import TOLERANCE_DOC, CurvatureMetric
from hawqfx.sensitivity.quantity import Measurement, Quantity


class _Hutchinson(Measurement):
    """The graph of the gradient on one batch, for any number of products."""

    def __init__(self, context: Context, index: int, run: Forward) -> None:
        self.context, self.index, self.run = context, index, run
        loss = context.loss_of(run.output, context.batches[index], index)
        self.hessian = curvature.Hessian(loss, run.tensors, partial(run.check_gradient, index), run.forms)

    def sample(self, probe: int, wanted: Sequence[Quantity]) -> Mapping[Quantity, float]:
        samples = self.hessian.forms({site: partial(self._signs, probe, site) for site, _ in wanted})
        return {quantity: samples[quantity.site] for quantity in wanted}

    def _signs(self, probe: int, site: str) -> list[Tensor]:
        random = generator(self.context.seed, "probe", self.index, probe, site, device=self.context.device)
        return [curvature.rademacher(tensor, random) for tensor in self.run.tensors[site]]

    def worth(self, quantity: Quantity) -> float:
        return self.run.mean_square(quantity.site)


@dataclass(frozen=True)
class HawqV2(CurvatureMetric):
    """The trace of the Hessian, by one Hessian-vector product per probe."""

    probes: int = option(50, "the largest number of Hessian-vector products on a batch; the paper uses 50")
    tolerance: float = option(0.1, TOLERANCE_DOC)
    second_order: ClassVar[bool] = True

    def open(self, program: Program, context: Context, index: int, operators: Operators) -> Measurement:
        return _Hutchinson(context, index, forward(program, context.batches[index], operators, forms=True))
