"""Fold batch-norm into the layer before it, and drop what does nothing in eval mode.

With frozen statistics batch-norm is y = (x - mean) / sqrt(var + eps) * gamma + beta, per channel.  After a layer
x = W u + b it is the layer with W' = W * g and b' = (b - mean) * g + beta, where g = gamma / sqrt(var + eps).

A weight that several layers share is folded once if they are all followed by the same batch-norm; otherwise the
batch-norms stay, since one tensor cannot hold two foldings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from hawqfx.ir.operators import BATCH_NORM, DROPOUT, IDENTITIES, WEIGHTED_LAYERS, is_constant, operands
from hawqfx.ir.program import Program
from hawqfx.ir.rewriter import GraphRewriter
from hawqfx.pass_manager.base import Rewrite


def _drop_identities(rewriter: GraphRewriter) -> None:
    for node in rewriter.calls(torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default  # takes tensors that a copy no longer makes contiguous
    for node in rewriter.calls():
        if node.target in DROPOUT | IDENTITIES:
            rewriter.replace(node, operands(node)[0])


def _layer_of(norm: fx.Node) -> fx.Node:
    layer = operands(norm)[0]
    assert isinstance(layer, fx.Node)
    return layer


def _foldable(norm: fx.Node) -> bool:
    layer, *statistics = operands(norm)[:5]
    if layer.target not in WEIGHTED_LAYERS or len(layer.users) > 1:
        return False
    constants = [*statistics, *operands(layer)[1:3]]
    return all(constant is None or is_constant(constant) for constant in constants)


def _norms_by_weight(rewriter: GraphRewriter) -> dict[fx.Node, list[fx.Node]]:
    """Weight node -> the batch-norms to fold into it, all of them equal and one per use of the weight."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for norm in rewriter.calls(BATCH_NORM):
        if _foldable(norm):
            found.setdefault(operands(_layer_of(norm))[1], []).append(norm)

    def same(norms: list[fx.Node]) -> bool:
        return len({(*operands(norm)[1:5], operands(norm)[7], *operands(_layer_of(norm))[2:3]) for norm in norms}) == 1

    return {weight: norms for weight, norms in found.items() if len(norms) == len(weight.users) and same(norms)}


def _folded(rewriter: GraphRewriter, norm: fx.Node) -> tuple[Tensor, Tensor]:
    """The weight and bias of the layer before `norm`, with `norm` folded in; computed in float64."""

    def value(constant: fx.Node | None, otherwise: float) -> Tensor:
        if constant is None:
            return torch.full((channels,), otherwise, dtype=torch.float64, device=original.device)
        return rewriter.value(constant).double()

    _, weight_node, bias_node = (*operands(_layer_of(norm)), None)[:3]
    original = rewriter.value(weight_node)
    channels = original.shape[0]
    _, gamma, beta, mean, variance = operands(norm)[:5]
    gain = value(gamma, 1.0) / (value(variance, 1.0) + operands(norm)[7]).sqrt()
    weight = original.double() * gain.reshape(-1, *[1] * (original.ndim - 1))
    bias = (value(bias_node, 0.0) - value(mean, 0.0)) * gain + value(beta, 0.0)
    return weight.to(original.dtype), bias.to(original.dtype)


def _put(rewriter: GraphRewriter, weight: fx.Node, norms: Sequence[fx.Node]) -> None:
    """The layers of a weight read it with their batch-norm folded in, and a new bias; the batch-norms go."""
    key = str(weight.target)
    owner = key.rpartition(".")[0]
    folded, bias = _folded(rewriter, norms[0])
    rewriter.store(key, folded, parameter=True)
    with rewriter.after(weight):
        bias_node = rewriter.parameter(f"{owner}.folded_bias" if owner else f"{key}_folded_bias", bias, weight)
    for norm in norms:
        layer = _layer_of(norm)
        layer.args = (*layer.args[:2], bias_node, *layer.args[3:])
        rewriter.replace(norm, layer)


@dataclass(frozen=True)
class FoldBatchnorm(Rewrite):
    """Takes batch-norms into the weights and biases of the layers before them."""

    tolerance: ClassVar[float] = 1e-4  # float32 rounding through a deep network; seen: 1e-6 on ResNet-20

    def rewrite(self, program: Program) -> Program:
        rewriter = GraphRewriter(program)
        _drop_identities(rewriter)
        for weight, norms in _norms_by_weight(rewriter).items():
            _put(rewriter, weight, norms)
        return rewriter.done()
