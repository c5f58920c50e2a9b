"""||Q_b(x) - x||^2 at every site and bit width: the sum of squares, with the very quantizer that will be lowered.

For a weight the sum goes over its elements, as its rounding left them; for an activation over the elements of one
sample, averaged over the calibration data.  (HAWQ-V2, equation 8 and section 3.3.)

Where all that is read of an activation is a function f of each value, such as GELU, an error counts as it is after f.
The curvature is that by x, and of the two E[f'(x)²] is the ratio, so the sum is ||f(Q_b(x)) - f(x)||² / E[f'(x)²].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hawqfx.analysis.pointwise import Function, function_of, square_slope
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import QuantizationError, Quantizers, RoundedWeights
from hawqfx.ir.program import Program
from hawqfx.ir.quantizers import activation_at
from hawqfx.maths import curvature
from hawqfx.pass_manager.base import Analysis, Kind


def _squared_error(program: Program, key: str, bits: int, x: Tensor, function: Function | None) -> float:
    quantized = activation_at(program, key, bits, x)
    error = quantized - x if function is None else function(quantized) - function(x)
    return curvature.dot(error, error)


@dataclass
class _Mean:
    total: float = 0.0
    count: int = 0

    def add(self, total: float, count: int) -> None:
        self.total += total
        self.count += count

    @property
    def value(self) -> float:
        return self.total / self.count


@dataclass(frozen=True)
class Perturbation(Analysis):
    needs: ClassVar[tuple[Kind, ...]] = (Quantizers, RoundedWeights)
    gives: ClassVar[tuple[Kind, ...]] = (QuantizationError,)

    @torch.no_grad()
    def learn(self, program: Program, context: Context) -> Mapping[str, QuantizationError]:
        facts = {
            site.key: QuantizationError(program.facts.get(site.key, RoundedWeights).squared_error)
            for site in program.weights
        }
        errors = {
            site.key: dict.fromkeys(program.facts.get(site.key, Quantizers).by_bits, 0.0)
            for site in program.activations
        }
        site_of = {node: site.key for site in program.activations for node in site.nodes}
        function = {
            site.key: function_of(program.graph.graph, (*site.nodes, *site.data_movement))
            for site in program.activations
        }
        slopes = {key: _Mean() for key, known in function.items() if known is not None}

        def look(node: str, value: Tensor) -> Tensor:
            key = site_of[node]
            after = function[key]
            if after is not None:
                slopes[key].add(square_slope(after, value), value.numel())
            for bits in errors[key]:
                errors[key][bits] += _squared_error(program, key, bits, value, after) / context.samples
            return value

        for batch in context.track(context.batches, "perturbation", len(context.batches)):
            program.run(batch.args, batch.kwargs, look)
        for key, slope in slopes.items():
            errors[key] = {bits: error / (slope.value or 1.0) for bits, error in errors[key].items()}
        return facts | {key: QuantizationError(by_bits) for key, by_bits in errors.items()}
