"""A lowered Program as the graph that export writes: weights and biases are integer constants, and operators have the
shape that onnxruntime's kernels want."""

import torch
from torch import fx

from hawqfx.maths import affine, packing
from hawqfx.ops import (
    BLOCKWISE_LINEAR,
    DEQUANTIZE,
    DEQUANTIZE_ROWS,
    DYNAMIC_LINEAR,
    FAKE_QUANTIZE,
    FAKE_QUANTIZE_BLOCKS,
    FAKE_QUANTIZE_DYNAMIC,
    GLOBAL_AVERAGE,
)
from hawqfx.program import Program, copy_graph, set_tensor
from hawqfx.vocabulary import EMBEDDING, PADS, WEIGHTED, operands, spatial_mean

LEAST = "_least"  # the constant that no number is less than


def freeze(program: Program) -> tuple[fx.GraphModule, dict[str, int]]:
    """A graph whose weights and biases are integer buffers, and the width of each weight by name."""
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
    for node in [node for node in graph.nodes if node.target in WEIGHTED]:
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
