"""Lowered Program -> ONNX, with packed weights that onnxruntime unpacks once, when it loads the file.

Weights are stored in `bits` bits each and go through one model-local function per width, called by every layer, which
unpacks them and dequantizes.  onnxruntime inlines the function, folds the unpacking, and sees an int8 weight behind a
DequantizeLinear, which its integer kernels take in.  What the kernels need, as measured with onnxruntime 1.32:
weights signed with an explicit zero-point of zeros (QGemm is not fused without one), activations uint8 with a
zero-point, biases int32, and 4- or 6-bit activations as uint8 with a Clip on the integers (uint4 stays in float).
"""

import itertools
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes import common
from onnxscript import opset18 as op
from onnxscript.values import Op, Opset
from torch import fx

from hawqfx.atomic_write import check_writable, whole_file
from hawqfx.errors import ExportError
from hawqfx.export.legalize.integer_constants import freeze
from hawqfx.frontend import capture
from hawqfx.frontend.context import Batch
from hawqfx.ir.custom_ops import (
    BLOCKWISE_LINEAR,
    DEQUANTIZE,
    DEQUANTIZE_ROWS,
    DYNAMIC_LINEAR,
    FAKE_QUANTIZE,
    GLOBAL_AVERAGE,
    SPACE_TO_DEPTH,
)
from hawqfx.ir.program import SCALE, Program, output_names
from hawqfx.maths import packing
from hawqfx.maths.formats import BLOCK, BLOCKWISE, bits_of

Packing = Literal["portable", "native"]

DOMAIN = "hawqfx"
LARGEST_FILE = (1 << 31) - (1 << 26)  # bytes of tensors; protobuf takes files below 2 GiB
IN_8_BITS = 4  # accuracy_level of MatMulNBits: what it multiplies by is rounded so
OPSET: dict[str, int] = {"portable": 18, "native": 25}
IR_VERSION: dict[str, int] = {"portable": 10, "native": 13}
OLDEST_RUNTIME: dict[str, str] = {"portable": "1.20", "native": "1.24"}


def export(
    program: Program, example: Batch, path: str | Path, packing: Packing = "portable", metadata: Mapping[str, str] = {}
) -> None:
    """Write a program, lowered or not, as an ONNX file; whole or not at all.

    `packing`: "portable" stores bit-planes in uint8 and loads in onnxruntime 1.20 and later; "native" stores ONNX's
    INT4 and INT2 and loads in 1.24 and later.  Raises ExportError.
    """
    if packing not in OPSET:
        raise ExportError(f"packing={packing!r}: must be one of {', '.join(OPSET)}")
    check_writable(Path(path))
    frozen, widths = freeze(program)
    model = _translate(frozen, example, OPSET[packing])
    for name, bits in widths.items():
        _pack_weight(model, name, bits, packing)
    _tidy(model, output_names(frozen))
    model.ir_version = IR_VERSION[packing]
    model.producer_name, model.producer_version = "hawqfx", None
    model.metadata_props.update(metadata)
    _write(model, Path(path))


def _constant(value: object, dtype: type[np.generic]) -> Any:
    return op.Constant(value=onnx.numpy_helper.from_array(np.array(value, dtype)))


def _activation(x: Any, scale: Any, zero_point: int, low: int, high: int) -> Any:
    zero = _constant(zero_point, np.uint8)
    codes = op.QuantizeLinear(x, scale, zero)
    if (low, high) != (0, 255):
        codes = op.Clip(codes, _constant(low, np.uint8), _constant(high, np.uint8))
    return op.DequantizeLinear(codes, scale, zero)


def _constant_codes(codes: Any, scale: Any) -> Any:
    return op.DequantizeLinear(codes, scale, axis=0)


def _rows(codes: Any, scale: Any, rows: Any) -> Any:
    values = op.Cast(op.Gather(codes, rows), to=onnx.TensorProto.FLOAT)
    return op.Mul(values, op.Unsqueeze(op.Gather(scale, rows), _constant(-1, np.int64)))


def _average(x: Any) -> Any:
    return op.GlobalAveragePool(x)


def _space_to_depth(x: Any, pads: Sequence[int], block: int) -> Any:
    if any(pads):
        left, right, top, bottom = pads
        x = op.Pad(x, _constant([0, 0, top, left, 0, 0, bottom, right], np.int64))
    return op.SpaceToDepth(x, blocksize=block)


