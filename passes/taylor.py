"""The Taylor expansion of the loss along the quantizers' own errors: g.d + 1/2 d^T H d, d = Q_b(x) - x.

HAWQ-V2 (equation 8) drops the gradient and averages over all directions; this metric does neither.  The d of every site
gets a random sign, and that of an activation a sign per sample.  So one Hessian-vector product gives d_i^T H_ii d_i of
all sites at once, in one format of each (hawqfx.maths.curvature).  The unit is that of the loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from hawqfx.frontend.context import Context
from hawqfx.frontend.data import sample_axis
from hawqfx.ir.facts import Quantizers
from hawqfx.ir.program import Program
from hawqfx.ir.quantizers import errors_at
from hawqfx.ir.sites import WeightSite
from hawqfx.maths import curvature
from hawqfx.maths.seeding import generator
from hawqfx.pass_manager.base import option
from hawqfx.sensitivity.double_backward import Operators
from hawqfx.sensitivity.forward import Forward, forward
from hawqfx.sensitivity.metrics import TOLERANCE_DOC, WidthMetric
from hawqfx.sensitivity.quantity import Measurement, Quantity


class _Directions(Measurement):
    """The graph of the gradient on one batch, and the slopes g.d of all quantities."""

    def __init__(self, program: Program, context: Context, index: int, run: Forward) -> None:
        self.program, self.context, self.index, self.run = program, context, index, run
        self.sites = {site.key: site for site in program.sites}
        self.slopes: dict[Quantity, float] = {}
        target = context.expected_target(run.output, context.batches[index], index)
        loss = context.loss_at(run.output, target, index)
        self.hessian = curvature.Hessian(loss, run.tensors, self._note_slopes, run.forms)

    def sample(self, probe: int, wanted: Sequence[Quantity]) -> Mapping[Quantity, float]:
        samples: dict[Quantity, float] = {}
        for together in self._by_rank(wanted):
            samples |= self._product(probe, together)
        return samples

    def _by_rank(self, wanted: Sequence[Quantity]) -> list[list[Quantity]]:
        """The quantities that share a product: those in the best format of each site, then in the second best, etc.

        So small errors do not drown in large ones.
        """
        ranks: dict[int, list[Quantity]] = {}
        for quantity in wanted:
            widths = sorted(self.program.facts.get(quantity.site, Quantizers).by_format, reverse=True)
            ranks.setdefault(widths.index(quantity.known_format), []).append(quantity)
        return list(ranks.values())

    def _product(self, probe: int, together: Sequence[Quantity]) -> dict[Quantity, float]:
        curved = self.hessian.forms({q.site: partial(self._signed_errors, probe, q) for q in together})
        return {q: self.slopes[q] + 0.5 * curved[q.site] for q in together}

    def _note_slopes(self, site: str, gradients: Sequence[Tensor]) -> None:
        """Computes g.d in every format, because the gradient is not kept."""
        self.run.check_gradient(self.index, site, gradients)
        for width in self.program.facts.get(site, Quantizers).by_format:
            errors = self._errors(Quantity(site, width))
            self.slopes[Quantity(site, width)] = sum(map(curvature.dot, gradients, errors))

    def _signed_errors(self, probe: int, quantity: Quantity) -> list[Tensor]:
        # formats with equal bits may share their signs: only the sites of one product need independent signs
        key = "sign", self.index, probe, quantity.site, quantity.known_format.bits
        random = generator(self.context.seed, *key, device=self.context.device)
        return [error * self._signs(quantity.site, error, random) for error in self._errors(quantity)]

    def _errors(self, quantity: Quantity) -> list[Tensor]:
        """Q_b(x) - x for every tensor of the site."""
        site = quantity.site
        return errors_at(self.program, self.sites[site], quantity.known_format, self.run.tensors[site])

    def _signs(self, site: str, error: Tensor, random: torch.Generator) -> Tensor:
        """A random sign for a weight, or one for each sample of an activation, in a shape that broadcasts."""
        if isinstance(self.sites[site], WeightSite):
            return curvature.rademacher(error.new_empty(()), random)
        samples = self.context.batches[self.index].size
        axis = sample_axis(error, samples)
        assert axis is not None, f"the activation {site} has no batch dimension"
        signs = curvature.rademacher(error.new_empty(samples), random).repeat_interleave(error.shape[axis] // samples)
        return signs.reshape(-1, *[1] * (error.ndim - 1 - axis))


@dataclass(frozen=True)
class Taylor(WidthMetric):
    """The loss increase to second order, by one Hessian-vector product per probe and rank of formats."""

    probes: int = option(50, "the largest number of Hessian-vector products on a batch, for a format of each site")
    tolerance: float = option(0.1, TOLERANCE_DOC)
    second_order: ClassVar[bool] = True

    def open(self, program: Program, context: Context, index: int, operators: Operators) -> Measurement:
        return _Directions(program, context, index, forward(program, context.batches[index], operators, forms=True))
