"""Packed weights in a model: `bits` bits for each element, which onnxruntime unpacks once, when it loads the file.

The packed tensors of a weight go through a model-local function that unpacks and dequantizes them, and that every layer
calls.  onnxruntime inlines the function, folds the unpacking, and sees an int8 weight behind a DequantizeLinear, which
its integer kernels take in.  See hawqfx.maths.packing for the layouts.

All calls have the same form, and `bits` and `shape` are attributes of them, so that the text of a file does not depend
on the widths of its weights:

    Weight  packed tensors ..., scale -> float32 weight
    Codes   packed tensors ... -> int8 codes
    Rows    codes in blocks, their scales, numbers of rows -> float32 values of these rows of a table

Of a weight whose rows have bits of their own, WeightMixed and CodesMixed take one packed tensor and the bits of each
row; there `bits` is the most of them.

In the portable packing whole bytes have functions of their own, Weight8 and Codes8: they need no unpacking, and as
bit-planes they would take twenty times as long to load.  A file has the functions of both kinds, called or not.  In the
native packing the functions are named for the parts that a code has beside the high one.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hawqfx.export.opsets import OPSET, Packing
from hawqfx.maths import packing
from hawqfx.maths.packing import Codes

DOMAIN = "hawqfx"
ROWS = "Rows"
WHOLE_BYTES = 8


def pack(model: ir.Model, name: str, bits: int | Sequence[int], layout: Packing) -> None:
    """Replace an int8 initializer by packed tensors, and by calls of functions that unpack them.

    The function takes the place of a DequantizeLinear that reads the codes; where rows of the codes are gathered, a
    function that only unpacks goes before.

    Args:
        model: the model, which is changed.
        name: of the initializer; the calls have it too.
        bits: of each code, or of the codes of each row.
        layout: "portable" or "native"; rows that have bits of their own are packed alike in both.
    """
    graph = model.graph
    codes = graph.initializers.pop(name)
    assert codes.const_value is not None
    values = codes.const_value.numpy()
    model.graph.opset_imports[DOMAIN] = 1
    codec = _codec(bits, layout)
    packed = [_initializer(graph, tensor) for tensor in codec.packed(name, values)]

    def call(before: ir.Node, function: str, inputs: Sequence[ir.Value], result: str | None) -> ir.Value:
        attributes: dict[str, int | Sequence[int]] = {"bits": codec.bits, "shape": values.shape}
        node = ir.node(f"{function}{codec.kind}", inputs, attributes, domain=DOMAIN, name=name)
        node.outputs[0].name = result
        graph.insert_before(before, node)
        return node.outputs[0]

    unpacked: ir.Value | None = None  # for all readers of the codes
    for use in list(codes.uses()):
        dequantizes = use.node.op_type == "DequantizeLinear"
        for each in codec.family:
            function = _function(each, layout, dequantizes=dequantizes)
            model.functions.setdefault(function.identifier(), function)
        if dequantizes:
            scale, dequantized = use.node.inputs[1], use.node.outputs[0]
            assert scale is not None
            weight = call(use.node, "Weight", [*packed, scale], dequantized.name)
            ir.convenience.replace_all_uses_with(dequantized, weight)
            graph.remove(use.node, safe=True)
            continue
        if unpacked is None:
            unpacked = call(use.node, "Codes", packed, f"{name}_codes")
        use.node.replace_input_with(use.idx, unpacked)


def define_rows(model: ir.Model, layout: Packing) -> None:
    """Give a model whose graph looks up rows of tables in blocks the function that does so."""
    if any(node.op_type == ROWS and node.domain == DOMAIN for node in model.graph):
        model.graph.opset_imports[DOMAIN] = 1
        function = _rows_function(layout)
        model.functions[function.identifier()] = function


def _initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=tensor.name, shape=ir.Shape(tensor.numpy().shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _typed(values: NDArray[Any], dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    return ir.Tensor(values.astype(dtype.numpy()), dtype=dtype, name=name)


class _Body:
    """Builds the nodes of a function: each call adds a node, and the constants are shared."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.constants: dict[str, ir.Value] = {}

    def __call__(self, operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(operator, inputs, attributes)
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, values: object, dtype: type[np.generic] = np.int64) -> ir.Value:
        key = f"{values} {dtype}"
        if key not in self.constants:
            self.constants[key] = self("Constant", value=ir.tensor(np.array(values, dtype)))
        return self.constants[key]

    def attribute(self, name: str) -> ir.Value:
        """The value of an attribute of the function."""
        key = "value_int" if _ATTRIBUTES[name] == ir.AttributeType.INT else "value_ints"
        return self("Constant", **{key: ir.RefAttr(key, name, _ATTRIBUTES[name])})

    def bits(self, stream: ir.Value, count: ir.Value) -> ir.Value:
        """The first `count` bits of a byte stream, as uint8 zeros and ones."""
        column = self("Unsqueeze", stream, self.constant([-1]))
        shifted = self("BitShift", column, self.constant([*range(8)], np.uint8), direction="RIGHT")
        ones = self("BitwiseAnd", shifted, self.constant(1, np.uint8))
        return self("Slice", self("Reshape", ones, self.constant([-1])), self.constant([0]), count)

    def values_of_bytes(self) -> ir.Value:
        """(256, 8 / bits) in float32: the codes in every byte, as hawqfx.maths.packing.pack_blocks packs them."""
        zero, width = self.constant(0.0, np.float32), self("Cast", self.attribute("bits"), to=ir.DataType.FLOAT)
        shifts = self("Range", zero, self.constant(8.0, np.float32), width)
        octets = self("Range", zero, self.constant(256.0, np.float32), self.constant(1.0, np.float32))
        two, column = self.constant(2.0, np.float32), self("Unsqueeze", octets, self.constant([-1]))
        shifted, count = self("Floor", self("Div", column, self("Pow", two, shifts))), self("Pow", two, width)
        return self("Sub", self("Mod", shifted, count, fmod=1), self("Div", count, two))

    def finished(self, name: str, inputs: Sequence[ir.Value], result: ir.Value, layout: Packing) -> ir.Function:
        """The function of these nodes."""
        graph = ir.Graph(inputs, [result], nodes=self.nodes, opset_imports={"": OPSET[layout]}, name="")
        for node in self.nodes:
            node.name = None  # a graph gives names
        attributes = [ir.Attr(name, kind, None) for name, kind in _ATTRIBUTES.items()]
        return ir.Function(DOMAIN, name, "", graph=graph, attributes=attributes)

    def dequantized(self, codes: ir.Value, scale: ir.Value) -> ir.Value:
        # not ConstantOfShape of Shape: onnxruntime 1.32 has no kernel for the Shape of opset 25
        zeros = self("Cast", self("Sub", scale, scale), to=ir.DataType.INT8)
        return self("DequantizeLinear", codes, scale, zeros, axis=0)


