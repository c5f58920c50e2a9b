"""The Taylor expansion of the loss along the quantizers' own errors: g.d + 1/2 d^T H d, d = Q_b(x) - x.

HAWQ-V2 (equation 8) drops the gradient and takes the average of all directions; here both are as they are.  Every site
has its d with a random sign, so one Hessian-vector product per pair of widths gives d_i^T H_ii d_i of all sites at once
(hawqfx.maths.curvature); an activation has a sign per sample.  The unit is that of the loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from hawqfx.frontend.context import Context, generator
from hawqfx.ir.facts import Quantizers
from hawqfx.ir.program import Program, WeightSite
from hawqfx.ir.quantizers import activation_at, weight_at
from hawqfx.maths import curvature
from hawqfx.sensitivity.double_backward import Operators
from hawqfx.sensitivity.estimation import (
    Forward,
    Measurement,
    Quantity,
    WidthMetric,
    check_gradient,
    forward,
    sample_axis,
)


class _Directions(Measurement):
    def __init__(self, program: Program, context: Context, index: int, run: Forward) -> None:
        self.program, self.context, self.index, self.run = program, context, index, run
        self.sites = {site.key: site for site in program.sites}
        self.slopes: dict[Quantity, float] = {}
        loss = context.loss_of(run.output, context.batches[index], index)
        self.hessian = curvature.Hessian(loss, run.tensors, self._note_slopes)

    def sample(self, probe: int, wanted: Sequence[Quantity]) -> Mapping[Quantity, float]:
        found: dict[Quantity, float] = {}
        for together in self._by_rank(wanted):
            found |= self._product(probe, together)
        return found

    def _by_rank(self, wanted: Sequence[Quantity]) -> list[list[Quantity]]:
        """Quantities whose widths share a product: the widest of weights with the widest of activations, and so on,
        so that small errors are not drowned by large ones."""
        ranks: dict[int, list[Quantity]] = {}
        for quantity in wanted:
            widths = sorted(self.program.facts.get(quantity.site, Quantizers).by_bits, reverse=True)
            ranks.setdefault(widths.index(quantity.bits), []).append(quantity)
        return list(ranks.values())

    def _product(self, probe: int, together: Sequence[Quantity]) -> dict[Quantity, float]:
        curved = self.hessian.forms({q.site: partial(self._signed_errors, probe, q) for q in together})
        return {q: self.slopes[q] + 0.5 * curved[q.site] for q in together}

    def _note_slopes(self, site: str, gradients: Sequence[Tensor]) -> None:
        """g.d at every width, while the gradient is there."""
        check_gradient(self.index, site, gradients)
        for bits in self.program.facts.get(site, Quantizers).by_bits:
            errors = self._errors(Quantity(site, bits))
            self.slopes[Quantity(site, bits)] = sum(map(curvature.dot, gradients, errors))

    def _signed_errors(self, probe: int, quantity: Quantity) -> list[Tensor]:
        random = generator(self.context.seed, "sign", self.index, probe, *quantity, device=self.context.device)
        return [error * self._signs(quantity.site, error, random) for error in self._errors(quantity)]

    @torch.no_grad()
    def _errors(self, quantity: Quantity) -> list[Tensor]:
        """Q_b(x) - x for every tensor of the site."""
        tensors = self.run.tensors[quantity.site]
        if isinstance(self.sites[quantity.site], WeightSite):
            return [weight_at(self.program, *quantity) - tensors[0]]
        return [activation_at(self.program, *quantity, x) - x for x in tensors]

    def _signs(self, site: str, error: Tensor, random: torch.Generator) -> Tensor:
        """One sign, or one per sample of an activation."""
        if isinstance(self.sites[site], WeightSite):
            return curvature.rademacher(error.new_empty(()), random)
        samples = self.context.batches[self.index].size
        axis = sample_axis(error, samples)
        signs = curvature.rademacher(error.new_empty(samples), random).repeat_interleave(error.shape[axis] // samples)
        return signs.reshape(-1, *[1] * (error.ndim - 1 - axis))


@dataclass(frozen=True)
class Taylor(WidthMetric):
    """`probes`: the most Hessian-vector products per batch and pair of widths.  `tolerance`: see Metric."""

    probes: int = 50
    tolerance: float = 0.1
    second_order: ClassVar[bool] = True

    def open(self, program: Program, context: Context, index: int, operators: Operators) -> Measurement:
        return _Directions(program, context, index, forward(program, context.batches[index], operators))
