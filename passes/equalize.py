"""Bring the channels between a convolution and the depthwise one after it to one range, where they lie far apart.

A tensor has one scale for all of its channels: beside large channels, small ones have few codes.  The convolution that
makes them can as well make x' = x / s, with an s per channel, and the depthwise one, which reads every
channel on its own, multiply by s; both have a scale per channel, so that their weights lose nothing.  Between them may
be ReLU, which commutes with s, or a gated function x g(x), such as SiLU: that becomes x' g(s x'), where s x' is a
convolution of each channel with one weight, on integer kernels too.  Nothing changes in float.

Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction", section 4.1, for ReLU, and
for the norm of the weights as the measure of a channel's range.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from hawqfx.analysis.pointwise import nonlinearity
from hawqfx.ir.operators import CONVOLUTIONS, WEIGHTED_LAYERS, ceiling, is_constant, is_tensor, kept_in_float
from hawqfx.ir.program import Program
from hawqfx.ir.rewriter import GraphRewriter
from hawqfx.pass_manager.base import Rewrite, option

LEAST = 2.0**-12  # of the largest channel's weights: with less, a channel counts as pruned


def _convolves(node: fx.Node) -> bool:
    """Whether a node is a convolution whose weight and bias nothing else reads."""
    if not WEIGHTED_LAYERS.get(node.target, "").startswith("conv") or node.kwargs or not is_tensor(node.args[0]):
        return False
    constants = [constant for constant in node.args[1:3] if constant is not None]
    return all(is_constant(constant) and len(constant.users) == 1 for constant in constants)  # type: ignore[union-attr]


def _depthwise(node: fx.Node) -> bool:
    return _convolves(node) and len(node.args) > 6 and node.args[6] == node.args[0].meta["val"].shape[1]  # type: ignore[union-attr]


def _gate(maker: fx.Node, body: Sequence[fx.Node]) -> Sequence[fx.Node] | None:
    """The nodes that compute g of x g(x); none for ReLU, or for no function at all; None for other functions."""
    if not body or (len(body) == 1 and ceiling(body[0]) == float("inf")):
        return ()
    *gate, product = body
    factors = product.args[:2]
    if product.target is not torch.ops.aten.mul.Tensor or product.kwargs or len(gate) == 0:
        return None
    return gate if maker in factors and gate[-1] in factors else None


@dataclass(frozen=True)
class Equalize(Rewrite):
    """Brings the channels between a convolution and the depthwise one after it to one range."""

    gain: float = option(256.0, "the least fall of the quantizer's squared error, as a factor; 256 is worth four bits")
    keep_float: tuple[str, ...] = option((), "patterns, as in a shell, of weights whose layers stay in float")
    tolerance: ClassVar[float] = 1e-4  # float32 rounding through a deep network

    def rewrite(self, program: Program) -> Program:
        rewriter, changed = GraphRewriter(program), False
        for maker in rewriter.calls():
            if not _convolves(maker) or not maker.users:
                continue
            body = nonlinearity(maker)
            gate = _gate(maker, body)
            readers = list((body[-1] if body else maker).users)
            if gate is None or not readers or not all(map(_depthwise, readers)):
                continue
            if any(kept_in_float(layer, self.keep_float) for layer in (maker, *readers)):
                continue
            sizes, counts = _ranges(rewriter, maker, readers)
            if float((counts * sizes.square()).sum() * self.gain) < float(counts.sum() * sizes.max() ** 2):
                _equalize(rewriter, maker, gate, readers, sizes / sizes.max())
                changed = True
        return rewriter.done() if changed else program


def _ranges(rewriter: GraphRewriter, maker: fx.Node, readers: Sequence[fx.Node]) -> tuple[Tensor, Tensor]:
    """The size of each channel (C,), and the weight of its squared errors (C,)."""
    made = _rows(rewriter, maker).square().sum(1)
    made = torch.where(made < LEAST**2 * made.max(), made.max(), made)  # a channel of its bias alone has no range
    counts = [_rows(rewriter, reader).reshape(len(made), -1).square().sum(1) for reader in readers]
    return made.sqrt(), torch.stack(counts).sum(0)


def _rows(rewriter: GraphRewriter, layer: fx.Node) -> Tensor:
    """(output channels, elements), in float64."""
    weight = layer.args[1]
    assert isinstance(weight, fx.Node)
    return rewriter.value(weight).double().flatten(1)


def _equalize(
    rewriter: GraphRewriter, maker: fx.Node, gate: Sequence[fx.Node], readers: Sequence[fx.Node], scale: Tensor
) -> None:
    """Divide the channels that `maker` makes by `scale` (C,), and multiply the weights of their readers by it."""
    if gate:
        ranged = _multiplied(rewriter, maker, gate[0], scale)
        for node in gate:
            node.replace_input_with(maker, ranged)
    for constant in maker.args[1:3]:
        if isinstance(constant, fx.Node):
            _scale(rewriter, constant, 1 / scale)
    for reader in readers:
        assert isinstance(reader.args[1], fx.Node)
        _scale(rewriter, reader.args[1], scale)


def _multiplied(rewriter: GraphRewriter, maker: fx.Node, before: fx.Node, scale: Tensor) -> fx.Node:
    """The tensor times `scale` (C,), as a convolution of each channel with one weight."""
    axes = maker.meta["val"].ndim - 2
    weight = maker.args[1]
    assert isinstance(weight, fx.Node)
    factors = scale.reshape(-1, 1, *[1] * axes).to(weight.meta["val"].dtype)
    with rewriter.before(before):
        factor = rewriter.parameter(f"{weight.target}_range", factors, weight)
        return rewriter.call(CONVOLUTIONS[axes], maker, factor, None, [1] * axes, [0] * axes, [1] * axes, len(scale))


def _scale(rewriter: GraphRewriter, constant: fx.Node, scale: Tensor) -> None:
    """Multiply dimension 0 of a parameter; each element of `scale` stands for the same number of its indices."""
    value = rewriter.value(constant)
    factors = scale.repeat_interleave(len(value) // len(scale)).reshape(-1, *[1] * (value.ndim - 1))
    rewriter.store(str(constant.target), (value.double() * factors).to(value.dtype), parameter=True)