_INT32 = ir.DataType.INT32
_ATTRIBUTES = {"bits": ir.AttributeType.INT, "shape": ir.AttributeType.INTS}


@dataclass(frozen=True)
class _Codec(ABC):
    """A way to pack the codes of a weight, and to unpack them in a function.

    Args:
        bits: of each code; the most of them where rows have bits of their own.
        kind: the end of the names of the functions.
    """

    bits: int
    kind: str

    @abstractmethod
    def packed(self, name: str, codes: Codes) -> list[ir.TensorProtocol]:
        """The tensors that hold codes (C, ...), in the order of the inputs of the function."""

    @abstractmethod
    def unpacked(self, body: _Body) -> tuple[list[ir.Value], ir.Value]:
        """The inputs of the function, and their codes in int8, in the nodes of its body."""

    @property
    def family(self) -> "Sequence[_Codec]":
        """Those whose functions a file has if it has one of them."""
        return (self,)


class _Planes(_Codec):
    """Bit-planes: the portable packing."""

    def packed(self, name: str, codes: Codes) -> list[ir.TensorProtocol]:
        return [ir.tensor(packing.pack(codes.reshape(-1), self.bits), name=name)]

    def unpacked(self, body: _Body) -> tuple[list[ir.Value], ir.Value]:
        packed = ir.Value(name="packed")
        return [packed], _planes(body, packed)

    @property
    def family(self) -> Sequence[_Codec]:
        return self, _codec(WHOLE_BYTES, "portable")


