"""HAWQ-V2's metric: the average Hessian trace of the loss times the squared error (sections 3.1 and 3.3, equation 8).

One Hessian-vector product per probe serves every weight and every activation at once.  The Hessian of the mean loss
over a batch is block-diagonal over its samples for an activation (batch-norm has frozen statistics), each block 1/N of
that sample's own, so one probe over the whole batch gives the mean over the samples of Tr(H_a).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from hawqfx.frontend.context import Context, generator
from hawqfx.ir.program import Program
from hawqfx.maths import curvature
from hawqfx.sensitivity.double_backward import Operators
from hawqfx.sensitivity.estimation import CurvatureMetric, Forward, Measurement, Quantity, check_gradient, forward


class _Hutchinson(Measurement):
    """Keeps the graph of the gradient of one batch, for any number of products."""

    def __init__(self, context: Context, index: int, run: Forward) -> None:
        self.context, self.index, self.run = context, index, run
        loss = context.loss_of(run.output, context.batches[index], index)
        self.hessian = curvature.Hessian(loss, run.tensors, partial(check_gradient, index))

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
    """`probes`: the most Hessian-vector products per batch; the paper uses 50.  `tolerance`: see Metric."""

    probes: int = 50
    tolerance: float = 0.1
    second_order: ClassVar[bool] = True

    def open(self, program: Program, context: Context, index: int, operators: Operators) -> Measurement:
        return _Hutchinson(context, index, forward(program, context.batches[index], operators))
