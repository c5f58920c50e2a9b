"""||Q_b(x) - x||^2 of every site in every format: the sum of squares, with the very quantizer that will be lowered.

For a weight the sum goes over its elements, as the pass rounding left them; for an activation it goes over the elements
of one sample, and is averaged over the calibration data.  (HAWQ-V2, equation 8 and section 3.3.)

If the network reads only a function f of each value of an activation, such as GELU, an error counts after f.  Metrics
measure the curvature by x, which is E[f'(x)²] times the curvature by f(x), so the sum is
||f(Q_b(x)) - f(x)||² / E[f'(x)²].
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
from hawqfx.maths.formats import Format
from hawqfx.pass_manager.base import Analysis, Kind


def _squared_error(program: Program, key: str, width: Format, x: Tensor, function: Function | None) -> float:
    quantized = activation_at(program, key, width, x)
    error = quantized - x if function is None else function(quantized) - function(x)
    return curvature.dot(error, error)


@dataclass
class _Mean:
    """A mean of values that come in parts: their sum, and their number."""

    total: float = 0.0
    count: int = 0

    def add(self, total: float, count: int) -> None:
        self.total += total
        self.count += count

    @property
    def value(self) -> float:
        return self.total / self.count


def _activation_errors(program: Program, context: Context) -> dict[str, dict[Format, float]]:
    """The squared error of a sample of every activation in every format, averaged over the calibration data."""
    errors = {
        site.key: dict.fromkeys(program.facts.get(site.key, Quantizers).by_format, 0.0) for site in program.activations
    }
    site_of = program.site_of
    functions = {site.key: function_of(program.graph.graph, site.tensors) for site in program.activations}
    slopes = {key: _Mean() for key, function in functions.items() if function is not None}

    def add_errors(node: str, value: Tensor) -> Tensor:
        key = site_of[node]
        function = functions[key]
        if function is not None:
            slopes[key].add(square_slope(function, value), value.numel())
        for width in errors[key]:
            errors[key][width] += _squared_error(program, key, width, value, function) / context.samples
        return value

    for batch in context.track(context.batches, "perturbation", len(context.batches)):
        program.run(batch.args, batch.kwargs, add_errors)
    for key, slope in slopes.items():
        errors[key] = {width: error / (slope.value or 1.0) for width, error in errors[key].items()}
    return errors


@dataclass(frozen=True)
class Perturbation(Analysis):
    """The squared error of every site in every format."""

    needs: ClassVar[tuple[Kind, ...]] = (Quantizers, RoundedWeights)
    gives: ClassVar[tuple[Kind, ...]] = (QuantizationError,)

    @torch.no_grad()
    def learn(self, program: Program, context: Context) -> Mapping[str, QuantizationError]:
        weights = {site.key: program.facts.get(site.key, RoundedWeights).squared_error for site in program.weights}
        errors = weights | _activation_errors(program, context)
        return {key: QuantizationError(by_format) for key, by_format in errors.items()}
