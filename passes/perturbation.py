"""||Q_b(x) - x||^2 at every site and bit width: the sum of squares, with the very quantizer that will be lowered.

For a weight the sum goes over its elements, as its rounding left them; for an activation over the elements of one
sample, averaged over the calibration data.  (HAWQ-V2, equation 8 and section 3.3.)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hawqfx.contract import Analysis, Kind
from hawqfx.facts import Perturbation as PerturbationFact
from hawqfx.facts import Quantizers, Rounding
from hawqfx.maths import curvature
from hawqfx.program import Program
from hawqfx.quantized import activation_at
from hawqfx.study import Study


def _squared_error(program: Program, key: str, bits: int, x: Tensor) -> float:
    error = activation_at(program, key, bits, x) - x
    return curvature.dot(error, error)


@dataclass(frozen=True)
class Perturbation(Analysis):
    needs: ClassVar[tuple[Kind, ...]] = (Quantizers, Rounding)
    gives: ClassVar[tuple[Kind, ...]] = (PerturbationFact,)

    @torch.no_grad()
    def learn(self, program: Program, study: Study) -> Mapping[str, PerturbationFact]:
        facts = {
            site.key: PerturbationFact(program.facts.get(site.key, Rounding).squared_error) for site in program.weights
        }
        errors = {
            site.key: dict.fromkeys(program.facts.get(site.key, Quantizers).by_bits, 0.0)
            for site in program.activations
        }
        site_of = {node: site.key for site in program.activations for node in site.nodes}

        def look(node: str, value: Tensor) -> Tensor:
            key = site_of[node]
            for bits in errors[key]:
                errors[key][bits] += _squared_error(program, key, bits, value) / study.samples
            return value

        for batch in study.track(study.batches, "perturbation", len(study.batches)):
            program.run(batch.args, batch.kwargs, look)
        return facts | {key: PerturbationFact(by_bits) for key, by_bits in errors.items()}
