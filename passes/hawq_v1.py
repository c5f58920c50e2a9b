"""HAWQ-V1's metric, for comparison: the top Hessian eigenvalue of each block times the squared error.

Dong et al., "HAWQ: Hessian AWare Quantization of Neural Networks with Mixed-Precision" (ICCV 2019), section 3.  Power
iteration on the block of one weight at a time gives the eigenvalue of largest magnitude; the metric is its average over
the batches.  The block of an activation is itself block-diagonal, with a block per sample: the metric is the average of
their top eigenvalues.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from hawqfx.frontend.context import Context
from hawqfx.frontend.data import sample_axis
from hawqfx.ir.program import Program
from hawqfx.ir.sites import ActivationSite
from hawqfx.maths import curvature
from hawqfx.maths.seeding import generator
from hawqfx.pass_manager.base import option
from hawqfx.sensitivity.double_backward import Operators
from hawqfx.sensitivity.forward import Forward, forward
from hawqfx.sensitivity.metrics import CurvatureMetric
from hawqfx.sensitivity.quantity import Measurement, Quantity


class _PowerIteration(Measurement):
    """The graph of the gradient on one batch, for power iteration on any block."""

    def __init__(self, metric: "HawqV1", program: Program, context: Context, index: int, run: Forward) -> None:
        self.metric, self.context, self.index, self.run = metric, context, index, run
        self.activations = {site.key for site in program.sites if isinstance(site, ActivationSite)}
        loss = context.loss_of(run.output, context.batches[index], index)
        self.gradients = run.gradients(loss, [site.key for site in program.sites], again=True)
        for site, gradients in self.gradients.items():
            run.check_gradient(index, site, gradients)

    def sample(self, probe: int, wanted: Sequence[Quantity]) -> Mapping[Quantity, float]:
        return {quantity: self._eigenvalue(quantity.site) for quantity in wanted}

    def _eigenvalue(self, site: str) -> float:
        random = generator(self.context.seed, "start", self.index, site, device=self.context.device)
        tensors = self.run.tensors[site]
        start = [torch.randn(x.shape, generator=random, device=x.device, dtype=x.dtype) for x in tensors]
        blocks = self.context.batches[self.index].size if site in self.activations else 1
        axes = [axis for x in tensors if (axis := sample_axis(x, blocks)) is not None]
        assert len(axes) == len(tensors), f"the activation {site} has no batch dimension"
        limits = self.metric.iterations, self.metric.precision
        eigenvalues = curvature.top_eigenvalues(self.gradients[site], tensors, start, axes, blocks, *limits)
        return float(eigenvalues.sum())  # their mean over samples: in the mean loss, a sample already counts 1/N


@dataclass(frozen=True)
class HawqV1(CurvatureMetric):
    """The top eigenvalue of the Hessian, by power iteration."""

    iterations: int = option(20, "the largest number of power iterations on a block")
    precision: float = option(1e-2, "relative change of the eigenvalues below which the power iteration stops")
    exact: ClassVar[bool] = True
    average: ClassVar[bool] = False
    second_order: ClassVar[bool] = True

    def open(self, program: Program, context: Context, index: int, operators: Operators) -> Measurement:
        return _PowerIteration(self, program, context, index, forward(program, context.batches[index], operators))
