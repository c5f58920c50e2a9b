"""A model without traces of the exporter, without copies of constants, and with the names that users know.

Inputs, outputs and float parameters keep their names; all other values have short ones, since each stands several times
in a file.  What belongs to a site is found by the names of nodes: the calls that unpack a weight, and the
DequantizeLinear of an activation, have the site's key, with a number behind where it comes again (`site_of`).  So has
the call that looks up rows of a table in blocks.

OutputFixPass of onnx_ir does not fit here: it gives an input that is returned another name.
"""

import itertools
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from hawqfx.export.packed_weights import DOMAIN, ROWS
from hawqfx.ir.program import SCALE

_AGAIN = "#"


def clean(model: ir.Model, outputs: Sequence[str], dimensions: Mapping[str, Mapping[int, str]] = {}) -> None:
    """Leave out of the model everything that no reader needs: traces of the exporter, shapes inside, copies of small
    constants, long names.

    Args:
        model: the model, which is changed; its weights are packed already.
        outputs: the names that its outputs get, in order.
        dimensions: input -> the names that its dimensions get, by number, where they vary.
    """
    parameters = [value for value in model.graph.initializers.values() if _is_float_parameter(value)]
    ir.passes.Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),
    )(model)
    graph = model.graph
    _cast_constants(graph)
    _share_constants(graph)
    _drop_traces(model)
    _drop_defaults(graph)
    _name_by_sites(graph)
    _name_the_edges(graph, outputs)
    _name_dimensions(graph, dimensions)
    _shorten_names(graph, parameters)


def _is_float_parameter(value: ir.Value) -> bool:
    """Whether an initializer of a model that is not clean yet is a parameter that stays in float."""
    return value.dtype == ir.DataType.FLOAT and not str(value.name).endswith(SCALE)


def site_of(node: str) -> str:
    """The key of the site that a node of a file belongs to, by the node's name; empty without one."""
    return node.partition(_AGAIN)[0]


def _name_by_sites(graph: ir.Graph) -> None:
    """Nodes that make the values of a site have its key for a name; others have none."""
    seen: Counter[str] = Counter()
    for node in graph:
        key = str(node.name) if node.domain == DOMAIN else ""
        scale = node.inputs[1] if node.op_type in ("DequantizeLinear", ROWS) else None
        # a zero-point tells activations from constants
        if scale is not None and str(scale.name).endswith(SCALE) and len(node.inputs) == 3:
            key = str(scale.name).removesuffix(SCALE)
        # onnxruntime takes no name twice
        node.name = f"{key}{_AGAIN}{seen[key]}" if seen[key] else key
        seen.update([key] if key else [])


def _shorten_names(graph: ir.Graph, parameters: Sequence[ir.Value]) -> None:
    """Values inside are named a, b, ..., z, A, ..., Z, aa, ..., in the order of the graph."""
    made = [value for node in graph for value in node.outputs]
    kept = {*graph.inputs, *graph.outputs, *parameters}
    taken = {value.name for value in kept}
    names = (name for name in _words() if name not in taken)
    inside = [value for value in (*graph.initializers.values(), *made) if value not in kept]
    for number, value in enumerate(inside):  # a new name may be the old one of another value
        value.name = f"{value.name} {number}"
    for value in inside:
        value.name = next(names)


def _words() -> Iterator[str]:
    for length in itertools.count(1):
        yield from map("".join, itertools.product(string.ascii_letters, repeat=length))


def _drop_traces(model: ir.Model) -> None:
    """Drop the exporter's metadata, and the types and shapes of values inside."""
    graph = model.graph
    model.metadata_props.clear()
    graph.metadata_props.clear()  # a graph without nodes keeps it otherwise
    graph.name = "hawqfx"
    made = [value for node in graph for value in node.outputs]
    for value in (*graph.inputs, *graph.initializers.values(), *made):
        value.metadata_props.clear()
    for value in {*graph.initializers.values(), *made} - {*graph.outputs}:
        value.shape, value.type = None, None


def _drop_defaults(graph: ir.Graph) -> None:
    """Drop the attributes whose values are ONNX's defaults."""
    for node in graph:
        version = graph.opset_imports.get(node.domain, 1)
        if not onnx.defs.has(node.op_type, node.domain):
            continue
        defined = onnx.defs.get_schema(node.op_type, version, node.domain).attributes
        for name, attribute in list(node.attributes.items()):
            default = defined[name].default_value
            if default.type and ir.serde.deserialize_attribute(default).value == attribute.value:
                del node.attributes[name]


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
    """Equal constants become one constant; not the scales, each of which belongs to a site and has its price."""
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
    """Outputs get these names, with `_output` behind those that inputs or
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


def _name_dimensions(graph: ir.Graph, dimensions: Mapping[str, Mapping[int, str]]) -> None:
    """The dimensions of inputs that vary have these names, and those of outputs what follows from them."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        for axis, name in dimensions.get(str(value.name), {}).items():
            if value.shape is not None and isinstance(value.shape[axis], ir.SymbolicDim):
                names[_text(value.shape[axis])] = name
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([size if isinstance(size, int) else _named(size, names) for size in value.shape])


def _text(size: ir.SymbolicDim | int) -> str:
    return str(size.value) if isinstance(size, ir.SymbolicDim) else str(size)


def _named(size: ir.SymbolicDim, names: Mapping[str, str]) -> str:
    """The expression of a dimension with the names of users in place of symbols."""
    return re.sub(r"[A-Za-z_]\w*", lambda word: names.get(word[0], word[0]), _text(size))


def _part_outputs(graph: ir.Graph) -> None:
    """Copy an output that is an input or a constant too, or that is returned twice, so that each has a name of its
    own."""
    for number, value in enumerate(graph.outputs):
        if value.producer() is None or value in graph.outputs[:number]:
            copy = ir.node("Identity", [value])
            copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
            graph.append(copy)
            graph.outputs[number] = copy.outputs[0]