def _matmul_nbits() -> Op:
    """What onnxruntime adds to ONNX for weight-only layers, as far as it is used here."""
    schema = onnx.defs.OpSchema
    kinds = {"T1": "tensor(float)", "T2": "tensor(uint8)"}
    return Op(
        Opset("com.microsoft", 1),
        "MatMulNBits",
        schema(
            "MatMulNBits",
            "com.microsoft",
            1,
            inputs=[schema.FormalParameter(name, kind) for name, kind in (("A", "T1"), ("B", "T2"), ("scales", "T1"))],
            outputs=[schema.FormalParameter("Y", "T1")],
            type_constraints=[(name, [kind], "") for name, kind in kinds.items()],
            attributes=[
                schema.Attribute(name, schema.AttrType.INT, "")
                for name in ("K", "N", "bits", "block_size", "accuracy_level")
            ],
        ),
    )


_MATMUL_NBITS = _matmul_nbits()


def _dynamic_linear(x: Any, codes: Any, scale: Any) -> Any:
    rounded, step, zero = op.DynamicQuantizeLinear(x)
    sums = op.MatMulInteger(rounded, op.Transpose(codes, perm=[1, 0]), zero)
    return op.Mul(op.Cast(sums, to=onnx.TensorProto.FLOAT), op.Mul(step, scale))


def _blockwise_linear(x: Any, packed: Any, scale: Any, columns: int) -> Any:
    rows = packed.shape[0]
    return _MATMUL_NBITS(
        x, packed, scale, K=columns, N=rows, bits=bits_of(BLOCKWISE), block_size=BLOCK, accuracy_level=IN_8_BITS
    )


_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    FAKE_QUANTIZE: _activation,
    DEQUANTIZE: _constant_codes,
    DEQUANTIZE_ROWS: _rows,
    GLOBAL_AVERAGE: _average,
    SPACE_TO_DEPTH: _space_to_depth,
    DYNAMIC_LINEAR: _dynamic_linear,
    BLOCKWISE_LINEAR: _blockwise_linear,
}


def _translate(graph: fx.GraphModule, example: Batch, opset: int) -> ir.Model:
    exported = capture.export(graph, example)
    with _quiet():
        try:
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=opset,
                optimize=False,  # it would fold the biases' scales into tensors that the file need not hold
                verbose=False,
                custom_translation_table=_TRANSLATIONS,
            )
        except Exception as error:  # the exporter raises many kinds
            raise ExportError(f"torch.onnx could not translate the graph: {error}") from error
    assert program is not None
    return program.model


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of packages that are not installed; nobody can act on that."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _pack_weight(model: ir.Model, name: str, bits: int, how: Packing) -> None:
    """Replace an int8 initializer and its DequantizeLinear by packed tensors and a call that unpacks and dequantizes
    them; where rows of it are gathered, by a call that unpacks them."""
    graph = model.graph
    codes = graph.initializers.pop(name)
    assert codes.const_value is not None
    array = codes.const_value.numpy()
    packed = _packed(name, array, bits, how)
    model.graph.opset_imports[DOMAIN] = 1
    inputs = [_initializer(graph, value) for value in packed]
    unpacked: ir.Value | None = None  # of all who read codes
    for use in list(codes.uses()):
        node = use.node
        if node.op_type != "DequantizeLinear" and unpacked is not None:
            node.replace_input_with(use.idx, unpacked)
            continue
        whole = node.op_type == "DequantizeLinear"
        function = _weight_function(bits, how, dequantized=whole)
        model.functions[function.identifier()] = function
        call = ir.node(function.name, [*inputs, *(node.inputs[1:2] if whole else ())], domain=DOMAIN)
        call.outputs[0].name = node.outputs[0].name if whole else f"{name}_codes"
        graph.insert_before(node, call)
        if whole:
            ir.convenience.replace_all_uses_with(node.outputs[0], call.outputs[0])
            graph.remove(node, safe=True)
        else:
            unpacked = call.outputs[0]
            node.replace_input_with(use.idx, unpacked)


