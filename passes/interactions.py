"""The effect that the errors of two weights have on the loss together: d_i^T F d_j, d = Q_b(W) - W.

The loss increase of a whole plan is, to second order, sum_ij d_i^T H d_j, of which HAWQ-V2 keeps the diagonal.  With
the Fisher matrix F in place of H (Martens 2020, section 5) and g the gradient of the mean loss over c labels drawn from
the model,

    d_i^T F d_j = c E[(d_i . g)(d_j . g)].

So a probe, which is one ordinary backward pass, gives all pairs in all formats; a Hessian-vector product would give
the pairs of one d_i only.  With n probes, the standard error of a pair is at most
sqrt((d_i^T F d_i)(d_j^T F d_j) 2 / n).  The predicted loss gains twice the term, in the unit of Omega, which drops the
1/2 of the Taylor expansion.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hawqfx.errors import UsageError
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import NETWORK, ErrorProducts, Quantizers, RoundedWeights
from hawqfx.ir.program import Program
from hawqfx.ir.quantizers import weight_at
from hawqfx.ir.sites import WeightSite
from hawqfx.maths import curvature
from hawqfx.maths.formats import Format
from hawqfx.maths.seeding import generator
from hawqfx.pass_manager.base import Analysis, Kind, option
from hawqfx.sensitivity.forward import Forward, forward


@dataclass(frozen=True)
class Interactions(Analysis):
    """The products of the errors of all weights in all formats."""

    probes: int = option(50, "the number of backward passes on a batch")
    needs: ClassVar[tuple[Kind, ...]] = (WeightSite, Quantizers, RoundedWeights)
    gives: ClassVar[tuple[Kind, ...]] = (ErrorProducts,)

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise UsageError(f"probes={self.probes}: at least one is needed")

    def learn(self, program: Program, context: Context) -> Mapping[str, ErrorProducts]:
        context.require_distribution(self.name)
        errors = {site.key: _errors(program, site.key) for site in program.weights}
        choices = [(key, width) for key, by_format in errors.items() for width in by_format]
        gram = np.zeros((len(choices), len(choices)))
        total = len(context.batches) * self.probes
        for number in context.track(range(total), self.name, total):
            index, probe = divmod(number, self.probes)
            if probe == 0:
                run = forward(program, context.batches[index], {})
            slopes, draws = _slopes(context, run, index, probe, errors)
            share = draws * context.batches[index].size / context.samples / self.probes
            gram += share * np.outer(slopes, slopes)
        return {NETWORK: ErrorProducts(tuple(choices), tuple(map(tuple, gram.tolist())))}


@torch.no_grad()
def _errors(program: Program, key: str) -> dict[Format, Tensor]:
    """Q_b(W) - W of a weight in every format."""
    weight = program.tensor(key).detach()
    return {width: weight_at(program, key, width) - weight for width in program.facts.get(key, Quantizers).by_format}


def _slopes(
    context: Context, run: Forward, index: int, probe: int, errors: Mapping[str, Mapping[Format, Tensor]]
) -> tuple[NDArray[np.float64], int]:
    """d . g for every error d, in order, and the number of draws in the batch, whose mean the loss is."""
    random = generator(context.seed, "pairs", index, probe, device=context.device)
    target = context.drawn(run.output, random, context.batches[index].target)
    gradients = run.gradients(context.loss_at(run.output, target, index), list(errors), again=False)
    slopes = [curvature.dot(gradients[key][0], d) for key, by_format in errors.items() for d in by_format.values()]
    return np.array(slopes), context.draws(target, index)
