"""What the errors of two weights do to the loss together: the terms d_i^T F d_j, d = Q_b(W) - W.

The loss increase of a whole plan is, to second order, sum_ij d_i^T H d_j, of which HAWQ-V2 keeps the diagonal.  With
the Fisher matrix F in place of H (Martens 2020, section 5) and g the gradient of the mean loss over c labels drawn from
the model,

    d_i^T F d_j = c E[(d_i . g)(d_j . g)],

so one ordinary backward pass per probe gives every pair at every pair of widths; a Hessian-vector product gives the
pairs of one d_i alone.  With n probes the standard error of a pair is at most sqrt((d_i^T F d_i)(d_j^T F d_j) 2 / n).
Twice the term enters the predicted loss, in the unit of Omega, which drops the 1/2 of the Taylor expansion.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from hawqfx.errors import HawqfxError
from hawqfx.frontend.context import Context, generator
from hawqfx.ir.facts import ErrorProducts, Quantizers, RoundedWeights
from hawqfx.ir.program import Program, WeightSite
from hawqfx.ir.quantizers import weight_at
from hawqfx.maths import curvature
from hawqfx.pass_manager.base import Analysis, Kind
from hawqfx.sensitivity.estimation import forward


@dataclass(frozen=True)
class Interactions(Analysis):
    """`probes`: backward passes per batch."""

    probes: int = 50
    needs: ClassVar[tuple[Kind, ...]] = (WeightSite, Quantizers, RoundedWeights)

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise HawqfxError(f"probes={self.probes}: at least one is needed")

    def learn(self, program: Program, context: Context) -> Program:
        labels = [(site.key, bits) for site in program.weights for bits in _widths(program, site)]
        errors = {key: _errors(program, key, [b for k, b in labels if k == key]) for key in dict(labels)}
        gram = np.zeros((len(labels), len(labels)))
        for number in context.track(
            range(len(context.batches) * self.probes), self.name, len(context.batches) * self.probes
        ):
            index, probe = divmod(number, self.probes)
            batch = context.batches[index]
            if probe == 0:
                run = forward(program, batch, {})
            random = generator(context.seed, "pairs", index, probe, device=context.device)
            target = context.drawn(run.output, random)
            gradients = run.gradients(context.loss_at(run.output, target, index), list(errors), again=False)
            slopes = np.concatenate([[curvature.dot(gradients[key][0], d) for d in errors[key]] for key in errors])
            share = context.draws(target, index) * batch.size / context.samples / self.probes
            gram += share * np.outer(slopes, slopes)
        return replace(program, interactions=ErrorProducts(tuple(labels), tuple(map(tuple, gram.tolist()))))


def _widths(program: Program, site: WeightSite) -> Mapping[int, object]:
    return program.facts.get(site.key, Quantizers).by_bits


@torch.no_grad()
def _errors(program: Program, key: str, widths: list[int]) -> list[Tensor]:
    weight = program.tensor(key).detach()
    return [weight_at(program, key, bits) - weight for bits in widths]
