"""The expensive truth: the loss with one site quantized at a time, less the float loss.  In the unit of the loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hawqfx.frontend.context import Context
from hawqfx.ir.program import Program, Tap
from hawqfx.ir.quantizers import activation_at, weight_at
from hawqfx.sensitivity.double_backward import Operators
from hawqfx.sensitivity.estimation import Measurement, Quantity, WidthMetric


class _OneAtATime(Measurement):
    def __init__(self, program: Program, context: Context, index: int) -> None:
        self.program, self.context, self.index = program, context, index
        self.nodes = {site.key: site.nodes for site in program.activations}
        self.float_loss = self._loss()

    def sample(self, probe: int, wanted: Sequence[Quantity]) -> Mapping[Quantity, float]:
        return {quantity: self._quantized(*quantity) - self.float_loss for quantity in wanted}

    def _quantized(self, site: str, bits: int) -> float:
        if site not in self.nodes:
            return self._loss({site: weight_at(self.program, site, bits)})

        def quantize(node: str, value: Tensor) -> Tensor:
            return activation_at(self.program, site, bits, value) if node in self.nodes[site] else value

        return self._loss(tap=quantize)

    @torch.no_grad()
    def _loss(self, tensors: Mapping[str, Tensor] | None = None, tap: Tap | None = None) -> float:
        batch = self.context.batches[self.index]
        return float(self.context.loss_of(self.program.run(batch.args, batch.kwargs, tap, tensors), batch, self.index))


@dataclass(frozen=True)
class Measured(WidthMetric):
    exact: ClassVar[bool] = True

    def open(self, program: Program, context: Context, index: int, operators: Operators) -> Measurement:
        return _OneAtATime(program, context, index)
