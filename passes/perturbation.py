"""||Q_b(x) - x||^2 of every site in every format: the sum of squares, with the very quantizer that will be lowered.

For a weight the sum goes over its elements, as the pass rounding left them; for an activation it goes over the elements
of one sample, and is averaged over the calibration data, by the histogram of its values.  (HAWQ-V2, equation 8 and
section 3.3.)

If the network reads only a function f of each value of an activation, such as GELU, an error counts after f.  Metrics
measure the curvature by x, which is E[f'(x)²] times the curvature by f(x), so the sum is
||f(Q_b(x)) - f(x)||² / E[f'(x)²].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hawqfx.analysis.pointwise import function_of, mean_square_slope
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import ActivationHistogram, QuantizationError, Quantizers, RoundedWeights
from hawqfx.ir.program import Program
from hawqfx.ir.quantizers import activation_at, scale_of
from hawqfx.ir.sites import ActivationSite
from hawqfx.maths import affine, curvature
from hawqfx.maths.formats import DYNAMIC, Format
from hawqfx.pass_manager.base import Analysis, Kind


def _static_errors(program: Program, site: ActivationSite, samples: int) -> dict[Format, float]:
    """The squared error of a sample of an activation in its static formats, by its histogram."""
    histogram = program.facts.get(site.key, ActivationHistogram)
    values, counts = histogram.values, histogram.counts
    function = function_of(program.graph.graph, site.tensors)
    slope = 1.0 if function is None else mean_square_slope(function, values, counts) or 1.0
    errors = {}
    for width, quantizer in program.facts.get(site.key, Quantizers).by_format.items():
        if width.is_static:
            scale, zero = scale_of(quantizer).double().reshape(1), torch.tensor([float(quantizer.zero_point)])
            error = affine.errors_on_histogram(values, counts, scale, zero, quantizer.high, function)
            errors[width] = max(0.0, float(error)) / samples / slope  # rounding of float64 may leave less than zero
    return errors


def _dynamic_errors(program: Program, context: Context) -> dict[str, float]:
    """The squared error of a sample of every activation that may be quantized dynamically, with the range of each run,
    averaged over the calibration data.  Linear layers read these, so that no function stands before their readers."""
    errors = {
        site.key: 0.0 for site in program.activations if DYNAMIC in program.facts.get(site.key, Quantizers).by_format
    }
    if not errors:
        return {}
    site_of = program.site_of

    def add_errors(node: str, value: Tensor) -> Tensor:
        error = activation_at(program, site_of[node], DYNAMIC, value) - value
        errors[site_of[node]] += curvature.dot(error, error) / context.samples
        return value

    nodes = [node for site in program.activations if site.key in errors for node in site.nodes]
    for batch in context.track(context.batches, "perturbation", len(context.batches)):
        program.run(batch.args, batch.kwargs, add_errors, at=nodes)
    return errors


@dataclass(frozen=True)
class Perturbation(Analysis):
    """The squared error of every site in every format."""

    needs: ClassVar[tuple[Kind, ...]] = (ActivationHistogram, Quantizers, RoundedWeights)
    gives: ClassVar[tuple[Kind, ...]] = (QuantizationError,)

    @torch.no_grad()
    def learn(self, program: Program, context: Context) -> Mapping[str, QuantizationError]:
        weights = {site.key: program.facts.get(site.key, RoundedWeights).squared_error for site in program.weights}
        dynamic = _dynamic_errors(program, context)
        activations = {
            site.key: _static_errors(program, site, context.samples)
            | ({DYNAMIC: dynamic[site.key]} if site.key in dynamic else {})
            for site in program.activations
        }
        return {key: QuantizationError(by_format) for key, by_format in (weights | activations).items()}
