"""Looks into exported files."""

from collections import Counter
from pathlib import Path

import onnx

from hawqfx.ir.program import SCALE


def operators(path: str | Path) -> Counter[str]:
    """The number of nodes of each operator in a file."""
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def expose_sites(path: str | Path) -> tuple[bytes, list[str]]:
    """A file with the values of its quantized activations as further outputs.

    Returns:
        The file's content, and the keys of the activations' sites in the order of the outputs; a key comes as often as
        tensors share the quantizer of its site.
    """
    model = onnx.load(path)
    keys = []
    for node in model.graph.node:
        scale = node.input[1] if node.op_type == "DequantizeLinear" and len(node.input) == 3 else ""
        if scale.endswith(SCALE):
            keys.append(scale.removesuffix(SCALE))
            model.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None))
    return model.SerializeToString(), keys
