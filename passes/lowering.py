"""Put the chosen quantizers into the graph: one fake-quantize node per tensor.

Every number comes from the facts.  The tensors of each activation site, each weight and each bias go through a
fake-quantize node, which export writes as QuantizeLinear and DequantizeLinear; a site that the plan leaves in float
gets none.  A bias is int32 with the scale of the sums that it is added to, input scale x weight scale, computed in the
graph so that the file need not hold it; where the input or the weight is not static, the bias stays in float.  In the
schemes "dynamic" and "weight-only" a kernel rounds its input by itself; that rounding is a node before the layer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from hawqfx.ir.custom_ops import FAKE_QUANTIZE, FAKE_QUANTIZE_BLOCKS, FAKE_QUANTIZE_DYNAMIC
from hawqfx.ir.facts import ChosenFormat, Quantizers, QuantParams, RoundedWeights
from hawqfx.ir.operators import PADS, ceiling
from hawqfx.ir.program import SCALE, Program
from hawqfx.ir.quantizers import scale_of, weight_at
from hawqfx.ir.rewriter import GraphRewriter
from hawqfx.ir.sites import ActivationSite, Layer, WeightSite
from hawqfx.maths.formats import Scheme
from hawqfx.pass_manager.base import Kind, Rewrite

INT32 = torch.iinfo(torch.int32)


@dataclass(frozen=True)
class Lowering(Rewrite):
    """Puts the chosen quantizers into the graph."""

    tolerance: ClassVar[float] = float("inf")  # changes the function by design: the plan predicts by how much
    needs: ClassVar[tuple[Kind, ...]] = (ChosenFormat, Quantizers, RoundedWeights)

    def rewrite(self, program: Program) -> Program:
        lowerer = _Lowerer(program, _chosen(program))
        lowerer.own_biases()
        for weight in program.weights:
            lowerer.lower_weight(weight)
        for site in program.activations:
            lowerer.lower_activation(site)
        schemes = program.schemes()
        for layer in program.layers:
            lowerer.lower_layer(layer, schemes[layer.node])
        return lowerer.done()


def _chosen(program: Program) -> dict[str, QuantParams]:
    """The quantizer of every site that the plan does not leave in float."""
    return {
        key: program.facts.get(key, Quantizers).by_format[chosen]
        for key, chosen in program.formats().items()
        if not chosen.is_float
    }


class _Lowerer(GraphRewriter):
    """Writes quantizers into a copy of the graph."""

    def __init__(self, program: Program, chosen: Mapping[str, QuantParams]) -> None:
        super().__init__(program)
        self.chosen = chosen
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.constants = {str(node.target): node for node in self.graph.find_nodes(op="get_attr")}
        self.scales: dict[str, fx.Node] = {}

    def own_biases(self) -> None:
        """Biases are tensors of the lowered graph alone: it may be trained."""
        for layer in self.program.layers:
            if layer.bias is not None:
                quantizer, known = self.chosen.get(layer.weight), self.program.facts.get(layer.weight, RoundedWeights)
                self.own(layer.bias, None if quantizer is None else known.biases.get(quantizer.format))

    def own(self, key: str, value: Tensor | None = None) -> None:
        """Copy a parameter, or another value in its place, so that the lowered graph does not share it."""
        self.store(key, (self.program.tensor(key) if value is None else value).detach().clone(), parameter=True)

    def lower_weight(self, site: WeightSite) -> None:
        """A weight goes through its quantizer, which maps the stored values onto themselves."""
        quantizer = self.chosen.get(site.key)
        if quantizer is None:
            self.own(site.key)
            return
        self.store(site.key, weight_at(self.program, site.key, quantizer.format), parameter=True)
        self.quantize(self.constants[site.key], self.scale(site.key, quantizer), quantizer)

    def lower_activation(self, site: ActivationSite) -> None:
        """Every tensor of a static site goes through the quantizer; a dynamic site has its quantizers at its layers."""
        quantizer = self.chosen.get(site.key)
        if quantizer is None or quantizer.scheme == "dynamic":
            return
        scale = self.scale(site.key, quantizer)
        for name in site.tensors:
            node = self.nodes[name]
            if node.target in PADS:  # zeros are on the grid already
                continue
            if site.nonnegative and site.ceiling < math.inf and ceiling(node) is not None:
                # the quantizer's range ends at the ceiling; a ReLU is the rectifier that onnxruntime fuses
                node.target, node.args, node.kwargs = torch.ops.aten.relu.default, node.args[:1], {}
            self.quantize(node, scale, quantizer)

    def lower_layer(self, layer: Layer, scheme: Scheme) -> None:
        """The input of a layer that computes dynamically or in blocks, and the bias of a static layer."""
        node = self.nodes[layer.node]
        if scheme == "dynamic":
            self.quantize_input(node, FAKE_QUANTIZE_DYNAMIC)
        if scheme == "weight-only":
            self.quantize_input(node, FAKE_QUANTIZE_BLOCKS, self.chosen[layer.weight].block)
        if layer.bias is not None and scheme == "static":
            self.quantize_bias(node, self.scales[layer.input], self.scales[layer.weight])

    def scale(self, key: str, quantizer: QuantParams) -> fx.Node:
        """The scale of a site, a buffer at the top of the graph."""
        with self.before(next(iter(self.graph.nodes))):
            self.scales[key] = self.buffer(key + SCALE, scale_of(quantizer))
        return self.scales[key]

    def quantize(self, tensor: fx.Node, scale: fx.Node, quantizer: QuantParams) -> None:
        """Every user of `tensor` now reads it through the quantizer."""
        users = list(tensor.users)
        grid = quantizer.zero_point, quantizer.low, quantizer.high
        with self.after(max(tensor, scale)):
            quantized = self.call(FAKE_QUANTIZE, tensor, scale, *grid, like=tensor)
        for user in users:
            user.replace_input_with(tensor, quantized)

    def quantize_input(self, layer: fx.Node, rounding: OpOverload[..., Any], *arguments: int) -> None:
        """The layer reads its input through `rounding`; layers that read a tensor in the same way share one node."""
        source = layer.args[0]
        assert isinstance(source, fx.Node)
        same = (user for user in source.users if user.target is rounding and user.args[1:] == arguments)
        rounded = next(same, None)
        if rounded is None:
            with self.after(source):
                rounded = self.call(rounding, source, *arguments, like=source)
        layer.args = (rounded, *layer.args[1:])

    def quantize_bias(self, layer: fx.Node, input_scale: fx.Node, weight_scale: fx.Node) -> None:
        """The bias of a layer is int32, with the scale of the sums that it is added to."""
        with self.before(layer):
            scale = self.call(torch.ops.aten.mul.Tensor, weight_scale, input_scale)
            quantized = self.call(FAKE_QUANTIZE, layer.args[2], scale, 0, INT32.min, INT32.max)
        layer.args = (*layer.args[:2], quantized, *layer.args[3:])
