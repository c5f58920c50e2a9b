"""Cut kernels out of a network, and put them side by side into one graph, so that one export serves them all."""

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from hawqfx.ir.facts import ChosenFormat, Fact, Quantizers, RoundedWeights
from hawqfx.ir.graph import set_tensor
from hawqfx.ir.operators import WEIGHTED_LAYERS, is_constant, operands
from hawqfx.ir.program import Program
from hawqfx.ir.sites import ActivationSite, Layer, WeightSite
from hawqfx.latency.kernels import Kernel
from hawqfx.maths.formats import FLOAT, Format
from hawqfx.passes.lowering import Lowering


def lowered(program: Program, weights: Format, activations: Format) -> Program:
    """The program lowered with one format for all weights, and one for all activations.

    A site that does not have a static format takes the next narrower one, since a kernel's speed does not depend on the
    bits of its weight, and a weight without one the widest in blocks; a site that does not have another format stays in
    float.

    Args:
        program: knows the Quantizers of its sites and the RoundedWeights of its weights.
        weights: the format of the weights.
        activations: the format of the activations.
    """
    facts: dict[str, Fact] = {}
    for site in program.sites:
        wanted = weights if isinstance(site, WeightSite) else activations
        facts[site.key] = ChosenFormat(_nearest_format(program, site.key, wanted), 0.0)
    # by itself: a small graph may have no weight, whose facts the order of passes asks for
    return Lowering().rewrite(program.learn(facts))


def _nearest_format(program: Program, key: str, wanted: Format) -> Format:
    known = program.facts.get(key, Quantizers).by_format
    if not wanted.is_static:
        return wanted if wanted in known else FLOAT
    static = [width for width in known if width.is_static and width <= wanted]
    return max(static or [width for width in known if width.is_blockwise])


class SubgraphBuilder:
    """Builds a program of which every output is a kernel with placeholders and constants of its own."""

    def __init__(self, network: Program, values: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
        """Start with an empty graph.

        Args:
            network: the program that the kernels belong to.
            values: name of a node -> its tensor in the run, for all inputs and outputs of kernels.
            sizes: name of a node -> the size of a tensor that it gives to kernels; a constant of the small graph.
        """
        self.network, self.values, self.sizes = network, values, sizes
        self.site_of = network.site_of
        self.module = fx.GraphModule(torch.nn.Module(), fx.Graph())
        self.graph = self.module.graph
        self.inputs: list[Tensor] = []
        self.outputs: list[fx.Node] = []
        self.sites: list[WeightSite | ActivationSite] = []
        self.layers: list[Layer] = []
        self.facts: list[tuple[str, Fact]] = []
        self.last_placeholder: fx.Node | None = None

    def add(self, kernel: Kernel) -> int:
        """Copy a kernel into the graph.

        Returns:
            The number of its output.
        """
        number = len(self.outputs)
        copies: dict[fx.Node, fx.Node] = {}
        for node in dict.fromkeys(kernel.inputs):
            copies[node] = self._placeholder(f"x{number}_{len(copies)}", self.values[node.name])
            self._add_activation(copies[node].name, node.name)
        for node in kernel.nodes:
            for argument in node.all_input_nodes:
                if is_constant(argument) and argument not in copies:
                    copies[argument] = self._constant(number, str(argument.target))
            copies[node] = self.graph.node_copy(
                node, lambda source: self.sizes[source.name] if source.name in self.sizes else copies[source]
            )
            copies[node].name = f"k{number}_{len(copies)}"
        if kernel.weight is not None:
            self._add_layer(number, kernel.operator, kernel.weight, copies)
        self._add_activation(copies[kernel.output].name, kernel.output.name)
        self.outputs.append(copies[kernel.output])
        return number

    def program(self) -> Program:
        """The finished program."""
        self.graph.output(tuple(self.outputs))
        self.graph.lint()
        self.module.recompile()
        program = Program(self.module, tuple(self.sites), tuple(self.layers))
        for key, fact in self.facts:
            program = program.learn({key: fact})
        return program

    def _placeholder(self, name: str, value: Tensor) -> fx.Node:
        last = self.last_placeholder
        with self.graph.inserting_after(last) if last is not None else self.graph.inserting_before(None):
            node = self.graph.placeholder(name)
        node.meta["val"] = value
        self.last_placeholder = node
        self.inputs.append(value)
        return node

    def _constant(self, number: int, target: str) -> fx.Node:
        layer = next((layer for layer in self.network.layers if target in (layer.weight, layer.bias)), None)
        name = f"p{number}." + ("weight" if layer is None or layer.weight == target else "bias")
        set_tensor(self.module, name, self.network.tensor(target).detach(), parameter=True)
        return self.graph.get_attr(name)

    def _add_layer(self, number: int, operator: fx.Node, weight: str, copies: Mapping[fx.Node, fx.Node]) -> None:
        source, _, *bias = operands(operator)[:3]
        layer = Layer(
            node=copies[operator].name,
            operator=WEIGHTED_LAYERS[operator.target],
            weight=f"p{number}.weight",
            bias=f"p{number}.bias" if bias and isinstance(bias[0], fx.Node) else None,
            input=copies[source].name,
            macs=0,
        )
        self.layers.append(layer)
        self.sites.append(WeightSite(layer.weight, layer.operator, tuple(self.network.tensor(weight).shape)))
        known = self.network.facts
        self.facts += [(layer.weight, known.get(weight, Quantizers)), (layer.weight, known.get(weight, RoundedWeights))]

    def _add_activation(self, name: str, original: str) -> None:
        """Make a site of a tensor whose original in the network belongs to one."""
        if original not in self.site_of:
            return
        value = self.values[original]
        self.sites.append(ActivationSite(name, "part", tuple(value.shape), value.numel(), (name,), (), False))
        self.facts.append((name, self.network.facts.get(self.site_of[original], Quantizers)))
