"""HAWQ-V1's metric, to compare with: the top Hessian eigenvalue of each block times the squared error.

Dong et al., "HAWQ: Hessian AWare Quantization of Neural Networks with Mixed-Precision" (ICCV 2019), section 3.  The
eigenvalue is that of largest magnitude, by power iteration on the block of one weight at a time, averaged over the
batches; for an activation, whose block is again block-diagonal, it is averaged over the samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from hawqfx.frontend.context import Context, generator
from hawqfx.ir.program import ActivationSite, Program
from hawqfx.maths import curvature
from hawqfx.sensitivity.double_backward import Operators
from hawqfx.sensitivity.estimation import (
    CurvatureMetric,
    Forward,
    Measurement,
    Quantity,
    check_gradient,
    forward,
    sample_axis,
)


class _Power(Measurement):
    def __init__(self, metric: "HawqV1", program: Program, context: Context, index: int, run: Forward) -> None:
        self.metric, self.context, self.index, self.run = metric, context, index, run
        self.activations = {site.key for site in program.sites if isinstance(site, ActivationSite)}
        loss = context.loss_of(run.output, context.batches[index], index)
        self.gradients = run.gradients(loss, [site.key for site in program.sites], again=True)
        for site, gradients in self.gradients.items():
            check_gradient(index, site, gradients)

    def sample(self, probe: int, wanted: Sequence[Quantity]) -> Mapping[Quantity, float]:
        return {quantity: self._eigenvalue(quantity.site) for quantity in wanted}

    def _eigenvalue(self, site: str) -> float:
        random = generator(self.context.seed, "start", self.index, site, device=self.context.device)
        tensors = self.run.tensors[site]
        start = [torch.randn(x.shape, generator=random, device=x.device, dtype=x.dtype) for x in tensors]
        blocks = self.context.batches[self.index].size if site in self.activations else 1
        axes = [sample_axis(x, blocks) for x in tensors]
        limits = self.metric.iterations, self.metric.precision
        eigenvalues = curvature.top_eigenvalues(self.gradients[site], tensors, start, axes, blocks, *limits)
        return float(eigenvalues.sum())  # of the mean loss over the batch, in which a sample counts 1/N


@dataclass(frozen=True)
class HawqV1(CurvatureMetric):
    """`iterations`: the most per block; stops earlier when the eigenvalues change by less than `precision`."""

    iterations: int = 20
    precision: float = 1e-2
    exact: ClassVar[bool] = True
    average: ClassVar[bool] = False
    second_order: ClassVar[bool] = True

    def open(self, program: Program, context: Context, index: int, operators: Operators) -> Measurement:
        return _Power(self, program, context, index, forward(program, context.batches[index], operators))
