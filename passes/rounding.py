"""The integer codes of every weight at every width that it may take, and the squared error that they leave.

"nearest" is the paper's: each weight goes to the nearest code, and the error is ||Q(W) - W||^2.  "compensated", the
default, moves each rounding error onto weights not yet rounded, by the second moment of the layer's inputs, and weighs
the error by it (hawqfx.maths.rounding).  benchmarks/accuracy.py
measures both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from hawqfx.frontend.context import Context
from hawqfx.ir.facts import Quantizers, QuantParams, RoundedWeights
from hawqfx.ir.operators import operands
from hawqfx.ir.program import Layer, Program, WeightSite
from hawqfx.ir.quantizers import scale_of
from hawqfx.maths import affine, rounding
from hawqfx.pass_manager.base import Analysis, Kind


def _rows(x: Tensor, node: fx.Node, layer: Layer, weight: Tensor) -> Tensor:
    """The vectors (groups, rows, K) that a layer multiplies its weight by."""
    if layer.operator == "linear":
        return x.reshape(1, -1, x.shape[-1])
    dims = weight.ndim - 2
    rest: tuple[Any, ...] = (*operands(node)[3:], *(1, 0, 1, 1)[max(0, len(node.args) - 3) :])
    stride, padding, dilation, groups = rest

    def each(value: Any) -> list[int]:
        values = value if isinstance(value, (list, tuple)) else [value]
        return [int(v) for v in values] * (dims if len(values) == 1 else 1)

    pads = padding if isinstance(padding, str) else each(padding)
    return rounding.patches(x, weight.shape[2:], each(stride), pads, each(dilation), int(groups))


def _moments(program: Program, context: Context) -> dict[str, Tensor]:
    """The second moment (groups, K, K) of the inputs of every weight, over all layers that use it."""
    nodes = {node.name: node for node in program.graph.graph.nodes}
    readers: dict[str, list[Layer]] = {}
    for layer in program.layers:
        readers.setdefault(operands(nodes[layer.node])[0].name, []).append(layer)
    moments: dict[str, Tensor] = {}
    for batch in context.track(context.batches, "rounding", len(context.batches)):
        share = batch.size / context.samples

        def look(name: str, value: Tensor, share: float = share) -> Tensor:
            for layer in readers[name]:
                rows = _rows(value, nodes[layer.node], layer, program.tensor(layer.weight))
                moments[layer.weight] = moments.get(layer.weight, 0) + share * rounding.second_moment(rows)
            return value

        program.run(batch.args, batch.kwargs, look, at=readers)
    return moments


def _compensated(weight: Tensor, widths: Quantizers, moment: Tensor) -> RoundedWeights:
    """All widths with a scale per row in one go, and those with more."""
    codes: dict[int, Tensor] = {}
    errors: dict[int, float] = {}
    for of_rows in (True, False):
        quantizers = [q for q in widths.by_bits.values() if (q.scheme == "static") is of_rows]
        if quantizers:
            found = _compensated_together(weight, quantizers, moment)
            codes |= found.codes
            errors |= found.squared_error
    return RoundedWeights(codes, errors)


def _compensated_together(weight: Tensor, quantizers: Sequence[QuantParams], moment: Tensor) -> RoundedWeights:
    """The rows of every width stand below each other."""
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
        {q.width: c.to(torch.int8).reshape(weight.shape) for q, c in zip(quantizers, codes, strict=True)},
        {q.width: error for q, error in zip(quantizers, errors, strict=True)},
    )


def _scale_of_rows(quantizer: QuantParams, weight: Tensor) -> Tensor:
    """One scale per row of a weight, or of a matrix one per element."""
    return affine.along_channels(scale_of(quantizer).to(weight.device), weight)


def _nearest(weight: Tensor, widths: Quantizers) -> RoundedWeights:
    codes, errors = {}, {}
    for bits, quantizer in widths.by_bits.items():
        scale = _scale_of_rows(quantizer, weight)
        code = (weight / scale).round().clamp(quantizer.low, quantizer.high)
        codes[bits] = code.to(torch.int8)
        errors[bits] = float((code * scale - weight).square().sum(dtype=torch.float64))
    return RoundedWeights(codes, errors)


@dataclass(frozen=True)
class Rounding(Analysis):
    """`method`: "compensated" or "nearest"."""

    method: Literal["compensated", "nearest"] = "compensated"
    needs: ClassVar[tuple[Kind, ...]] = (WeightSite, Quantizers)
    gives: ClassVar[tuple[Kind, ...]] = (RoundedWeights,)

    @torch.no_grad()
    def learn(self, program: Program, context: Context) -> Mapping[str, RoundedWeights]:
        def widths(site: WeightSite) -> Quantizers:
            return program.facts.get(site.key, Quantizers)

        if self.method == "nearest":
            return {site.key: _nearest(program.tensor(site.key), widths(site)) for site in program.weights}
        moments = _moments(program, context)
        return {
            site.key: _compensated(program.tensor(site.key), widths(site), moments[site.key])
            if site.key in moments
            else _nearest(program.tensor(site.key), widths(site))  # a table, of which rows are read as they are
            for site in program.weights
        }
