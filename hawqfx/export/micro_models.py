"""Small ONNX files of one kernel each, to time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from numpy.typing import NDArray

from hawqfx.export import cleanup, translations
from hawqfx.export.legalize.pipeline import legalization
from hawqfx.export.opsets import IR_VERSION, OPSET
from hawqfx.ir.program import Program

Inputs = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
"""Shape and type of each input of a file, by name."""


@dataclass(frozen=True)
class MicroModel:
    """A small file.

    Args:
        content: of the file.
        inputs: the shape and the type of each of its inputs, by name.
    """

    content: bytes
    inputs: Inputs


class MicroModels:
    """A program whose outputs have no part in common, as small ONNX files, one for each output.

    Args:
        program: the network; every input of it is fed to one output alone.
        inputs: the values of its placeholders, of which shapes and types are taken.
    """

    def __init__(self, program: Program, inputs: Sequence[torch.Tensor]) -> None:
        for step in legalization(image_inputs=False):
            program = step.rewrite(program)
        exported = torch.export.export(program.graph, tuple(inputs), strict=False)
        translated = translations.translate(exported, OPSET["portable"])
        cleanup.clean(translated, [f"output_{number}" for number in range(len(translated.graph.outputs))])
        translated.ir_version = IR_VERSION["portable"]
        self.model = onnx_ir.to_proto(translated)
        graph = self.model.graph
        self.made = {name: node for node in graph.node for name in node.output}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        values = zip(graph.input, inputs, strict=True)
        self.shapes = {value.name: (tuple(tensor.shape), tensor.numpy().dtype) for value, tensor in values}
        self._give_weights_a_zero_point()

    def piece(self, output: int, copies: int) -> MicroModel:
        """A file with copies of the part that makes an output, each with inputs and constants of its own, so that
        onnxruntime finds nothing to share.  Where tensors at the part's edges are quantized, the edges are integers.

        Args:
            output: the number of the output.
            copies: the number of copies.
        """
        part = self._part(self._without_dequantization(self.model.graph.output[output].name))
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for name in ("node", "initializer", "input", "output", "value_info"):
            model.graph.ClearField(name)
        shapes: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        for copy in range(copies):
            shapes |= self._add_copy(model.graph, part, f"_{copy}")
        return MicroModel(model.SerializeToString(), shapes)

    def _part(self, target: str) -> "_Part":
        """The part of the graph that makes a value."""
        nodes: list[onnx.NodeProto] = []
        inputs: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        waiting, seen = [target], set()
        while waiting:
            name = waiting.pop()
            node = self.made.get(name)
            if name in self.shapes:
                inputs[name] = self.shapes[name]
            elif node is None or id(node) in seen:
                continue
            elif name != target and node.op_type == "QuantizeLinear" and node.input[0] in self.shapes:
                inputs[name] = self.shapes[node.input[0]][0], np.dtype(np.uint8)
            else:
                seen.add(id(node))
                nodes.append(node)
                waiting += filter(None, node.input)
        order = {id(node): number for number, node in enumerate(self.model.graph.node)}
        nodes.sort(key=lambda node: order[id(node)])
        used = {name for node in nodes for name in node.input} & self.constants.keys()
        return _Part(target, nodes, inputs, sorted(used))

    def _add_copy(self, graph: onnx.GraphProto, part: "_Part", suffix: str) -> Inputs:
        """Add a copy of a part to a graph, with a suffix behind all names; returns the copy's inputs."""
        for node in part.nodes:
            _add_node(graph, node, suffix)
        for name in part.constants:
            tensor = graph.initializer.add()
            tensor.CopyFrom(self.constants[name])
            tensor.name = name + suffix
        inputs = {name + suffix: shaped for name, shaped in part.inputs.items()}
        for name, (shape, dtype) in inputs.items():
            kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
            graph.input.append(onnx.helper.make_tensor_value_info(name, kind, shape))
        quantized = self.made[part.target].op_type == "QuantizeLinear"
        kind = onnx.TensorProto.UINT8 if quantized else onnx.TensorProto.FLOAT
        graph.output.append(onnx.helper.make_tensor_value_info(part.target + suffix, kind, None))
        return inputs

    def _without_dequantization(self, name: str) -> str:
        """The integers behind a value that a DequantizeLinear makes of computed integers; else the value."""
        node = self.made[name]
        if node.op_type == "DequantizeLinear" and node.input[0] in self.made:
            return str(node.input[0])
        return name

    def _give_weights_a_zero_point(self) -> None:
        """onnxruntime's integer kernels take no weight without one."""
        for node in self.model.graph.node:
            codes = self.constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
            if codes is not None and codes.data_type == onnx.TensorProto.INT8 and len(node.input) == 2:
                zeros = np.zeros(codes.dims[0], np.int8)
                name = f"{codes.name}_zeros"
                self.constants[name] = onnx.numpy_helper.from_array(zeros, name)
                node.input.append(name)


