"""Looks into exported files."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx

from hawqfx.export.cleanup import site_of
from hawqfx.export.packed_weights import DOMAIN


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
        if node.domain == DOMAIN:
            attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
            codes = tuple(name for name in node.input if stored[name] != onnx.TensorProto.FLOAT)
            found[site_of(node.name)] = PackedWeight(attributes["bits"], tuple(attributes["shape"]), codes)
    return found


def expose_sites(path: str | Path) -> tuple[bytes, list[str]]:
    """A file with the values of its quantized activations as further outputs.

    Returns:
        The file's content, and the keys of the activations' sites in the order of the outputs; a key comes as often as
        tensors share the quantizer of its site.
    """
    return _exposed(path, lambda node: (node.output[0], onnx.TensorProto.FLOAT))


def expose_codes(path: str | Path) -> tuple[bytes, list[str]]:
    """A file with the codes of its quantized activations as further outputs, which leaves onnxruntime's fusions as they
    are; the result is as that of `expose_sites`."""
    return _exposed(path, lambda node: (node.input[0], onnx.TensorProto.UINT8))


def _exposed(path: str | Path, value: Callable[[onnx.NodeProto], tuple[str, int]]) -> tuple[bytes, list[str]]:
    model = onnx.load(path)
    keys, seen = [], {output.name for output in model.graph.output}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.name and value(node)[0] not in seen:
            name, kind = value(node)
            seen.add(name)
            keys.append(site_of(node.name))
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    return model.SerializeToString(), keys
