"""The integer codes of every weight in every format that it may take, and the squared error that they leave.

The method "nearest" is the paper's: every element goes to the nearest code, and the error is ||Q(W) - W||^2.  The
method "compensated" moves each rounding error to elements that are not rounded yet, by the second moment of the layer's
inputs, and weighs the error by this moment (hawqfx.maths.rounding).  benchmarks/accuracy.py measures both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from hawqfx.errors import HawqfxError
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import Quantizers, QuantParams, RoundedWeights
from hawqfx.ir.operators import operands
from hawqfx.ir.program import Program
from hawqfx.ir.quantizers import scale_of
from hawqfx.ir.sites import Layer, WeightSite
from hawqfx.maths import affine, rounding
from hawqfx.maths.formats import Format
from hawqfx.pass_manager.base import Analysis, Kind, option


def _rows(x: Tensor, node: fx.Node, layer: Layer, weight: Tensor) -> Tensor:
    """The vectors (groups, rows, K) that a layer multiplies its weight by."""
    if layer.operator == "linear":
        return x.reshape(1, -1, x.shape[-1])
    dims = weight.ndim - 2
    rest: tuple[Any, ...] = (*operands(node)[3:], *(1, 0, 1, 1)[max(0, len(node.args) - 3) :])
    stride, padding, dilation, groups = rest

    def per_dimension(value: Any) -> list[int]:
        values = value if isinstance(value, (list, tuple)) else [value]
        return [int(v) for v in values] * (dims if len(values) == 1 else 1)

    pads = padding if isinstance(padding, str) else per_dimension(padding)
    return rounding.patches(x, weight.shape[2:], per_dimension(stride), pads, per_dimension(dilation), int(groups))


def _moments(program: Program, context: Context) -> dict[str, Tensor]:
    """The second moment (groups, K, K) of the inputs of every weight, over all layers that use it."""
    nodes = {node.name: node for node in program.graph.graph.nodes}
    readers: dict[str, list[Layer]] = {}
    for layer in program.layers:
        readers.setdefault(operands(nodes[layer.node])[0].name, []).append(layer)
    moments: dict[str, Tensor] = {}
    for batch in context.track(context.batches, "rounding", len(context.batches)):
        share = batch.size / context.samples

        def add_moments(name: str, value: Tensor, share: float = share) -> Tensor:
            for layer in readers[name]:
                rows = _rows(value, nodes[layer.node], layer, program.tensor(layer.weight))
                moments[layer.weight] = moments.get(layer.weight, 0) + share * rounding.second_moment(rows)
            return value

        program.run(batch.args, batch.kwargs, add_moments, at=readers)
    return moments


def _compensated(weight: Tensor, widths: Quantizers, moment: Tensor) -> RoundedWeights:
    """The codes in all formats: the static ones, which have a scale per row, together, then the others."""
    codes: dict[Format, Tensor] = {}
    errors: dict[Format, float] = {}
    for static in (True, False):
        quantizers = [quantizer for width, quantizer in widths.by_format.items() if width.is_static is static]
        if quantizers:
            rounded = _compensated_together(weight, quantizers, moment)
            codes |= rounded.codes
            errors |= rounded.squared_error
    return RoundedWeights(codes, errors)


def _compensated_together(weight: Tensor, quantizers: Sequence[QuantParams], moment: Tensor) -> RoundedWeights:
    """The codes of several quantizers, from one matrix that stacks the rows once per quantizer."""
    groups, columns = moment.shape[0], moment.shape[-1]
    rows = weight.detach().double().reshape(groups, -1, columns)
    scales = [_scale_of_rows(q, weight).double().reshape(groups, rows.shape[1], -1) for q in quantizers]
    low, high = (
        torch.cat([torch.full_like(scale[..., :1], value) for scale, value in zip(scales, ends, strict=True)], 1)
        for ends in ([q.low for q in quantizers], [q.high for q in quantizers])
    )
    stacked = rows.repeat(1, len(quantizers), 1)
    codes = rounding.compensated(stacked, moment, torch.cat(scales, 1), low, high).chunk(len(quantizers), 1)
    errors = [rounding.weighted_error(c * scale - rows, moment) for c, scale in zip(codes, scales, strict=True)]
    return RoundedWeights(
        {q.format: c.to(torch.int8).reshape(weight.shape) for q, c in zip(quantizers, codes, strict=True)},
        {q.format: error for q, error in zip(quantizers, errors, strict=True)},
    )


def _scale_of_rows(quantizer: QuantParams, weight: Tensor) -> Tensor:
    """The scale in a shape that broadcasts over the weight: one per row, or one per element of a matrix."""
    return affine.along_channels(scale_of(quantizer).to(weight.device), weight)


def _nearest(weight: Tensor, widths: Quantizers) -> RoundedWeights:
    """The nearest codes in all formats."""
    codes: dict[Format, Tensor] = {}
    errors: dict[Format, float] = {}
    for width, quantizer in widths.by_format.items():
        scale = _scale_of_rows(quantizer, weight)
        code = (weight / scale).round().clamp(quantizer.low, quantizer.high)
        codes[width] = code.to(torch.int8)
        errors[width] = float((code * scale - weight).square().sum(dtype=torch.float64))
    return RoundedWeights(codes, errors)


@dataclass(frozen=True)
class Rounding(Analysis):
    """The integer codes of every weight in every format."""

    method: Literal["compensated", "nearest"] = option(
        "compensated", "compensated: each rounding error moves to elements that are not rounded yet; nearest: it stays"
    )
    needs: ClassVar[tuple[Kind, ...]] = (WeightSite, Quantizers)
    gives: ClassVar[tuple[Kind, ...]] = (RoundedWeights,)

    def __post_init__(self) -> None:
        if self.method not in ("compensated", "nearest"):
            raise HawqfxError(f"rounding={self.method!r}: must be 'compensated' or 'nearest'")

    @torch.no_grad()
    def learn(self, program: Program, context: Context) -> Mapping[str, RoundedWeights]:
        moments = _moments(program, context) if self.method != "nearest" else {}
        facts = {}
        for site in program.weights:
            weight, widths = program.tensor(site.key), program.facts.get(site.key, Quantizers)
            if site.key in moments:
                facts[site.key] = _compensated(weight, widths, moments[site.key])
            else:  # with "compensated", a table, whose rows are read without a product
                facts[site.key] = _nearest(weight, widths)
        return facts