class _WholeBytes(_Codec):
    """A byte for each code, in the portable packing too."""

    def packed(self, name: str, codes: Codes) -> list[ir.TensorProtocol]:
        return [ir.tensor(codes.reshape(-1), name=name)]

    def unpacked(self, body: _Body) -> tuple[list[ir.Value], ir.Value]:
        packed = ir.Value(name="packed")
        return [packed], body("Reshape", packed, body.attribute("shape"))

    @property
    def family(self) -> Sequence[_Codec]:
        return _codec(WHOLE_BYTES - 1, "portable"), self


@dataclass(frozen=True)
class _Rows(_Codec):
    """Rows that have bits of their own."""

    rows: Sequence[int]

    def packed(self, name: str, codes: Codes) -> list[ir.TensorProtocol]:
        widths = ir.tensor(np.array(self.rows, np.uint8), name=f"{name}_rows")
        return [ir.tensor(packing.pack_rows(codes, self.rows), name=name), widths]

    def unpacked(self, body: _Body) -> tuple[list[ir.Value], ir.Value]:
        packed, rows = ir.Value(name="packed"), ir.Value(name="rows")
        return [packed, rows], _mixed_rows(body, packed, rows)


class _Native(_Codec):
    """Integers of the types that ONNX has, and the bits that remain."""

    @property
    def parts(self) -> packing.NativeParts:
        return packing.NATIVE[self.bits]

    def packed(self, name: str, codes: Codes) -> list[ir.TensorProtocol]:
        high, pair, bit = packing.split(codes, self.bits)
        types = {2: ir.DataType.INT2, 4: ir.DataType.INT4, 8: ir.DataType.INT8}
        tensors: list[ir.TensorProtocol] = [_typed(high, types[self.parts.high], name)]
        if self.parts.pair:
            tensors.append(_typed(pair, ir.DataType.UINT2, f"{name}_pair"))
        if self.parts.bit:
            tensors.append(ir.tensor(np.packbits(bit.reshape(-1), bitorder="little"), name=f"{name}_bit"))
        return tensors

    def unpacked(self, body: _Body) -> tuple[list[ir.Value], ir.Value]:
        names = ("high", *["pair"] * bool(self.parts.pair), *["bit"] * bool(self.parts.bit))
        inputs = [ir.Value(name=name) for name in names]
        return inputs, _native_codes(body, self.parts, *inputs)


def _codec(bits: int | Sequence[int], layout: Packing) -> _Codec:
    """The codec of a weight, by the bits of its codes, or of those of each row."""
    if not isinstance(bits, int):
        return _Rows(max(bits), "Mixed", bits)
    if layout == "native":
        parts = packing.NATIVE[bits]
        return _Native(bits, "Pair" * bool(parts.pair) + "Bit" * bool(parts.bit))
    return _WholeBytes(bits, "8") if bits == WHOLE_BYTES else _Planes(bits, "")


def _function(codec: _Codec, layout: Packing, *, dequantizes: bool) -> ir.Function:
    """(packed tensors ..., scale) -> float32 weight, or (packed tensors ...) -> int8 codes."""
    body = _Body()
    inputs, result = codec.unpacked(body)
    if dequantizes:
        inputs.append(ir.Value(name="scale"))
        result = body.dequantized(result, inputs[-1])
    return body.finished(f"{'Weight' if dequantizes else 'Codes'}{codec.kind}", inputs, result, layout)


