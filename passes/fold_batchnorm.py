"""Fold batch-norm into the layer before it, and drop what does nothing in eval mode.

With frozen statistics batch-norm is y = (x - mean) / sqrt(var + eps) * gamma + beta, per channel.  After a layer
x = W u + b it is the layer with W' = W * g and b' = (b - mean) * g + beta, where g = gamma / sqrt(var + eps).

A weight that several layers share is folded once if they are all followed by the same batch-norm; otherwise the
batch-norms stay, since one tensor cannot hold two foldings.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from hawqfx.ir.operators import BATCH_NORM, DROPOUT, IDENTITIES, WEIGHTED_LAYERS, is_constant, operands
from hawqfx.ir.program import Program, copy_graph, set_tensor
from hawqfx.pass_manager.base import Rewrite


def _drop_identities(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default  # takes tensors that a copy no longer makes contiguous
    for node in list(graph.nodes):
        if node.target in DROPOUT | IDENTITIES:
            node.replace_all_uses_with(operands(node)[0])
            graph.erase_node(node)


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


def _norms_by_weight(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Weight node -> the batch-norms to fold into it, all of them equal and one per use of the weight."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for norm in graph.find_nodes(op="call_function", target=BATCH_NORM):
        if _foldable(norm):
            found.setdefault(operands(_layer_of(norm))[1], []).append(norm)

    def same(norms: list[fx.Node]) -> bool:
        return len({(*operands(norm)[1:5], operands(norm)[7], *operands(_layer_of(norm))[2:3]) for norm in norms}) == 1

    return {weight: norms for weight, norms in found.items() if len(norms) == len(weight.users) and same(norms)}


def _fold(tensor: Callable[[str], Tensor], norm: fx.Node) -> tuple[Tensor, Tensor]:
    """The weight and bias of the layer before `norm`, with `norm` folded in; computed in float64."""

    def value(constant: fx.Node | None, otherwise: float) -> Tensor:
        if constant is None:
            return torch.full((channels,), otherwise, dtype=torch.float64, device=original.device)
        return tensor(str(constant.target)).detach().double()

    _, weight_node, bias_node = (*operands(_layer_of(norm)), None)[:3]
    original = tensor(str(weight_node.target)).detach()
    channels = original.shape[0]
    _, gamma, beta, mean, variance = operands(norm)[:5]
    gain = value(gamma, 1.0) / (value(variance, 1.0) + operands(norm)[7]).sqrt()
    weight = original.double() * gain.reshape(-1, *[1] * (original.ndim - 1))
    bias = (value(bias_node, 0.0) - value(mean, 0.0)) * gain + value(beta, 0.0)
    return weight.to(original.dtype), bias.to(original.dtype)


@dataclass(frozen=True)
class FoldBatchnorm(Rewrite):
    tolerance: ClassVar[float] = 1e-4  # float32 rounding through a deep network; seen: 1e-6 on ResNet-20

    def rewrite(self, program: Program) -> Program:
        module = copy_graph(program.graph)
        graph = module.graph
        _drop_identities(graph)
        for weight, norms in _norms_by_weight(graph).items():
            key = str(weight.target)
            bias_key = key.rpartition(".")[0] + ".folded_bias" if "." in key else f"{key}_folded_bias"
            folded, bias = _fold(program.tensor, norms[0])
            set_tensor(module, key, folded, parameter=True)
            set_tensor(module, bias_key, bias, parameter=True)
            with graph.inserting_after(weight):
                bias_node = graph.get_attr(bias_key)
            bias_node.meta["val"] = weight.meta["val"].new_empty(bias.shape)
            for norm in norms:
                layer = _layer_of(norm)
                layer.args = (*layer.args[:2], bias_node, *layer.args[3:])
                norm.replace_all_uses_with(layer)
                graph.erase_node(norm)
        graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.recompile()
        return replace(program, graph=fx.GraphModule(module, graph))
