"""The average Hessian trace of the loss at every site, by Hutchinson's estimator (HAWQ-V2, sections 3.1 and 3.3).

One Hessian-vector product per probe serves every weight and every activation at once.  For an activation the loss is
a function of a zero perturbation added to the tensor, so that the graph stays a function of its inputs.  The Hessian
of the mean loss over a batch is block-diagonal over its samples (batch-norm has frozen statistics), each block 1/N of
that sample's own, so one probe over the whole batch gives the mean over the samples of Tr(H_a).

A probe goes over all batches; probes are independent, and the standard error is that of their mean.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hawqfx.contract import Analysis, Kind
from hawqfx.errors import HawqfxError, LossError
from hawqfx.facts import Sensitivity as SensitivityFact
from hawqfx.maths import curvature
from hawqfx.program import ActivationSite, Program, WeightSite
from hawqfx.study import Batch, Study, generator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Blocks:
    """The tensors of one forward pass by which the loss is differentiated."""

    loss: Tensor
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]


def _forward(program: Program, study: Study, batch: Batch, index: int) -> _Blocks:
    weights = {site.key: program.tensor(site.key).detach().requires_grad_() for site in program.weights}
    shifts: dict[str, Tensor] = {}

    def shifted(node: str, value: Tensor) -> Tensor:
        shifts[node] = torch.zeros_like(value, requires_grad=True)
        return value + shifts[node]

    output = program.run(batch.args, batch.kwargs, shifted, weights)
    names = (*weights, *shifts)
    return _Blocks(study.loss_of(output, batch, index), names, (*weights.values(), *shifts.values()))


def _check_finite(blocks: _Blocks, gradients: tuple[Tensor, ...], index: int) -> None:
    for name, gradient in zip(blocks.names, gradients, strict=True):
        if not bool(torch.isfinite(gradient).all()):
            raise LossError(f"the gradient at {name!r} is not finite on batch {index}: the loss overflows there")


@dataclass(frozen=True)
class Sensitivity(Analysis):
    """`probes`: Hessian-vector products per batch, at least two; the paper uses 50."""

    probes: int = 50
    needs: ClassVar[tuple[Kind, ...]] = (WeightSite, ActivationSite)
    gives: ClassVar[tuple[Kind, ...]] = (SensitivityFact,)

    def __post_init__(self) -> None:
        if self.probes < 2:
            raise HawqfxError(f"probes={self.probes}: a standard error needs at least two")

    def learn(self, program: Program, study: Study) -> Mapping[str, SensitivityFact]:
        traces: dict[str, list[float]] = {}
        for index, batch in enumerate(study.batches):
            share = batch.size / study.samples
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be differentiated twice
                blocks = _forward(program, study, batch, index)
                gradients = curvature.gradient(blocks.loss, blocks.tensors)
                _check_finite(blocks, gradients, index)
                for probe in range(self.probes):
                    random = generator(study.seed, "probe", index, probe, device=study.device)
                    last = probe == self.probes - 1
                    samples = curvature.trace_samples(gradients, blocks.tensors, random, last=last)
                    for name, sample in zip(blocks.names, samples, strict=True):
                        sums = traces.setdefault(name, [0.0] * self.probes)
                        sums[probe] += share * sample
                    done = index * self.probes + probe + 1
                    study.progress("sensitivity", done, len(study.batches) * self.probes)
        return {site.key: self._fact(site, traces) for site in program.sites}

    def _fact(self, site: WeightSite | ActivationSite, traces: Mapping[str, list[float]]) -> SensitivityFact:
        parts = [traces[name] for name in (site.nodes if isinstance(site, ActivationSite) else (site.key,))]
        mean, stderr = curvature.mean_and_stderr([sum(samples) for samples in zip(*parts, strict=True)])
        if mean == stderr == 0.0:
            log.warning("the loss has no curvature at %r: it gets sensitivity zero", site.key)
        return SensitivityFact(mean / site.numel, stderr / site.numel, self.probes)
