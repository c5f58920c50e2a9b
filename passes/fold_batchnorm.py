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

from hawqfx.contract import Rewrite
from hawqfx.program import Program, copy_graph, set_tensor
from hawqfx.vocabulary import BATCH_NORM, DROPOUT, IDENTITIES, WEIGHTED, is_constant


def _drop_identities(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target in DROPOUT | IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _foldable(norm: fx.Node) -> bool:
    layer = norm.args[0]
    return (
        isinstance(layer, fx.Node)
        and layer.target in WEIGHTED
        and len(layer.users) == 1
        and is_constant(layer.args[1])
        and (len(layer.args) < 3 or layer.args[2] is None or is_constant(layer.args[2]))
        and all(argument is None or is_constant(argument) for argument in norm.args[1:5])
    )


def _norms_by_weight(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Weight node -> the batch-norms to fold into it, all of them equal and one per use of the weight."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for norm in graph.find_nodes(op="call_function", target=BATCH_NORM):
        if _foldable(norm):
            found.setdefault(norm.args[0].args[1], []).append(norm)

    def same(norms: list[fx.Node]) -> bool:
        return len({(*norm.args[1:5], norm.args[7], norm.args[0].args[2:3]) for norm in norms}) == 1

    return {weight: norms for weight, norms in found.items() if len(norms) == len(weight.users) and same(norms)}


def _fold(tensor: Callable[[str], Tensor], norm: fx.Node) -> tuple[Tensor, Tensor]:
    """The weight and bias of the layer before `norm`, with `norm` folded in; computed in float64."""

    def value(argument: object, otherwise: float) -> Tensor:
        if isinstance(argument, fx.Node):
            return tensor(str(argument.target)).detach().double()
        return torch.full_like(mean, otherwise)

    layer = norm.args[0]
    mean = tensor(str(norm.args[3].target)).detach().double()
    variance = tensor(str(norm.args[4].target)).detach().double()
    gain = value(norm.args[1], 1.0) / (variance + norm.args[7]).sqrt()
    original = tensor(str(layer.args[1].target)).detach()
    weight = original.double() * gain.reshape(-1, *[1] * (original.ndim - 1))
    bias = (value(layer.args[2] if len(layer.args) > 2 else None, 0.0) - mean) * gain + value(norm.args[2], 0.0)
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
                layer = norm.args[0]
                assert isinstance(layer, fx.Node)
                layer.args = (*layer.args[:2], bias_node, *layer.args[3:])
                norm.replace_all_uses_with(layer)
                graph.erase_node(norm)
        graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.recompile()
        return replace(program, graph=fx.GraphModule(module, graph))
