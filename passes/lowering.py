"""Put the chosen quantizers into the graph: one fake-quantize node per tensor.

A site that the plan leaves in float gets none.  Decides first: every number comes from the facts.  Emits after: the
output of each activation site, each weight and each bias goes through a fake-quantize node, which export writes as
QuantizeLinear and DequantizeLinear.  A bias is int32 with the scale of the sums that it is added to, input scale x
weight scale, computed in the graph so that the file need not hold it; where the input or the weight is not static, it
stays in float.  Of the schemes "dynamic" and "weight-only", what the kernel does to its input goes before the layer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from hawqfx.ir.custom_ops import FAKE_QUANTIZE, FAKE_QUANTIZE_BLOCKS, FAKE_QUANTIZE_DYNAMIC
from hawqfx.ir.facts import ChosenFormat, Quantizers, QuantParams, RoundedWeights
from hawqfx.ir.operators import PADS, ceiling
from hawqfx.ir.program import SCALE, Program, copy_graph, set_tensor
from hawqfx.ir.quantizers import scale_of, weight_at
from hawqfx.maths.pricing import FLOAT_BITS
from hawqfx.pass_manager.base import Kind, Rewrite

INT32 = torch.iinfo(torch.int32)
# what a kernel does to its input by itself
_INPUTS: Mapping[str, OpOverload[..., Any]] = {
    "dynamic": FAKE_QUANTIZE_DYNAMIC,
    "weight-only": FAKE_QUANTIZE_BLOCKS,
}


class _Emitter:
    """Writes quantizers into a copy of the graph."""

    def __init__(self, program: Program) -> None:
        self.module = copy_graph(program.graph)
        self.graph = self.module.graph
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.constants = {str(node.target): node for node in self.graph.nodes if node.op == "get_attr"}
        self.scales: dict[str, fx.Node] = {}

    def scale(self, key: str, quantizer: QuantParams) -> fx.Node:
        """The scale of a site, a buffer at the top of the graph."""
        name = key + SCALE
        set_tensor(self.module, name, scale_of(quantizer), parameter=False)
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            self.scales[key] = self.graph.get_attr(name)
        return self.scales[key]

    def quantize(self, tensor: fx.Node, scale: fx.Node, quantizer: QuantParams) -> fx.Node:
        """Every user of `tensor` now reads it through the quantizer."""
        users = list(tensor.users)
        with self.graph.inserting_after(max(tensor, scale)):
            arguments = (tensor, scale, quantizer.zero_point, quantizer.low, quantizer.high)
            quantized = self.graph.call_function(FAKE_QUANTIZE, arguments)
        quantized.meta["val"] = tensor.meta.get("val")
        for user in users:
            user.replace_input_with(tensor, quantized)
        return quantized

    def quantize_input(self, layer: fx.Node, how: OpOverload[..., Any]) -> None:
        """The layer reads its input through `how`, of which layers that read the same share one."""
        source = layer.args[0]
        assert isinstance(source, fx.Node)
        found = next((user for user in source.users if user.target is how), None)
        if found is None:
            with self.graph.inserting_after(source):
                found = self.graph.call_function(how, (source,))
            found.meta["val"] = source.meta.get("val")
        layer.args = (found, *layer.args[1:])

    def quantize_bias(self, layer: fx.Node, input_scale: fx.Node, weight_scale: fx.Node) -> None:
        bias = layer.args[2]
        assert isinstance(bias, fx.Node)
        with self.graph.inserting_before(layer):
            scale = self.graph.call_function(torch.ops.aten.mul.Tensor, (weight_scale, input_scale))
            arguments = (bias, scale, 0, INT32.min, INT32.max)
            quantized = self.graph.call_function(FAKE_QUANTIZE, arguments)
        layer.args = (*layer.args[:2], quantized, *layer.args[3:])


@dataclass(frozen=True)
class Lowering(Rewrite):
    tolerance: ClassVar[float] = float("inf")  # changes the function by design: the plan predicts by how much
    needs: ClassVar[tuple[Kind, ...]] = (ChosenFormat, Quantizers, RoundedWeights)

    def rewrite(self, program: Program) -> Program:
        chosen = {
            key: program.facts.get(key, Quantizers).by_bits[bits]
            for key, bits in program.bits().items()
            if bits != FLOAT_BITS
        }
        emit = _Emitter(program)
        biases = {layer.bias for layer in program.layers if layer.bias is not None}
        for key in biases:  # its own tensors: a lowered graph may be trained
            set_tensor(emit.module, key, program.tensor(key).detach().clone(), parameter=True)
        for weight in program.weights:
            quantizer = chosen.get(weight.key)
            if quantizer is None:
                set_tensor(emit.module, weight.key, program.tensor(weight.key).detach().clone(), parameter=True)
                continue
            # the quantizer maps these values onto themselves
            set_tensor(emit.module, weight.key, weight_at(program, weight.key, quantizer.width), parameter=True)
            emit.quantize(emit.constants[weight.key], emit.scale(weight.key, quantizer), quantizer)
        for site in program.activations:
            if site.key not in chosen:
                continue
            quantizer = chosen[site.key]
            if quantizer.scheme == "dynamic":
                continue
            scale = emit.scale(site.key, quantizer)
            for name in (*site.nodes, *site.data_movement):
                node = emit.nodes[name]
                if node.target in PADS:  # zeros are on the grid already
                    continue
                if site.nonnegative and site.ceiling < math.inf and ceiling(node) is not None:
                    # the quantizer's range ends at the ceiling; a ReLU is what onnxruntime takes into a kernel
                    node.target, node.args, node.kwargs = torch.ops.aten.relu.default, node.args[:1], {}
                emit.quantize(node, scale, quantizer)
        schemes = program.schemes()
        for layer in program.layers:
            node, scheme = emit.nodes[layer.node], schemes[layer.node]
            if scheme in _INPUTS:
                emit.quantize_input(node, _INPUTS[scheme])
            if layer.bias is not None and scheme == "static":
                emit.quantize_bias(node, emit.scales[layer.input], emit.scales[layer.weight])
        emit.graph.eliminate_dead_code()
        emit.module.recompile()
        return replace(program, graph=fx.GraphModule(emit.module, emit.graph))
