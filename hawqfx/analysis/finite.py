"""Whether a quantized network still computes numbers where the float network does."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from hawqfx.errors import LossError
from hawqfx.ir.names import names_of
from hawqfx.ir.program import Program
from hawqfx.maths.curvature import is_finite


def refuse_not_finite(program: Program, exact: Mapping[fx.Node, Any], quantized: Mapping[fx.Node, Any]) -> None:
    """Refuse a quantized network that overflows, or divides by what its quantizers round to zero.

    Args:
        program: the float network with its sites.
        exact: values of the float network, by node; infinite ones, as in masks, may be so in both.
        quantized: values of the quantized network, in the order of its graph; nodes of one name are the same value.

    Raises:
        LossError: names the first value that is not finite, and the activations that it is computed from.
    """
    node = first_less_finite(exact, quantized)
    if node is not None:
        rules = ", ".join(f'"{name}": 32' for name in _sites_before(program, node))
        raise LossError(
            f"{names_of(node.graph)[node]} is not finite in the quantized network, and is in the float one: it "
            "overflows, or divides by what is rounded to zero. Leave what it is computed from in float, by 32 among "
            f"activation_bits= and fix={{{rules}}}"
        )


def first_less_finite(exact: Mapping[fx.Node, Any], quantized: Mapping[fx.Node, Any]) -> fx.Node | None:
    """The node of the float network whose value is the first that is not finite in the quantized network alone; the
    arguments are those of `refuse_not_finite`."""
    named = {node.name: node for node in exact}
    both = ((named[node.name], value) for node, value in quantized.items() if node.name in named)
    return next((node for node, value in both if _less_finite(exact[node], value)), None)


def _sites_before(program: Program, node: fx.Node) -> list[str]:
    """The names of the quantized activations that a value is computed from, without others between."""
    site_of, names = program.site_of, {site.key: site.name for site in program.activations}
    waiting, seen, found = list(node.all_input_nodes), set[fx.Node](), dict[str, None]()
    while waiting:
        source = waiting.pop(0)
        if source in seen:
            continue
        seen.add(source)
        if source.name in site_of:
            found[names[site_of[source.name]]] = None
        else:
            waiting += source.all_input_nodes
    return list(found)


def _less_finite(exact: Any, quantized: Any) -> bool:
    """Whether an element of a tensor, or of one of several, is finite in float alone."""
    return any(
        isinstance(own, Tensor)
        and own.is_floating_point()
        and not is_finite(own)
        and bool((torch.isfinite(other) & ~torch.isfinite(own)).any())
        for own, other in zip(pytree.tree_leaves(quantized), pytree.tree_leaves(exact), strict=False)
    )
