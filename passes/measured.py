"""The loss with one site quantized at a time, minus the float loss: exact, but expensive.

The unit is that of the loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hawqfx.frontend.context import Context
from hawqfx.ir.program import Hook, Program
from hawqfx.ir.quantizers import activation_at, weight_at
from hawqfx.maths.formats import Format
from hawqfx.sensitivity.double_backward import Operators
from hawqfx.sensitivity.metrics import WidthMetric
from hawqfx.sensitivity.quantity import Measurement, Quantity


class _OneAtATime(Measurement):
    """The float loss of one batch, and the loss with any site quantized."""

    def __init__(self, program: Program, context: Context, index: int) -> None:
        self.program, self.context, self.index = program, context, index
        self.nodes = {site.key: site.nodes for site in program.activations}
        batch = context.batches[index]
        with torch.no_grad():
            output = program.run(batch.args, batch.kwargs)
        self.target = context.target_of(output, batch, index)
        self.float_loss = float(context.loss_at(output, self.target, index))

    def sample(self, probe: int, wanted: Sequence[Quantity]) -> Mapping[Quantity, float]:
        return {q: self._loss_with(q.site, q.known_format) - self.float_loss for q in wanted}

    def _loss_with(self, site: str, width: Format) -> float:
        if site not in self.nodes:
            return self._loss({site: weight_at(self.program, site, width)})

        def quantize(node: str, value: Tensor) -> Tensor:
            return activation_at(self.program, site, width, value) if node in self.nodes[site] else value

        return self._loss(hook=quantize)

    @torch.no_grad()
    def _loss(self, tensors: Mapping[str, Tensor] | None = None, hook: Hook | None = None) -> float:
        batch = self.context.batches[self.index]
        output = self.program.run(batch.args, batch.kwargs, hook, tensors)
        return float(self.context.loss_at(output, self.target, self.index))


@dataclass(frozen=True)
class Measured(WidthMetric):
    """The measured loss increase, by one forward pass per site and format."""

    exact: ClassVar[bool] = True

    def open(self, program: Program, context: Context, index: int, operators: Operators) -> Measurement:
        return _OneAtATime(program, context, index)
