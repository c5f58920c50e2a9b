"""A model without traces of the exporter, without copies of constants, and with the names that users know.

OutputFixPass of onnx_ir does not fit here: it gives an input that is returned another name.
"""

import itertools
from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import common

from hawqfx.ir.program import SCALE


def clean(model: ir.Model, outputs: Sequence[str]) -> None:
    """Leave out of the model everything that no reader needs: traces of the exporter, shapes inside, copies of small
    constants.

    Args:
        model: the model, which is changed.
        outputs: the names that its outputs get, in order.
    """
    ir.passes.Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),
    )(model)
    graph = model.graph
    _cast_constants(graph)
    _share_constants(graph)
    _drop_traces(model)
    _name_the_edges(graph, outputs)


def _drop_traces(model: ir.Model) -> None:
    """Drop the exporter's names of nodes, its metadata, and the types and shapes of values inside."""
    graph = model.graph
    model.metadata_props.clear()
    graph.metadata_props.clear()  # a graph without nodes keeps it otherwise
    graph.name = "hawqfx"
    for node in graph:
        node.name = None
    made = [value for node in graph for value in node.outputs]
    for value in (*graph.inputs, *graph.initializers.values(), *made):
        value.metadata_props.clear()
    for value in {*graph.initializers.values(), *made} - {*graph.outputs}:
        value.shape, value.type = None, None


def _cast_constants(graph: ir.Graph) -> None:
    """Take out each CastLike of a constant that has the type already, as the bounds of a clip have it.

    onnxruntime would run it every time, and would not fuse the clip with the layer before."""
    for node in list(graph):
        if node.op_type != "CastLike" or node.inputs[0] is None or node.inputs[0].const_value is None:
            continue
        same = node.inputs[1] is not None and node.inputs[0].const_value.dtype == node.inputs[1].dtype
        if same and node.outputs[0] not in graph.outputs:
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
            graph.remove(node, safe=True)


def _share_constants(graph: ir.Graph) -> None:
    """Equal constants become one constant; not the scales, whose names say which site they belong to."""
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
    """The batch dimension is called "batch"; outputs get these names, with `_output` behind those that inputs or
    constants have."""
    _part_outputs(graph)
    taken = {str(value.name) for value in graph.inputs} | graph.initializers.keys()
    names: list[str] = []
    for name in outputs:
        candidates = itertools.chain((name, f"{name}_output"), (f"{name}_{number}" for number in itertools.count(2)))
        names.append(next(candidate for candidate in candidates if candidate not in taken))
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
    """Copy an output that is an input or a constant too, or that is returned twice, so that each has a name of its
    own."""
    for number, value in enumerate(graph.outputs):
        if value.producer() is None or value in graph.outputs[:number]:
            copy = ir.node("Identity", [value])
            copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
            graph.append(copy)
            graph.outputs[number] = copy.outputs[0]
