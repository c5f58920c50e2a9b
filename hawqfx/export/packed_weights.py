"""Packed weights in a model: `bits` bits for each element, which onnxruntime unpacks once, when it loads the file.

The packed tensors of a weight go through a model-local function, one for each width, that unpacks and dequantizes them;
every layer calls it.  onnxruntime inlines the function, folds the unpacking, and sees an int8 weight behind a
DequantizeLinear, which its integer kernels take in.  See hawqfx.maths.packing for the layouts.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hawqfx.export.opsets import OPSET, Packing
from hawqfx.maths import packing

DOMAIN = "hawqfx"


def pack(model: ir.Model, name: str, bits: int, layout: Packing) -> None:
    """Replace an int8 initializer by packed tensors, and by calls of functions that unpack them.

    The function takes the place of a DequantizeLinear that reads the codes; where rows of the codes are gathered, a
    function that only unpacks goes before.

    Args:
        model: the model, which is changed.
        name: of the initializer.
        bits: of each code.
        layout: "portable" or "native".
    """
    graph = model.graph
    codes = graph.initializers.pop(name)
    assert codes.const_value is not None
    model.graph.opset_imports[DOMAIN] = 1
    packed = [_initializer(graph, tensor) for tensor in _packed(name, codes.const_value.numpy(), bits, layout)]
    unpacked: ir.Value | None = None  # for all readers of the codes
    for use in list(codes.uses()):
        if use.node.op_type == "DequantizeLinear":
            _replace_dequantization(model, use.node, packed, bits, layout)
            continue
        if unpacked is None:
            function = _weight_function(bits, layout, dequantized=False)
            unpacked = _call(model, use.node, function, packed, f"{name}_codes")
        use.node.replace_input_with(use.idx, unpacked)


def _replace_dequantization(model: ir.Model, node: ir.Node, packed: list[ir.Value], bits: int, layout: Packing) -> None:
    """A function that unpacks and dequantizes takes the place of a DequantizeLinear."""
    scale = node.inputs[1]
    assert scale is not None
    function = _weight_function(bits, layout, dequantized=True)
    weight = _call(model, node, function, [*packed, scale], node.outputs[0].name)
    ir.convenience.replace_all_uses_with(node.outputs[0], weight)
    model.graph.remove(node, safe=True)


def _call(
    model: ir.Model, before: ir.Node, function: ir.Function, inputs: list[ir.Value], result: str | None
) -> ir.Value:
    """The result, under this name, of a call of a model-local function before a node."""
    model.functions[function.identifier()] = function
    call = ir.node(function.name, inputs, domain=DOMAIN)
    call.outputs[0].name = result
    model.graph.insert_before(before, call)
    return call.outputs[0]


def _initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=tensor.name, shape=ir.Shape(tensor.numpy().shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _packed(name: str, codes: NDArray[np.int8], bits: int, layout: Packing) -> list[ir.TensorProtocol]:
    """The tensors that hold a weight, in the order of the inputs of its function, before the scale."""
    shape = np.array(codes.shape, np.int64)
    if _in_planes(bits, layout):
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


def _in_planes(bits: int, layout: Packing) -> bool:
    """Whole bytes are stored as they are."""
    return layout == "portable" and bits < 8


def _typed(values: NDArray[Any], dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    return ir.Tensor(values.astype(dtype.numpy()), dtype=dtype, name=name)


class _Body:
    """Builds the nodes of a function: each call adds a node."""

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


def _weight_function(bits: int, layout: Packing, *, dequantized: bool) -> ir.Function:
    """(packed tensors ..., scale) -> float weight, or (packed tensors ...) -> codes."""
    body = _Body()
    if _in_planes(bits, layout):
        inputs = [ir.Value(name="packed"), ir.Value(name="shape")]
        codes = _portable_codes(body, bits, *inputs)
    else:
        parts = packing.NATIVE[bits]
        names = ("high", *("pair",) * bool(parts.pair), *("bit", "shape") * parts.bit)
        inputs = [ir.Value(name=name) for name in names]
        codes = _native_codes(body, parts, dict(zip(names, inputs, strict=True)))
    if not body.nodes and not dequantized:  # the result of a function must come from a node
        codes = body("Identity", codes)
    if dequantized:
        inputs.append(ir.Value(name="scale"))
        codes = body.dequantized(codes, inputs[-1])
    graph = ir.Graph(inputs, [codes], nodes=body.nodes, opset_imports={"": OPSET[layout]}, name="")
    return ir.Function(DOMAIN, f"{'Weight' if dequantized else 'Codes'}{bits}", "", graph=graph, attributes=[])


def _portable_codes(body: _Body, bits: int, packed: ir.Value, shape: ir.Value) -> ir.Value:
    count = body("Mul", body("ReduceProd", shape, keepdims=1), body.constant([bits], np.int64))
    planes = body("Reshape", body.bits(packed, count), body.constant([bits, -1], np.int64))
    # A product of matrices, since onnxruntime keeps all that it folds until the last weight is unpacked, and other ways
    # to sum need four bytes per bit.  Old versions multiply by uint8 alone: the planes' values, above 128.
    values = body.constant(packing.plane_values(bits).reshape(1, -1) + 128, np.uint8)
    codes = body("MatMulInteger", values, planes, body.constant(128, np.uint8))
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
