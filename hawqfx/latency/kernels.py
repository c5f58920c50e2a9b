"""The kernels of a network: groups of nodes that onnxruntime runs as one, and whose speed depends on formats."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx
from torch.utils import _pytree as pytree

from hawqfx.analysis.partition import kernel_inputs
from hawqfx.ir.operators import PADS, ceiling, is_data_movement, is_tensor
from hawqfx.ir.program import Program

VIEWS = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"}  # data movement that costs nothing


@dataclass(frozen=True)
class Kernel:
    """Nodes that onnxruntime runs as one kernel.

    Args:
        nodes: an operator, and the rectifier that it takes in, if there is one.
        inputs: the activations that it reads.
        weight: key of its weight's site, if it has one.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    weight: str | None

    @property
    def operator(self) -> fx.Node:
        """The first node, which reads the inputs."""
        return self.nodes[0]

    @property
    def output(self) -> fx.Node:
        """The last node, whose tensor the kernel hands out."""
        return self.nodes[-1]

    def signature(self, mode: str, shape_of: Callable[[fx.Node], Sequence[int]], quantized: bool) -> str:
        """Mode, operators, attributes and shapes as text: kernels with the same signature take the same time.

        Args:
            mode: a member of hawqfx.maths.latency_model.KERNELS, or a weight-only format in words; without a
                weight, all but "integer" are the same.
            shape_of: the shape of a node's tensor in the run, or the size that a node without a tensor gives; empty
                where it is unknown.
            quantized: whether the output belongs to an activation site.
        """
        parts: list[object] = [mode if self.weight is not None or mode == "integer" else "floating"]
        for node in self.nodes:
            arguments = [
                tuple(shape_of(argument)) if isinstance(argument, fx.Node) else argument
                for argument in pytree.tree_leaves((node.args, node.kwargs))
            ]
            parts += [str(node.target), arguments]
        parts.append(quantized)
        return json.dumps(parts, default=str)


def kernels_of(program: Program) -> list[Kernel]:
    """The kernels whose speed depends on the choice of formats, in the order of the graph."""
    data_movement = {name for site in program.activations for name in site.data_movement}
    weights = {layer.node: layer.weight for layer in program.layers}
    others = {*program.elementwise, *(product.node for product in program.products)}
    sites = program.site_of
    kernels = []
    for node in program.graph.graph.nodes:
        if node.name in data_movement and not is_free(node):
            kernels.append(Kernel((node,), tuple(filter(is_tensor, node.all_input_nodes)), None))
        elif node.name in weights or node.name in others:
            nodes = (node, *_fused_rectifier(node, sites))
            kernels.append(Kernel(nodes, kernel_inputs(node), weights.get(node.name)))
    return kernels


def is_free(node: fx.Node) -> bool:
    """Whether a movement of data costs nothing: a view, or a padding that the layer after it takes in."""
    return is_data_movement(node) and (node.target in PADS or str(node.target).split(".")[1] in VIEWS)


def readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a tensor, directly or through data movement that is free."""
    return [reader for user in node.users for reader in (readers(user) if is_free(user) else [user])]


def _fused_rectifier(node: fx.Node, sites: dict[str, str]) -> tuple[fx.Node, ...]:
    """The rectifier that a kernel takes in: the only user of a node whose own tensor has no quantizer."""
    if len(node.users) != 1 or node.name in sites:
        return ()
    (user,) = node.users
    return (user,) if ceiling(user) is not None and user.name in sites else ()
