"""The float network and the quantized one, walked through side by side: what each layer reads and gives in both."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from hawqfx.analysis.finite import first_less_finite, refuse_not_finite
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import RoundedWeights
from hawqfx.ir.graph import batch_size, captured_shape
from hawqfx.ir.operators import ceiling
from hawqfx.ir.program import Program
from hawqfx.ir.quantizers import activation_at, weight_at
from hawqfx.ir.sites import Layer
from hawqfx.sensitivity.batching import with_room

Values = dict[fx.Node, Any]


def quantized_layers(program: Program) -> list[Layer]:
    """The layers whose weights have integer formats, in the order of the graph."""
    formats = program.formats()
    layers = {layer.node: layer for layer in program.layers if not formats[layer.weight].is_float}
    return [layers[node.name] for node in program.graph.graph.nodes if node.name in layers]


def passes(node: fx.Node) -> float | None:
    """The value up to which, from zero, a layer's output passes the rectifiers that read it; None if anything else
    reads it too."""
    ends = [ceiling(user) for user in node.users]
    known = [end for end in ends if end is not None]
    return max(known) if known and len(known) == len(ends) else None


def bytes_kept(program: Program) -> int:
    """Bytes that a walk keeps of each sample, at the most: in both networks, what is read after one of the nodes where
    it may stop, the inputs of layers, and outputs that rectifiers read."""
    nodes = list(program.graph.graph.nodes)
    made = {node: number for number, node in enumerate(nodes) if node.op in ("placeholder", "call_function")}
    read = {node: max((made.get(user, len(nodes)) for user in node.users), default=-1) for node in made}
    layers = {layer.node for layer in program.layers}
    outputs = [node for node in made if node.name in layers]
    stops = {source for node in outputs for source in node.all_input_nodes if source in made}
    stops |= {node for node in outputs if passes(node) is not None}
    samples = batch_size(program.graph.graph)

    def kept(stop: fx.Node) -> int:
        live = (node for node in made if node is stop or made[node] < made[stop] < read[node])
        return sum(_bytes(node) for node in live)

    return 2 * max(map(kept, stops), default=0) // samples


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return math.prod(captured_shape(node)) * value.element_size() if isinstance(value, Tensor) else 0


class SideBySide:
    """Both networks on all samples at once, up to a node.

    Args:
        program: with the facts about its quantizers and codes, and a plan.
        context: the samples; as many as fit into memory are taken.
        purpose: begins the sentence of a warning where not all samples fit.

    Attributes:
        facts: of the weights; the codes and biases so far.
        reached: the number of the node that the values are up to.
        sizes: samples of each batch.
        floats: batch by batch, the values of the float network that nodes further on read.
        quantized: likewise of the quantized network.
    """

    def __init__(self, program: Program, context: Context, purpose: str) -> None:
        context = with_room(program, context, bytes_kept(program), purpose)
        self.program, self.formats = program, program.formats()
        self.site_of = {node: site.key for site in program.activations for node in site.nodes}
        self.nodes = list(program.graph.graph.nodes)
        self.numbers = {node: number for number, node in enumerate(self.nodes)}
        self.named = {node.name: node for node in self.nodes}
        self.facts = {site.key: program.facts.get(site.key, RoundedWeights) for site in program.weights}
        self.tensors = {
            key: weight_at(program, key, self.formats[key]) for key in self.facts if not self.formats[key].is_float
        }
        for layer in program.layers:
            bias = self.facts[layer.weight].biases.get(self.formats[layer.weight])
            if layer.bias is not None and bias is not None:
                self.tensors[layer.bias] = bias
        inputs = [node for node in self.nodes if node.op == "placeholder"]
        self.reached = max(self.numbers[node] for node in inputs)
        self.sizes = [batch.size for batch in context.batches]
        self.floats: list[Values] = [
            dict(zip(inputs, program.flat_inputs(batch.args, batch.kwargs), strict=True)) for batch in context.batches
        ]
        self.quantized: list[Values] = [
            {node: self._rounded(node.name, value) for node, value in values.items()} for values in self.floats
        ]

    def go_on(self, end: fx.Node, *, quantized: bool = True) -> None:
        """Compute what nodes after `end` read, and `end` itself.

        Args:
            end: the node.
            quantized: whether `end` goes through its own quantizer.

        Raises:
            LossError: if a value is not finite in the quantized network alone.
        """
        last = self.numbers[end]
        if last <= self.reached:  # a layer further on reads it, so that its values are here
            return
        between, self.reached = self.nodes[self.reached + 1 : last + 1], last
        later = [
            node
            for node in self.nodes[: last + 1]
            if node.op != "get_attr" and any(self.numbers[user] > last for user in node.users)
        ]
        wanted = later if end in later else [*later, end]

        def hook(name: str, value: Tensor) -> Tensor:
            return value if name == end.name and not quantized else self._rounded(name, value)

        def both(nodes: Sequence[fx.Node], exact: Values, rounded: Values) -> tuple[Values, Values]:
            return self.program.evaluate(nodes, exact), self.program.evaluate(nodes, rounded, hook, self.tensors)

        for index, before in enumerate(zip(self.floats, self.quantized, strict=True)):
            self.floats[index], self.quantized[index] = both(wanted, *before)
            if first_less_finite(self.floats[index], self.quantized[index]) is not None:
                refuse_not_finite(self.program, *both(between, *before))

    def recode(self, key: str, codes: Tensor, weight: Tensor) -> None:
        """Give a compensated weight other codes, int8 in its shape, of which `weight` are the values."""
        known = self.facts[key]
        assert known.compensation is not None
        how = replace(known.compensation, sequential=True)
        self.facts[key] = replace(known, codes={**known.codes, self.formats[key]: codes}, compensation=how)
        self.tensors[key] = weight.to(self.program.tensor(key).dtype)

    def bias_of(self, layer: Layer) -> Tensor:
        """The bias so far, (C,)."""
        assert layer.bias is not None
        return self.tensors.get(layer.bias, self.program.tensor(layer.bias).detach())

    def move_bias(self, layer: Layer, shift: Tensor) -> None:
        """Add (C,) to the bias of a layer that is not computed yet."""
        assert layer.bias is not None
        before, known = self.bias_of(layer), self.facts[layer.weight]
        self.tensors[layer.bias] = (before.double() + shift).to(before.dtype)
        biases: Mapping[Any, Tensor] = {**known.biases, self.formats[layer.weight]: self.tensors[layer.bias]}
        self.facts[layer.weight] = replace(known, biases=biases)

    def shift(self, layer: Layer, shift: Tensor) -> None:
        """Add (C,) to the bias of a layer that is computed, without its quantizer, and to its output, which goes
        through the quantizer now."""
        node = self.named[layer.node]
        for values in self.quantized:
            output = values[node]
            axes = [1] * output.ndim
            axes[channels(layer, output)] = -1
            values[node] = self._rounded(layer.node, output + shift.to(output.dtype).reshape(axes))
        self.move_bias(layer, shift)

    def _rounded(self, name: str, value: Tensor) -> Tensor:
        site = self.site_of.get(name)
        if site is None or self.formats[site].is_float:
            return value
        return activation_at(self.program, site, self.formats[site], value)


def channels(layer: Layer, output: Tensor) -> int:
    """The dimension of a layer's output that the bias runs along."""
    return output.ndim - 1 if layer.operator == "linear" else 1
