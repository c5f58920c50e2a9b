"""A lowered Program as the graph that export writes: weights and biases are integer constants, and operators have the
shape that onnxruntime's kernels want."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hawqfx.ir.custom_ops import (
    BLOCKWISE_LINEAR,
    DEQUANTIZE,
    DEQUANTIZE_ROWS,
    DYNAMIC_LINEAR,
    FAKE_QUANTIZE,
    FAKE_QUANTIZE_BLOCKS,
    FAKE_QUANTIZE_DYNAMIC,
    GLOBAL_AVERAGE,
    SPACE_TO_DEPTH,
)
from hawqfx.ir.operators import EMBEDDING, PADS, WEIGHTED_LAYERS, is_data_movement, operands, spatial_mean
from hawqfx.ir.program import Program, copy_graph, set_tensor
from hawqfx.maths import affine, packing

OF_BLOCKS = "_of_blocks"  # behind the name of a scale: of an image whose blocks are channels
LEAST = "_least"  # the constant that no number is less than
MOST_PHASES = 64  # channels of an image whose blocks are channels; with more, the copies are long enough

_aten = torch.ops.aten


def freeze(program: Program, *, part_images: bool = True) -> tuple[fx.GraphModule, dict[str, int]]:
    """A graph whose weights and biases are integer buffers, and the width of each weight by name.

    part_images: whether the inputs are images that layers may read in blocks (see `_part_images`)."""
    module = copy_graph(program.graph)
    graph = module.graph
    widths = {}
    for number, node in enumerate(graph.find_nodes(op="call_function", target=FAKE_QUANTIZE)):
        source, scale, zero_point, low, high = operands(node)
        if source.op != "get_attr":
            continue
        assert zero_point == 0
        key = str(source.target)
        codes = affine.quantize(program.tensor(key).detach(), _value(program, scale), 0, low, high)
        if codes.dtype == torch.int8:
            name = key
            widths[key] = (high - low + 1).bit_length() - 1
        else:  # a bias that several layers share has codes for each of them
            name = f"{key}_{number}"
        set_tensor(module, name, codes, parameter=False)
        with graph.inserting_before(node):
            constant = graph.get_attr(name)
            node.replace_all_uses_with(graph.call_function(DEQUANTIZE, (constant, scale)))
        graph.erase_node(node)
    _lay_out_linear(module, graph, widths)
    if part_images:
        _part_images(module, graph)
    _keep_weights_in_float(module, graph)
    _average_globally(graph)
    _gather_codes(graph)
    graph.eliminate_dead_code()
    module.recompile()
    return fx.GraphModule(module, graph), widths


def _lay_out_linear(module: fx.GraphModule, graph: fx.Graph, widths: dict[str, int]) -> None:
    """Linear layers of the schemes "dynamic" and "weight-only", as the operators that onnxruntime has for them."""
    columns: dict[str, int] = {}
    for node in list(graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)):
        source, weight, bias = (*operands(node), None)[:3]
        if source.target not in (FAKE_QUANTIZE_DYNAMIC, FAKE_QUANTIZE_BLOCKS):
            continue
        codes, scale = operands(weight)
        with graph.inserting_before(node):
            if source.target is FAKE_QUANTIZE_DYNAMIC:
                found = graph.call_function(DYNAMIC_LINEAR, (source.args[0], codes, scale))
            else:
                key = str(codes.target)
                if key not in columns:  # else another layer shares it
                    columns[key] = _store_blocks(module, key, str(scale.target))
                    del widths[key]
                found = graph.call_function(BLOCKWISE_LINEAR, (source.args[0], codes, scale, columns[key]))
            if bias is not None:
                found = graph.call_function(torch.ops.aten.add.Tensor, (found, bias))
        node.replace_all_uses_with(found)
        graph.erase_node(node)


def _store_blocks(module: fx.GraphModule, key: str, scale: str) -> int:
    """Lays out the codes and scales of a weight as MatMulNBits has them; returns how many inputs the weight has."""
    codes = module.get_buffer(key).numpy()
    set_tensor(module, key, torch.from_numpy(packing.pack_blocks(codes)), parameter=False)
    set_tensor(module, scale, module.get_buffer(scale).reshape(-1), parameter=False)
    return int(codes.shape[1])


@dataclass(frozen=True)
class _Blocks:
    """An image in blocks of stride x stride pixels: the quantized input of the graph that it is; zeros around it, left,
    right, top, bottom; how many blocks a kernel covers, by axis."""

    image: fx.Node
    stride: int
    pads: list[int]
    taps: list[int]


def _part_images(module: fx.GraphModule, graph: fx.Graph) -> None:
    """A convolution with stride s of an image with few channels as one with stride 1 of an image that has the pixels of
    every block of s x s as its channels, and the kernel laid out alike: the same products, but onnxruntime copies what
    a position reads by rows of channels, and few of them make many short copies.  The image is parted before it is
    quantized, since onnxruntime 1.24 parts only floats."""
    for node in list(graph.find_nodes(op="call_function", target=_aten.conv2d.default)):
        weight, *bias = operands(node)[1:3]
        if weight.target is not DEQUANTIZE:
            continue
        codes, scale = operands(weight)
        shape = module.get_buffer(str(codes.target)).shape
        blocks = _blocks(node, shape[2:])
        if blocks is None:
            continue
        image, image_scale, *rest = operands(blocks.image)
        name = f"{image_scale.target}{OF_BLOCKS}"
        set_tensor(module, name, module.get_buffer(str(image_scale.target)).clone(), parameter=False)
        with graph.inserting_before(node):
            parted = graph.call_function(SPACE_TO_DEPTH, (image, blocks.pads, blocks.stride))
            parted = graph.call_function(FAKE_QUANTIZE, (parted, graph.get_attr(name), *rest))
            kernel = graph.call_function(DEQUANTIZE, (_kernel_of_blocks(graph, codes, shape, blocks), scale))
        node.args = (parted, kernel, *bias)


def _blocks(node: fx.Node, kernel: Sequence[int]) -> _Blocks | None:
    """How a convolution's image is parted, if that is an input of the graph, and it gains."""
    arguments: tuple[Any, ...] = (*operands(node), *(None, 1, 0, 1, 1)[len(node.args) - 2 :])
    image, _, _, strides, padding, dilation, groups = arguments
    around = [0, 0, 0, 0]
    if image.target in PADS and is_data_movement(image):
        around = [*image.args[1], 0, 0][:4] if len(image.args[1]) <= 4 else []
        image = image.args[0]
    if image.target is not FAKE_QUANTIZE or image.args[0].op != "placeholder":
        return None
    stride, other = _pair(strides)
    channels, *sizes = image.meta["val"].shape[1:]
    if stride != other or {*_pair(dilation)} != {1} or groups != 1 or min(around, default=-1) < 0:
        return None
    if stride == 1 or stride**2 * channels > MOST_PHASES or not all(isinstance(size, int) for size in sizes):
        return None
    taps = [-(-size // stride) for size in kernel]
    pads: list[int] = []
    for axis in (1, 0):
        first = around[2 * (1 - axis)] + _pair(padding)[axis]
        positions = node.meta["val"].shape[2 + axis]
        pads += [first, stride * (positions + taps[axis] - 1) - sizes[axis] - first]
    return _Blocks(image, stride, pads, taps) if min(pads) >= 0 else None


def _pair(value: Any) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * (2 // len(values))


def _kernel_of_blocks(graph: fx.Graph, codes: fx.Node, shape: Sequence[int], blocks: _Blocks) -> fx.Node:
    """Codes (O, C, k, k) -> (O, stride^2 C, taps, taps); onnxruntime does that once, when it loads the file."""
    (outputs, channels, *sizes), stride, (rows, columns) = shape, blocks.stride, blocks.taps
    more = [amount for axis in (1, 0) for amount in (0, stride * blocks.taps[axis] - sizes[axis])]
    padded = graph.call_function(_aten.constant_pad_nd.default, (codes, more))
    parted = graph.call_function(_aten.view.default, (padded, [outputs, channels, rows, stride, columns, stride]))
    moved = graph.call_function(_aten.permute.default, (parted, [0, 3, 5, 1, 2, 4]))
    return graph.call_function(_aten.reshape.default, (moved, [outputs, stride**2 * channels, rows, columns]))


def _average_globally(graph: fx.Graph) -> None:
    for node in [node for node in graph.nodes if node.op == "call_function" and spatial_mean(node)]:
        axes = list(range(2, operands(node)[0].meta["val"].ndim))
        keeps = node.target is not torch.ops.aten.mean.dim or (len(node.args) > 2 and node.args[2])
        with graph.inserting_before(node):
            mean = graph.call_function(GLOBAL_AVERAGE, operands(node)[:1])
            if not keeps:
                mean = graph.call_function(torch.ops.aten.squeeze.dims, (mean, axes))
        node.replace_all_uses_with(mean)
        graph.erase_node(node)


def _gather_codes(graph: fx.Graph) -> None:
    """Of a table, dequantize only the rows that are asked for."""
    for node in graph.find_nodes(op="call_function", target=EMBEDDING):
        table, rows = operands(node)[:2]
        if table.target is DEQUANTIZE:
            with graph.inserting_before(node):
                gathered = graph.call_function(DEQUANTIZE_ROWS, (*operands(table), rows))
            node.replace_all_uses_with(gathered)
            graph.erase_node(node)


def _keep_weights_in_float(module: fx.GraphModule, graph: fx.Graph) -> None:
    """onnxruntime quantizes a constant weight between a DequantizeLinear and a QuantizeLinear by itself, to 8 bits and
    with one scale.  It does not look past a maximum, which here takes the least number there is."""
    for node in [node for node in graph.nodes if node.target in WEIGHTED_LAYERS]:
        source, weight = operands(node)[:2]
        if source.target in PADS:
            source = source.args[0]
        if source.target is FAKE_QUANTIZE and weight.op == "get_attr":
            set_tensor(module, LEAST, torch.tensor(torch.finfo(torch.float32).min), parameter=False)
            with graph.inserting_after(node):
                least = graph.get_attr(LEAST)
            with graph.inserting_after(least):
                kept = graph.call_function(torch.ops.aten.maximum.default, (node, least))
            node.replace_all_uses_with(kept, delete_user_cb=lambda user, kept=kept: user is not kept)


def _value(program: Program, node: fx.Node) -> torch.Tensor:
    """A scale: a buffer, or the product of two."""
    if node.op == "get_attr":
        return program.tensor(str(node.target)).detach()
    one, other = (_value(program, factor) for factor in node.all_input_nodes)
    return one * other
