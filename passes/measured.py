"""The expected loss with one site quantized at a time, minus that of the float network: exact, but expensive.

The unit is that of the loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from hawqfx.frontend.context import Context
from hawqfx.ir.graph import dependents
from hawqfx.ir.program import Program
from hawqfx.ir.quantizers import activation_at, weight_at
from hawqfx.maths.formats import Format
from hawqfx.sensitivity.double_backward import Operators
from hawqfx.sensitivity.metrics import WidthMetric
from hawqfx.sensitivity.quantity import Measurement, Quantity


class _OneAtATime(Measurement):
    """The float values of one batch, and the loss with any site quantized, by the nodes that follow from the site."""

    def __init__(self, program: Program, context: Context, index: int) -> None:
        self.program, self.context, self.index = program, context, index
        self.nodes = {site.key: site.nodes for site in program.activations}
        batch = context.batches[index]
        with torch.no_grad():
            output, self.values = program.values(batch.args, batch.kwargs)
        self.target = context.expected_target(output, batch, index)
        self.float_loss = float(context.loss_at(output, self.target, index))

    def sample(self, probe: int, wanted: Sequence[Quantity]) -> Mapping[Quantity, float]:
        found: dict[Quantity, float] = {}
        by_site = sorted(wanted, key=lambda quantity: quantity.site)
        for site, quantities in groupby(by_site, key=lambda quantity: quantity.site):
            changed = dependents(self.program.graph.graph, self._roots(site))
            known = {node: value for node, value in self.values.items() if node not in changed}
            found |= {q: self._loss_with(site, q.known_format, known) - self.float_loss for q in quantities}
        return found

    def _roots(self, site: str) -> set[fx.Node]:
        """The nodes that read a weight, or make an activation."""
        nodes = self.program.graph.graph.nodes
        if site in self.nodes:
            return {node for node in nodes if node.name in self.nodes[site]}
        return {node for node in nodes if node.op == "get_attr" and node.target == site}

    @torch.no_grad()
    def _loss_with(self, site: str, width: Format, known: Mapping[fx.Node, Any]) -> float:
        def quantize(node: str, value: Tensor) -> Tensor:
            return activation_at(self.program, site, width, value) if node in self.nodes[site] else value

        batch = self.context.batches[self.index]
        hook = quantize if site in self.nodes else None
        tensors = {} if site in self.nodes else {site: weight_at(self.program, site, width)}
        output = self.program.run(batch.args, batch.kwargs, hook, tensors, known=known)
        return float(self.context.loss_at(output, self.target, self.index))


@dataclass(frozen=True)
class Measured(WidthMetric):
    """The measured loss increase, by one forward pass per site and format."""

    exact: ClassVar[bool] = True

    def open(self, program: Program, context: Context, index: int, operators: Operators) -> Measurement:
        return _OneAtATime(program, context, index)