def _rows_function(layout: Packing) -> ir.Function:
    """(codes (V, blocks, bytes), scales (V * blocks,), rows (...)) -> float32 (..., blocks, bytes, codes of a byte).

    The values of all codes of a byte are looked up by the byte.  onnxruntime's GatherBlockQuantized takes less time in
    1.32, but in 1.24 more, and no 2 bits, and 1.20 does not take these codes (benchmarks/weight_only.py).
    """
    body = _Body()
    inputs = [ir.Value(name=name) for name in ("codes", "scale", "rows")]
    codes, scale, rows = inputs
    of_each_byte = body("Gather", body.values_of_bytes(), body("Cast", body("Gather", codes, rows), to=_INT32))
    count = body("Slice", body.attribute("shape"), body.constant([0]), body.constant([1]))
    by_row = body("Reshape", scale, body("Concat", count, body.constant([-1]), axis=0))
    steps = body("Cast", body("Gather", by_row, rows), to=ir.DataType.FLOAT)
    result = body("Mul", of_each_byte, body("Unsqueeze", steps, body.constant([-1, -2])))
    return body.finished(ROWS, inputs, result, layout)


def _mixed_rows(body: _Body, packed: ir.Value, rows: ir.Value) -> ir.Value:
    """Eight bit-planes of every row, of which those above its own repeat its sign; bit 0 of a row of one bit is that of
    the row of ones before all others."""
    shape, rest, one = body.attribute("shape"), body.constant([-1]), body.constant(1)
    widths = body("Cast", rows, to=ir.DataType.INT64)
    last, numbers = body("Sub", widths, one), body.constant([[number] for number in range(8)])
    first = body("Sub", body("CumSum", widths, body.constant(0)), last)
    ones = body("Equal", body("Add", numbers, widths), one)
    plane = body("Where", ones, body.constant(0), body("Add", first, body("Min", numbers, last)))
    columns = body("ReduceProd", body("Slice", shape, body.constant([1]), body.constant([8])))
    bits = body.bits(packed, body("Mul", body("Add", body("ReduceSum", widths), one), columns))
    each = body("Gather", body("Reshape", bits, body("Concat", rest, columns, axis=0)), plane)
    planes = body("Reshape", each, body("Concat", rest, body("ReduceProd", shape), axis=0))
    # as in `_planes`
    values = body.constant([[128 + value for value in packing.plane_values(8)]], np.uint8)
    codes = body("MatMulInteger", values, planes, body.constant(128, np.uint8))
    return body("Reshape", body("Cast", codes, to=ir.DataType.INT8), shape)


def _planes(body: _Body, packed: ir.Value) -> ir.Value:
    bits, shape = body.attribute("bits"), body.attribute("shape")
    count, rest, start = body("ReduceProd", shape), body.constant([-1]), body.constant([0])
    planes = body("Reshape", body.bits(packed, body("Mul", count, bits)), body("Concat", rest, count, axis=0))
    # A product of matrices, since onnxruntime keeps all that it folds until the last weight is unpacked, and other ways
    # to sum need four bytes per bit.  Old versions multiply by uint8 alone: the planes' values, above 128.
    rows = [[128 + value for value in packing.plane_values(width)] for width in range(1, WHOLE_BYTES)]
    table = body.constant([row + [0] * (WHOLE_BYTES - len(row)) for row in [[], *rows]], np.uint8)
    values = body("Slice", body("Gather", table, bits), start, body("Reshape", bits, rest))
    codes = body("MatMulInteger", values, planes, body.constant(128, np.uint8))
    return body("Reshape", body("Cast", codes, to=ir.DataType.INT8), shape)


def _native_codes(body: _Body, parts: packing.NativeParts, high: ir.Value, *rest: ir.Value) -> ir.Value:
    if not rest:
        return body("Cast", high, to=ir.DataType.INT8)
    codes = body("Cast", high, to=ir.DataType.INT32)
    codes = body("Mul", codes, body.constant(1 << (parts.pair + parts.bit), np.int32))
    if parts.pair:
        pair = body("Cast", rest[0], to=ir.DataType.INT32)
        codes = body("Add", codes, body("Mul", pair, body.constant(1 << parts.bit, np.int32)))
    if parts.bit:
        shape = body.attribute("shape")
        bit = body("Reshape", body.bits(rest[-1], body("ReduceProd", shape)), shape)
        codes = body("Add", codes, body("Cast", bit, to=ir.DataType.INT32))
    return body("Cast", codes, to=ir.DataType.INT8)
