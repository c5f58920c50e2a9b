"""Writes the sub-graphs that torch.export makes of `torch.no_grad()` and autocast into the graph around them.

Such a sub-graph computes what its operators say: gradients are taken or not by whoever runs the graph, and all of it is
computed in float32 (hawqfx.frontend.single_precision).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator

from hawqfx.errors import CaptureError
from hawqfx.ir.names import names_of

# operator -> position of the sub-graph among its arguments; the inputs of the sub-graph come after it
_WRAPPERS: Mapping[Any, int] = {
    torch.ops.higher_order.wrap_with_set_grad_enabled: 1,
    torch.ops.higher_order.wrap_with_autocast: 4,
}


def inline_wrappers(module: fx.GraphModule) -> None:
    """Write the wrapped sub-graphs of a captured graph into it, in place; those inside them, too.

    Raises:
        CaptureError: if another operator that takes sub-graphs is left, such as torch.cond.
    """
    while wrapped := [node for node in module.graph.nodes if node.target in _WRAPPERS]:
        for node in wrapped:
            _inline(module, node)
    for node in module.graph.nodes:
        if isinstance(node.target, HigherOrderOperator):
            raise CaptureError(
                f"{names_of(module.graph)[node]} is a {node.target.name()}, whose sub-graphs are run as the values of "
                "tensors ask for: hawqfx compiles graphs without control flow; write it with torch.where, or compile "
                "its parts"
            )


def _inline(module: fx.GraphModule, node: fx.Node) -> None:
    """Copy the nodes of a wrapped sub-graph before its call, and let the readers of the call read them."""
    at = _WRAPPERS[node.target]
    reference, inputs = node.args[at], node.args[at + 1 :]
    assert isinstance(reference, fx.Node)
    inner = module.get_submodule(str(reference.target))
    assert isinstance(inner, fx.GraphModule)
    placeholders = inner.graph.find_nodes(op="placeholder")
    copies: dict[fx.Node, Any] = dict(zip(placeholders, inputs, strict=True))
    with module.graph.inserting_before(node):
        outputs = module.graph.graph_copy(inner.graph, copies)
    for copied in copies.values():  # what a sub-graph owns is found by its name in the graph around it
        if isinstance(copied, fx.Node) and copied.op == "get_attr" and copied not in inputs:
            copied.target = f"{reference.target}.{copied.target}"
    assert isinstance(outputs, (tuple, list))
    for user in list(node.users):
        made = outputs[user.args[1]]  # type: ignore[index]
        assert isinstance(made, fx.Node)
        user.replace_all_uses_with(made)
        module.graph.erase_node(user)
    module.graph.erase_node(node)
    if not reference.users:
        module.graph.erase_node(reference)
