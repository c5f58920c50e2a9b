"""The change of the loss when one site leaves a plan: HAWQ's expansion, around the network as the plan quantizes it.

A plan comes from one expansion around the float network, where errors of sites add up.  Around the plan the other sites
have their errors already, and the gradient g of the loss is not zero.  For a site with the error e in its format of the
plan and e' in another, and d = e' - e,

    L(d) - L(0) = g . d + 1/2 d^T G d,

with G the Gauss-Newton matrix at the plan, sampled by backward passes over drawn targets as in passes/gauss_newton.py.
Codes are fitted to the calibration samples, where the form of their own error is too small by the factor r, their
optimism: the change of 1/2 (r - 1) e^T G e is added.

The unit is that of the loss.  benchmarks/uniform.py shows what a plan gains by it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from hawqfx.frontend.context import Context
from hawqfx.ir.facts import LossIncrease, Quantizers, RoundedWeights
from hawqfx.ir.program import Program
from hawqfx.ir.quantizers import errors_at
from hawqfx.ir.sites import ActivationSite, WeightSite
from hawqfx.maths import curvature
from hawqfx.maths.formats import Format
from hawqfx.maths.seeding import generator
from hawqfx.pass_manager.base import Kind, option
from hawqfx.sensitivity.double_backward import Operators
from hawqfx.sensitivity.forward import quantized_forward
from hawqfx.sensitivity.metrics import SensitivityMetric
from hawqfx.sensitivity.quantity import Estimate, Measurement, Quantity


@dataclass(frozen=True)
class Moves:
    """The format of a site in a plan, and the formats that it may move to."""

    format: Format
    others: tuple[Format, ...]


class _Steps(Measurement):
    """The graph of one forward pass of the quantized network, and the gradient of its loss."""

    def __init__(self, program: Program, context: Context, index: int, plan: Mapping[str, Format]) -> None:
        self.program, self.context, self.index, self.plan = program, context, index, plan
        self.sites = {site.key: site for site in program.sites}
        batch = context.batches[index]
        with torch.no_grad():
            target = context.expected_target(program.run(batch.args, batch.kwargs), batch, index)
        self.run, self.values = quantized_forward(program, batch, plan)
        loss = context.loss_at(self.run.output, target, index)
        self.slopes = self.run.gradients(loss, list(self.sites), again=False)

    def sample(self, probe: int, wanted: Sequence[Quantity]) -> Mapping[Quantity, float]:
        random = generator(self.context.seed, "drawn", self.index, probe, device=self.context.device)
        target = self.context.drawn(self.run.output, random, self.context.batches[self.index].target)
        loss = self.context.loss_at(self.run.output, target, self.index)
        drawn = self.run.gradients(loss, list(dict.fromkeys(quantity.site for quantity in wanted)), again=False)
        draws = self.context.draws(target, self.index)
        found = {}
        for site, own in drawn.items():
            self.run.check_gradient(self.index, site, own)
            errors = self._errors(site, self.plan[site])
            here = self._excess(site, self.plan[site], _along(own, errors))
            for quantity in (each for each in wanted if each.site == site):
                others = self._errors(site, quantity.known_format)
                step = [other - error for other, error in zip(others, errors, strict=True)]
                there = self._excess(site, quantity.known_format, _along(own, others))
                form = 0.5 * draws * (_along(own, step) ** 2 + there - here)
                found[quantity] = _along(self.slopes[site], step) + form
        return found

    def _errors(self, site: str, width: Format) -> Sequence[torch.Tensor]:
        """Q(x) - x for the tensors of a site, zero in float."""
        if width.is_float:
            return [torch.zeros_like(value) for value in self.values[site]]
        return errors_at(self.program, self.sites[site], width, self.values[site])

    def _excess(self, site: str, width: Format, along: float) -> float:
        """What the form of a weight's own error lacks on the samples that its codes are fitted to, of one draw."""
        if width.is_float or not isinstance(self.sites[site], WeightSite):
            return 0.0
        return (self.program.facts.get(site, RoundedWeights).optimism[width] - 1) * along**2


def _along(gradients: Sequence[torch.Tensor], errors: Sequence[torch.Tensor]) -> float:
    return sum(map(curvature.dot, gradients, errors))


@dataclass(frozen=True)
class AtPlan(SensitivityMetric):
    """The change of the loss when one site leaves a plan."""

    moves: tuple[tuple[str, Moves], ...] = option((), "of every site, its format in the plan and those it may move to")
    probes: int = option(64, "backward passes, shared out over a few equal parts of the samples")
    shares_probes: ClassVar[bool] = True
    needs: ClassVar[tuple[Kind, ...]] = (WeightSite, ActivationSite, Quantizers, RoundedWeights)
    gives: ClassVar[tuple[Kind, ...]] = (LossIncrease,)

    def quantities(self, program: Program) -> Sequence[Quantity]:
        return [Quantity(site, width) for site, moves in self.moves for width in moves.others]

    def open(self, program: Program, context: Context, index: int, operators: Operators) -> Measurement:
        context.require_distribution(self.name)
        return _Steps(program, context, index, {site: moves.format for site, moves in self.moves})

    def conclude(self, program: Program, estimates: Mapping[Quantity, Estimate]) -> Program:
        """The increase of every site over its best format, where more bits never lose more, without a standard error:
        whether the moves together gain is for data to tell on which they were not measured."""
        facts = {}
        for site, moves in self.moves:
            change = {width: estimates[Quantity(site, width)].mean for width in moves.others} | {moves.format: 0.0}
            widest_first = sorted(change, reverse=True)
            least, highest = min(change.values()), -torch.inf
            by_format = {}
            for width in widest_first:
                highest = max(highest, change[width])
                by_format[width] = highest - least
            facts[site] = LossIncrease(by_format, dict.fromkeys(by_format, 0.0))
        return program.learn(facts)
