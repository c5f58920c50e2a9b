"""Looks into exported files."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from hawqfx.errors import ExportError
from hawqfx.export.cleanup import site_of
from hawqfx.export.packed_weights import DOMAIN, ROWS


def operators(path: str | Path) -> Counter[str]:
    """The number of nodes of each operator in a file."""
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@dataclass(frozen=True)
class PackedWeight:
    """A weight in a file: the bits of its codes, its shape, and the names of the tensors that hold the codes."""

    bits: int
    shape: tuple[int, ...]
    tensors: tuple[str, ...]


def packed_weights(path: str | Path) -> dict[str, PackedWeight]:
    """The packed weights of a file, by the keys of their sites."""
    model = onnx.load(path)
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type != ROWS:
            attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
            codes = tuple(name for name in node.input if stored[name] != onnx.TensorProto.FLOAT)
            found[site_of(node.name)] = PackedWeight(attributes["bits"], tuple(attributes["shape"]), codes)
    return found


@dataclass(frozen=True)
class StoredWeight:
    """A weight of a layer, as a file has it.

    Args:
        layer: what kind of layer reads it, such as "linear".
        operator: that layer's operator in the file.
        name: the key of its site, in files of hawqfx; else that of the tensor.
        shape: of the weight.
        bits: of an element in the file.
        bytes: of its codes, without scales.
        format: how they are stored.
    """

    layer: str
    operator: str
    name: str
    shape: tuple[int, ...]
    bits: int
    bytes: int
    format: str


_TYPES = onnx.TensorProto.DataType
_BITS: dict[int, int] = {
    _TYPES.FLOAT: 32, _TYPES.FLOAT16: 16, _TYPES.BFLOAT16: 16, _TYPES.DOUBLE: 64, _TYPES.INT8: 8, _TYPES.UINT8: 8,
    _TYPES.INT4: 4, _TYPES.UINT4: 4, _TYPES.INT2: 2, _TYPES.UINT2: 2,
}  # fmt: skip
# operator -> the layer that it is, and the input that is its weight
_LAYERS = {
    "Conv": ("convolution", 1), "ConvInteger": ("convolution", 1), "QLinearConv": ("convolution", 3),
    "ConvTranspose": ("transposed convolution", 1), "Gemm": ("linear", 1), "MatMul": ("linear", 1),
    "MatMulInteger": ("linear", 1), "QLinearMatMul": ("linear", 3), "MatMulNBits": ("linear", 1),
    "Gather": ("embedding", 0), ROWS: ("embedding", 0),
}  # fmt: skip
# operators between a tensor and the layer that reads it -> the input that is the tensor
_THROUGH = {
    "DequantizeLinear": 0, "Transpose": 0, "Reshape": 0, "Cast": 0, "Identity": 0, "QuantizeLinear": 0,
    "MatMulInteger": 1,
}  # fmt: skip


def stored_weights(path: str | Path) -> list[StoredWeight]:
    """The weights of a file's layers, in the order of its graph; any ONNX file, quantized by whatever tool.

    Raises:
        ExportError: if the file is no ONNX model, or a damaged one.
    """
    model = read_model(path)
    try:
        return _stored_weights(model)
    except (KeyError, IndexError, ValueError, TypeError) as error:  # operators without an attribute or input
        raise ExportError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _stored_weights(model: onnx.ModelProto) -> list[StoredWeight]:
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    found = {}

    def origin(name: str) -> tuple[str, onnx.NodeProto | None]:
        """The tensor that a tensor is laid out from, and the node that makes it, if any."""
        while name in makers and makers[name].op_type in _THROUGH:
            name = makers[name].input[_THROUGH[makers[name].op_type]]
        return name, makers.get(name)

    for node in model.graph.node:
        if node.op_type not in _LAYERS:
            continue
        at = _LAYERS[node.op_type][1]
        if len(node.input) <= at:
            continue
        name, maker = origin(node.input[at])
        if node.op_type == "MatMulInteger" and node.input[0] in stored:  # lays codes out in blocks
            continue
        if maker is not None and maker.domain == DOMAIN:
            found[name] = _packed_entry(node, maker, stored)
        elif name in stored and (len(stored[name].dims) > 1 or node.op_type == "MatMulNBits"):  # not scales of rows
            found.setdefault(name, _plain_entry(node, stored[name]))  # a table that a head multiplies by keeps its name
    return list(found.values())


def _packed_entry(layer: onnx.NodeProto, call: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> StoredWeight:
    attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in call.attribute}
    codes = [stored[name] for name in call.input if name in stored and stored[name].data_type != _TYPES.FLOAT]
    kind = "whole bytes" if call.op_type.endswith("8") else "bit-planes"
    if call.op_type not in ("Weight", "Codes", "Weight8", "Codes8"):
        kind = " and ".join(map(_type, codes))
    return _entry(layer, site_of(call.name), tuple(attributes["shape"]), attributes["bits"], codes, kind)


def _plain_entry(layer: onnx.NodeProto, tensor: onnx.TensorProto) -> StoredWeight:
    bits, shape = _BITS.get(tensor.data_type, 0), tuple(tensor.dims)
    kind = _type(tensor)
    attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in layer.attribute}
    if layer.op_type == "MatMulNBits":
        bits, shape = attributes["bits"], (attributes["N"], attributes["K"])
        kind = f"blocks of {attributes['block_size']}"
    if layer.op_type == ROWS:
        bits, shape = attributes["bits"], tuple(attributes["shape"])
        kind = f"blocks of {tensor.dims[2] * 8 // bits}"
    return _entry(layer, site_of(layer.name) or tensor.name, shape, bits, [tensor], kind)


def _entry(
    layer: onnx.NodeProto, name: str, shape: tuple[int, ...], bits: int, codes: Sequence[onnx.TensorProto], kind: str
) -> StoredWeight:
    known = _LAYERS[layer.op_type][0]
    return StoredWeight(known, layer.op_type, name, shape, bits, sum(map(_bytes, codes)), kind)


def _type(tensor: onnx.TensorProto) -> str:
    """The type of a tensor's elements, such as float32 or int8."""
    name = _TYPES.Name(tensor.data_type).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def _bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor's elements, by their number and bits."""
    return -(-math.prod(tensor.dims) * _BITS.get(tensor.data_type, 0) // 8)


def read_model(path: str | Path) -> onnx.ModelProto:
    """The model of a file, without tensors that lie beside it.

    Raises:
        ExportError: if it cannot be read, or is no ONNX model.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises many things for what is no model
        raise ExportError(f"{path} cannot be read as an ONNX model: {error}") from error
    if not model.graph.node:
        raise ExportError(f"{path} is no ONNX model: it has no operators")
    return model


def texts(path: str | Path) -> dict[str, str]:
    """The metadata of a file."""
    return {entry.key: entry.value for entry in read_model(path).metadata_props}


def expose_sites(path: str | Path) -> tuple[bytes, list[str]]:
    """A file with the values of its quantized activations as further outputs.

    Returns:
        The file's content, and the keys of the activations' sites in the order of the outputs; a key comes as often as
        tensors share the quantizer of its site.
    """
    model = onnx.load(path)
    return _exposed(model, lambda node: (node.output[0], _TYPES.FLOAT))


def expose_codes(path: str | Path) -> tuple[bytes, list[str]]:
    """A file with the codes of its quantized activations as further outputs, which leaves onnxruntime's fusions as they
    are; the result is as that of `expose_sites`."""
    model = onnx.load(path)
    types = _constant_types(model)
    return _exposed(model, lambda node: (node.input[0], types[node.input[2]]))


def has_signed_activations(path: str | Path) -> bool:
    """Whether a file of hawqfx quantizes an activation to int8, as it does second factors of products."""
    model = read_model(path)
    types = _constant_types(model)
    quantizers = (node for node in model.graph.node if node.op_type == "QuantizeLinear")
    return any(types[node.input[2]] == _TYPES.INT8 for node in quantizers)


def _constant_types(model: onnx.ModelProto) -> dict[str, int]:
    """Name of a constant -> the type of its elements."""
    return {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def _exposed(model: onnx.ModelProto, value: Callable[[onnx.NodeProto], tuple[str, int]]) -> tuple[bytes, list[str]]:
    keys, seen, own = [], set(), {output.name for output in model.graph.output}
    for node in list(model.graph.node):
        if node.op_type == "DequantizeLinear" and node.name and value(node)[0] not in seen:
            name, kind = value(node)
            seen.add(name)
            keys.append(site_of(node.name))
            if name in own:  # a graph has no output twice
                model.graph.node.append(onnx.helper.make_node("Identity", [name], [f"{name}/again"]))
                name = f"{name}/again"
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    return model.SerializeToString(), keys