@dataclass(frozen=True)
class _Part:
    """The part of a graph that makes the value `target`, with the names of its constants."""

    target: str
    nodes: Sequence[onnx.NodeProto]
    inputs: Inputs
    constants: Sequence[str]


def _add_node(graph: onnx.GraphProto, node: onnx.NodeProto, suffix: str) -> None:
    """Add a copy of a node with a suffix behind all names; a name that is empty leaves an optional input out."""
    copy = graph.node.add()
    copy.CopyFrom(node)
    copy.ClearField("input")
    copy.ClearField("output")
    copy.ClearField("name")  # onnxruntime takes no name twice
    copy.input.extend(name and name + suffix for name in node.input)
    copy.output.extend(name and name + suffix for name in node.output)


@dataclass(frozen=True)
class _Conversion:
    """An operator that converts a tensor: the type that it reads and the type that it makes, and its constants."""

    reads: int
    makes: int
    constants: tuple[str, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)


def _conversions(shape: tuple[int, ...]) -> dict[str, _Conversion]:
    number, code = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
    return {
        "QuantizeLinear": _Conversion(number, code, ("scale", "zero")),
        "DequantizeLinear": _Conversion(code, number, ("scale", "zero")),
        "Clip": _Conversion(code, code, ("least", "most")),
        "Transpose": _Conversion(code, code, (), {"perm": [0, *range(2, len(shape)), 1]}),
        "MaxPool": _Conversion(number, number, (), {"kernel_shape": [1] * (len(shape) - 2)}),
    }


def operator_micro_model(operator: str, shape: tuple[int, ...], low: int, copies: int) -> MicroModel:
    """A file of conversions, each of a tensor of its own.

    Args:
        operator: QuantizeLinear, DequantizeLinear, Clip (of uint8, to 4 bits), Transpose (of uint8, moves the channels
            of an image last) or MaxPool (of float32, over one pixel).
        shape: of a tensor.
        low: the zero-point.
        copies: the number of conversions.
    """
    conversion = _conversions(shape)[operator]
    constants: dict[str, NDArray[Any]] = {
        "scale": np.array(0.05, np.float32), "zero": np.array(low, np.uint8),
        "least": np.array(0, np.uint8), "most": np.array(15, np.uint8),
    }  # fmt: skip
    helper, attributes = onnx.helper, conversion.attributes
    nodes = [
        helper.make_node(operator, [f"x{copy}", *conversion.constants], [f"y{copy}"], **attributes)
        for copy in range(copies)
    ]
    inputs = [helper.make_tensor_value_info(f"x{copy}", conversion.reads, shape) for copy in range(copies)]
    outputs = [helper.make_tensor_value_info(f"y{copy}", conversion.makes, None) for copy in range(copies)]
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "hawqfx", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", OPSET["portable"])]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION["portable"])
    dtype = helper.tensor_dtype_to_np_dtype(conversion.reads)
    return MicroModel(model.SerializeToString(), {value.name: (shape, dtype) for value in inputs})
