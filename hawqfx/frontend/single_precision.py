"""A captured graph in float32, whatever floating-point types its model computes in.

Integer kernels begin and end in float32, and curvature is measured in it.  A 16-bit float is a float32 exactly; what a
16-bit network rounds on its way is not rounded here, so that the result is nearer to the network without rounding.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from hawqfx.ir.graph import constants_of, copy_graph, set_tensor
from hawqfx.ir.program import Program
from hawqfx.ir.sources import dropped_sources

OTHERS = (torch.float16, torch.bfloat16, torch.float64)
_LARGEST = torch.finfo(torch.float32).max
_aten = torch.ops.aten
_CASTS: set[Any] = {
    _aten.to.dtype, _aten.to.dtype_layout, _aten.to.device, _aten.to.other, _aten._to_copy.default,
    _aten.type_as.default,
}  # fmt: skip


def single(tensor: Tensor) -> Tensor:
    """The tensor in float32 if it has another real floating-point type; finite numbers stay finite."""
    if tensor.dtype not in OTHERS:
        return tensor
    rounded = tensor.to(torch.float32)
    return torch.where(tensor.isfinite(), rounded.clamp(-_LARGEST, _LARGEST), rounded)


def in_single_precision(program: Program) -> Program:
    """The captured program in float32, with a note if parameters or buffers had another type until now."""
    with dropped_sources() as kept:
        module, found = _converted(program.graph)
        kept.append(module)
    kinds = " and ".join(sorted(found))
    note = f"the model's {kinds} tensors are measured and lowered in float32, and so are its inputs and outputs"
    return replace(program, graph=module, notes=(*program.notes, *[note] * bool(found)))


def _converted(graph: fx.GraphModule) -> tuple[fx.GraphModule, set[str]]:
    """A copy of a graph in float32, and the names of the other types of its tensors."""
    module, found = copy_graph(graph), set[str]()
    for key, tensor in constants_of(module).items():
        if tensor.dtype in OTHERS:
            found.add(str(tensor.dtype).removeprefix("torch."))
            set_tensor(module, key, single(tensor.detach()), parameter=isinstance(tensor, torch.nn.Parameter))
    for node in module.graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), _argument)
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(_recorded, node.meta["val"])
    _drop_casts(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module, found


def _argument(value: Any) -> Any:
    """An argument of an operator; a number beyond float32, such as the least float64, is the nearest that there is."""
    if isinstance(value, float) and math.isfinite(value):
        return min(max(value, -_LARGEST), _LARGEST)
    return torch.float32 if isinstance(value, torch.dtype) and value in OTHERS else value


def _recorded(value: Any) -> Any:
    return value.to(torch.float32) if isinstance(value, Tensor) and value.dtype in OTHERS else value


def _drop_casts(graph: fx.Graph) -> None:
    """Take out casts to the type that a tensor has already: the layer behind one would read no constant."""
    for node in list(graph.nodes):
        if node.target not in _CASTS:
            continue
        taken, made = (value.meta.get("val") for value in (node.args[0], node))
        if not isinstance(taken, Tensor) or not isinstance(made, Tensor):
            continue
        if (taken.dtype, taken.device) == (made.dtype, made.device):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