def _initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=tensor.name, shape=ir.Shape(tensor.numpy().shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _packed(name: str, codes: NDArray[np.int8], bits: int, how: Packing) -> list[ir.TensorProtocol]:
    """The tensors that hold a weight, in the order of the inputs of its function, before the scale."""
    shape = np.array(codes.shape, np.int64)
    if _in_planes(bits, how):
        return [ir.tensor(packing.pack(codes, bits), name=name), ir.tensor(shape, name=f"{name}_shape")]
    high, pair, bit = packing.split(codes, bits)
    parts = packing.NATIVE[bits]
    types = {2: ir.DataType.INT2, 4: ir.DataType.INT4, 8: ir.DataType.INT8}
    tensors: list[ir.TensorProtocol] = [_typed(high, types[parts.high], name)]
    if parts.pair:
        tensors.append(_typed(pair, ir.DataType.UINT2, f"{name}_pair"))
    if parts.bit:
        tensors.append(ir.tensor(np.packbits(bit.reshape(-1), bitorder="little"), name=f"{name}_bit"))
        tensors.append(ir.tensor(shape, name=f"{name}_shape"))
    return tensors


def _in_planes(bits: int, how: Packing) -> bool:
    """Whole bytes are stored as they are."""
    return how == "portable" and bits < 8


def _typed(values: NDArray[Any], dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    return ir.Tensor(values.astype(dtype.numpy()), dtype=dtype, name=name)


class _Body:
    """Builds the nodes of a function, a node a call."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def __call__(self, operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(operator, inputs, attributes=attributes)
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, values: object, dtype: type[np.generic]) -> ir.Value:
        return self("Constant", value=ir.tensor(np.array(values, dtype)))

    def bits(self, stream: ir.Value, count: ir.Value) -> ir.Value:
        """The first `count` bits of a byte stream, as uint8 zeros and ones."""
        column = self("Reshape", stream, self.constant([-1, 1], np.int64))
        shifted = self("BitShift", column, self.constant(range(8), np.uint8), direction="RIGHT")
        ones = self("BitwiseAnd", shifted, self.constant(1, np.uint8))
        flat = self("Reshape", ones, self.constant([-1], np.int64))
        return self("Slice", flat, self.constant([0], np.int64), count)

    def dequantized(self, codes: ir.Value, scale: ir.Value) -> ir.Value:
        # not ConstantOfShape of Shape: onnxruntime 1.32 has no kernel for the Shape of opset 25
        zeros = self("Cast", self("Mul", scale, self.constant(0, np.float32)), to=ir.DataType.INT8)
        return self("DequantizeLinear", codes, scale, zeros, axis=0)


def _weight_function(bits: int, how: Packing, *, dequantized: bool) -> ir.Function:
    """(packed tensors ..., scale) -> float weight, or (packed tensors ...) -> codes; see hawqfx.maths.packing for the
    layouts."""
    body = _Body()
    if _in_planes(bits, how):
        inputs = [ir.Value(name="packed"), ir.Value(name="shape")]
        codes = _portable_codes(body, bits, *inputs)
    else:
        parts = packing.NATIVE[bits]
        names = ("high", *("pair",) * bool(parts.pair), *("bit", "shape") * parts.bit)
        inputs = [ir.Value(name=name) for name in names]
        codes = _native_codes(body, parts, dict(zip(names, inputs, strict=True)))
    if not body.nodes and not dequantized:  # a function must make what it returns
        codes = body("Identity", codes)
    if dequantized:
        inputs.append(ir.Value(name="scale"))
        codes = body.dequantized(codes, inputs[-1])
    graph = ir.Graph(inputs, [codes], nodes=body.nodes, opset_imports={"": OPSET[how]}, name="")
    return ir.Function(DOMAIN, f"{'Weight' if dequantized else 'Codes'}{bits}", "", graph=graph, attributes=[])


def _portable_codes(body: _Body, bits: int, packed: ir.Value, shape: ir.Value) -> ir.Value:
    count = body("Mul", body("ReduceProd", shape, keepdims=1), body.constant([bits], np.int64))
    planes = body("Reshape", body.bits(packed, count), body.constant([bits, -1], np.int64))
    # A product of matrices, since onnxruntime keeps all that it folds until the last weight is unpacked, and other ways
    # to sum need four bytes per bit.  Old versions multiply by uint8 alone: what the planes are worth, above 128.
    worth = body.constant(packing.plane_values(bits).reshape(1, -1) + 128, np.uint8)
    codes = body("MatMulInteger", worth, planes, body.constant(128, np.uint8))
    return body("Reshape", body("Cast", codes, to=ir.DataType.INT8), shape)


def _native_codes(body: _Body, parts: packing.NativeParts, inputs: Mapping[str, ir.Value]) -> ir.Value:
    high = inputs["high"]
    if not parts.pair and not parts.bit:
        return high if parts.high == 8 else body("Cast", high, to=ir.DataType.INT8)
    codes = body("Cast", high, to=ir.DataType.INT32)
    codes = body("Mul", codes, body.constant(1 << (parts.pair + parts.bit), np.int32))
    if parts.pair:
        pair = body("Cast", inputs["pair"], to=ir.DataType.INT32)
        codes = body("Add", codes, body("Mul", pair, body.constant(1 << parts.bit, np.int32)))
    if parts.bit:
        shape = inputs["shape"]
        bit = body("Reshape", body.bits(inputs["bit"], body("ReduceProd", shape, keepdims=1)), shape)
        codes = body("Add", codes, body("Cast", bit, to=ir.DataType.INT32))
    return body("Cast", codes, to=ir.DataType.INT8)


def _tidy(model: ir.Model, outputs: Sequence[str]) -> None:
    """Leave out of the file what no reader needs: traces of the exporter, shapes inside, copies of small constants."""
    for step in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.RemoveUnusedNodesPass(),
    ):
        step(model)
    graph = model.graph
    _cast_constants(graph)
    _share_constants(graph)
    model.metadata_props.clear()
    graph.metadata_props.clear()
    graph.name = "hawqfx"
    for node in graph:
        node.name, node.doc_string = None, None
        node.metadata_props.clear()
    made = [value for node in graph for value in node.outputs]
    for value in (*graph.inputs, *graph.initializers.values(), *made):
        value.metadata_props.clear()
    for value in {*graph.initializers.values(), *made} - {*graph.outputs}:
        value.shape, value.type = None, None
    _name_the_edges(graph, outputs)


def _cast_constants(graph: ir.Graph) -> None:
    """The bounds of a clip come as CastLike of a constant, which onnxruntime runs every time, and which keeps it from
    taking the clip into the layer before."""
    for node in list(graph):
        if node.op_type != "CastLike" or node.inputs[0] is None or node.inputs[0].const_value is None:
            continue
        same = node.inputs[1] is not None and node.inputs[0].const_value.dtype == node.inputs[1].dtype
        if same and node.outputs[0] not in graph.outputs:
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
            graph.remove(node, safe=True)


def _share_constants(graph: ir.Graph) -> None:
    """Equal constants become one; not the scales, whose names say which site they belong to."""
    first: dict[tuple[object, ...], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or name.endswith(SCALE):
            continue
        kept = first.setdefault((tensor.dtype, tuple(tensor.shape), tensor.tobytes()), value)
        if kept is not value and value not in graph.outputs:
            ir.convenience.replace_all_uses_with(value, kept)
            del graph.initializers[name]


def _name_the_edges(graph: ir.Graph, outputs: Sequence[str]) -> None:
    """The batch dimension is called that; outputs have these names, `_output` behind those of inputs or constants."""
    _part_outputs(graph)
    taken = {str(value.name) for value in graph.inputs} | graph.initializers.keys()
    names: list[str] = []
    for name in outputs:
        candidates = itertools.chain((name, f"{name}_output"), (f"{name}_{number}" for number in itertools.count(2)))
        names.append(next(each for each in candidates if each not in taken))
        taken.add(names[-1])
    for value in (value for node in graph for value in node.outputs):
        if value.name in names:
            value.name = f"{value.name}_inside"
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = name
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None and value.shape and not isinstance(value.shape[0], int):
            value.shape = ir.Shape(["batch", *value.shape[1:]])


def _part_outputs(graph: ir.Graph) -> None:
    """What is an input too, or returned twice, is copied, so that each output has a name of its own."""
    for number, value in enumerate(graph.outputs):
        if value.producer() is None or value in graph.outputs[:number]:
            copy = ir.node("Identity", [value])
            copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
            graph.append(copy)
            graph.outputs[number] = copy.outputs[0]


@dataclass(frozen=True)
class MicroModel:
    """A small file: `inputs` says the shape and the type of each of its inputs, by name."""

    content: bytes
    inputs: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]


class MicroModels:
    """A program whose outputs have no part in common, as small ONNX files, one per output.

    Every input is fed to one output alone.  Shapes are those of `inputs`, the values of its placeholders.
    """

    def __init__(self, program: Program, inputs: Sequence[torch.Tensor]) -> None:
        frozen, _ = freeze(program, part_images=False)  # inputs here are tensors anywhere inside
        exported = torch.export.export(frozen, tuple(inputs), strict=False)
        with _quiet():
            translated = torch.onnx.export(
                exported, dynamo=True, opset_version=OPSET["portable"], optimize=False, verbose=False,
                custom_translation_table=_TRANSLATIONS,
            )  # fmt: skip
        assert translated is not None
        _tidy(translated.model, [f"output_{number}" for number in range(len(translated.model.graph.outputs))])
        translated.model.ir_version = IR_VERSION["portable"]
        self.model = ir.to_proto(translated.model)
        graph = self.model.graph
        self.made = {name: node for node in graph.node for name in node.output}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        values = zip(graph.input, inputs, strict=True)
        self.shapes = {value.name: (tuple(tensor.shape), tensor.numpy().dtype) for value, tensor in values}
        self._give_weights_a_zero_point()

    def piece(self, output: int, copies: int) -> MicroModel:
        """So many copies of what makes an output, each with inputs and constants of its own, so that onnxruntime finds
        nothing to share.  Where tensors are quantized at its edges, the edges are the integers."""
        nodes: list[onnx.NodeProto] = []
        inputs: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        target = self._without(self.model.graph.output[output].name, "DequantizeLinear")
        waiting, seen = [target], set()
        while waiting:
            name = waiting.pop()
            node = self.made.get(name)
            quantized = node is not None and node.op_type == "QuantizeLinear" and name != target
            if name in self.shapes or (quantized and node is not None and node.input[0] in self.shapes):
                source = node.input[0] if quantized and node is not None else name
                inputs[name] = self.shapes[source][0], np.dtype(np.uint8) if quantized else self.shapes[source][1]
            elif node is not None and id(node) not in seen:
                seen.add(id(node))
                nodes.append(node)
                waiting += filter(None, node.input)
        order = {id(node): number for number, node in enumerate(self.model.graph.node)}
        nodes.sort(key=lambda node: order[id(node)])
        used = {name for node in nodes for name in node.input} & self.constants.keys()
        return self._copied(nodes, inputs, sorted(used), target, copies)

    def _copied(
        self, nodes: Sequence[onnx.NodeProto], inputs: Mapping[str, Any], used: Sequence[str], target: str, copies: int
    ) -> MicroModel:
        found = onnx.ModelProto()
        found.CopyFrom(self.model)
        graph = found.graph
        for field in ("node", "initializer", "input", "output", "value_info"):
            graph.ClearField(field)
        shapes = {}
        for copy in range(copies):

            def own(name: str, copy: int = copy) -> str:
                return f"{name}_{copy}" if name else ""

            for node in nodes:
                made = graph.node.add()
                made.CopyFrom(node)
                made.ClearField("input")
                made.ClearField("output")
                made.input.extend(map(own, node.input))
                made.output.extend(map(own, node.output))
            for name in used:
                tensor = graph.initializer.add()
                tensor.CopyFrom(self.constants[name])
                tensor.name = own(name)
            for name, (shape, dtype) in inputs.items():
                kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
                graph.input.append(onnx.helper.make_tensor_value_info(own(name), kind, shape))
                shapes[own(name)] = shape, dtype
            last = self.made[target].op_type
            kind = onnx.TensorProto.UINT8 if last == "QuantizeLinear" else onnx.TensorProto.FLOAT
            graph.output.append(onnx.helper.make_tensor_value_info(own(target), kind, None))
        return MicroModel(found.SerializeToString(), shapes)

    def _without(self, name: str, operator: str) -> str:
        """What goes into the node that makes this value, if it is such a one and has been quantized."""
        node = self.made[name]
        if node.op_type == operator and node.input[0] in self.made:
            return str(node.input[0])
        return name

    def _give_weights_a_zero_point(self) -> None:
        for node in self.model.graph.node:
            codes = self.constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
            if codes is not None and codes.data_type == onnx.TensorProto.INT8 and len(node.input) == 2:
                zeros = np.zeros(codes.dims[0], np.int8)
                name = f"{codes.name}_zeros"
                self.constants[name] = onnx.numpy_helper.from_array(zeros, name)
                node.input.append(name)


def operator_micro_model(operator: str, shape: tuple[int, ...], low: int, copies: int) -> MicroModel:
    """A file of so many conversions of a tensor each of its own: QuantizeLinear, DequantizeLinear, Clip (of uint8, to
    4 bits), Transpose (of uint8, moves the channels of an image last), MaxPool (of float32, over one pixel)."""
    integer = operator in ("DequantizeLinear", "Clip", "Transpose")
    kind = onnx.TensorProto.UINT8 if integer else onnx.TensorProto.FLOAT
    made = {"QuantizeLinear": onnx.TensorProto.UINT8, "DequantizeLinear": onnx.TensorProto.FLOAT}.get(operator, kind)
    constants: dict[str, NDArray[Any]] = {
        "scale": np.array(0.05, np.float32), "zero": np.array(low, np.uint8),
        "least": np.array(0, np.uint8), "most": np.array(15, np.uint8),
    }  # fmt: skip
    attributes: dict[str, dict[str, Any]] = {
        "Transpose": {"perm": [0, *range(2, len(shape)), 1]}, "MaxPool": {"kernel_shape": [1] * (len(shape) - 2)}
    }  # fmt: skip
    extra = {"QuantizeLinear": ["scale", "zero"], "DequantizeLinear": ["scale", "zero"], "Clip": ["least", "most"]}
    nodes, inputs, outputs = [], [], []
    for copy in range(copies):
        nodes.append(
            onnx.helper.make_node(
                operator, [f"x{copy}", *extra.get(operator, [])], [f"y{copy}"], **attributes.get(operator, {})
            )
        )
        inputs.append(onnx.helper.make_tensor_value_info(f"x{copy}", kind, shape))
        outputs.append(onnx.helper.make_tensor_value_info(f"y{copy}", made, None))
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = onnx.helper.make_graph(nodes, "hawqfx", inputs, outputs, tensors)
    opsets = [onnx.helper.make_opsetid("", OPSET["portable"])]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION["portable"])
    dtype = np.dtype(np.uint8 if integer else np.float32)
    return MicroModel(model.SerializeToString(), {value.name: (shape, dtype) for value in inputs})


def operators(path: str | Path) -> Counter[str]:
    """How often each operator stands in a file."""
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def expose_sites(path: str | Path) -> tuple[bytes, list[str]]:
    """The file with the value of every quantized activation as a further output, and the keys of their sites, each as
    often as tensors share its quantizer, in the order of the graph."""
    model = onnx.load(path)
    keys = []
    for node in model.graph.node:
        scale = node.input[1] if node.op_type == "DequantizeLinear" and len(node.input) == 3 else ""
        if scale.endswith(SCALE):
            keys.append(scale.removesuffix(SCALE))
            model.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None))
    return model.SerializeToString(), keys


def _write(model: ir.Model, path: Path) -> None:
    """In one file, or with the tensors in a second one beside it where protobuf's limit of 2 GiB is near."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    if sum(tensor.nbytes for tensor in tensors if tensor is not None) > LARGEST_FILE:
        _write_in_two(model, path)
        return
    with whole_file(path) as temporary:
        ir.save(model, temporary)
        try:
            onnx.checker.check_model(temporary)
        except onnx.checker.ValidationError as error:
            raise ExportError(f"{path} was not written: {error}") from error


def _write_in_two(model: ir.Model, path: Path) -> None:
    name = f"{path.name}.data"
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        whole = Path(folder) / path.name
        ir.save(model, whole, external_data=name, size_threshold_bytes=128)
        try:
            onnx.checker.check_model(str(whole))
        except onnx.checker.ValidationError as error:
            raise ExportError(f"{path} was not written: {error}") from error
        (Path(folder) / name).replace(path.with_name(name))
        whole.replace(path)
