"""The linear layers that read a tensor."""

import torch
from torch import fx

from hawqfx.ir.operators import is_constant, is_tensor, value_readers

_aten = torch.ops.aten
_RESHAPES = {_aten.reshape.default, _aten.view.default, _aten.alias.default}


def linear_readers(node: fx.Node) -> list[fx.Node]:
    """The linear layers that multiply a tensor, itself or reshaped with the same last dimension, by constant weights.

    Args:
        node: that makes the tensor (..., channels), with its shape in `meta["val"]`.

    Returns:
        The layers, in the order of the graph; none where anything else reads the values too.
    """
    found: list[fx.Node] = []
    if not is_tensor(node) or node.meta["val"].ndim < 2:
        return []
    for user in value_readers(node):
        if user.target is _aten.linear.default and not user.kwargs:
            layers = [user] if user.args[0] is node and is_constant(user.args[1]) else []
        elif user.target in _RESHAPES and _channels(user) == _channels(node) is not None:
            layers = linear_readers(user)
        else:
            layers = []
        if not layers:
            return []
        found += layers
    return sorted(found)


def _channels(node: fx.Node) -> int | None:
    """The last dimension of a tensor; None if it varies, since to compare it would fix it."""
    last = node.meta["val"].shape[-1] if node.meta["val"].ndim else None
    return last if isinstance(last, int) else None
