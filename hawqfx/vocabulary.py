"""The operators that hawqfx knows, each in the one role that decides how its tensors are quantized."""

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.node import Target

_aten = torch.ops.aten

# Layers called as (input, weight, bias, ...), dimension 0 of the weight being the output channel.
WEIGHTED: dict[Target, str] = {
    _aten.conv1d.default: "conv1d",
    _aten.conv2d.default: "conv2d",
    _aten.conv3d.default: "conv3d",
    _aten.conv1d.padding: "conv1d",
    _aten.conv2d.padding: "conv2d",
    _aten.conv3d.padding: "conv3d",
    _aten.linear.default: "linear",
}

# Multiply by weights, but have no integer lowering yet: they stay in float, and the program says so.
FLOAT_ONLY: dict[Target, str] = {
    _aten.conv_transpose1d.default: "conv_transpose1d",
    _aten.conv_transpose2d.input: "conv_transpose2d",
    _aten.conv_transpose3d.input: "conv_transpose3d",
    _aten.matmul.default: "matmul",
    _aten.bmm.default: "bmm",
    _aten.embedding.default: "embedding",
    _aten.scaled_dot_product_attention.default: "scaled_dot_product_attention",
    _aten.lstm.input: "lstm",
    _aten.gru.input: "gru",
}

# Integer kernels of two activations.
BINARY: dict[Target, str] = {_aten.add.Tensor: "add"}

# Absorbed by the quantizer of the tensor that they end in: it cannot represent what they cut off.
RECTIFIERS: set[Target] = {_aten.relu.default}

# Move values about and change none: input and output share a quantizer.
CARRIERS: set[Target] = {
    _aten.view.default,
    _aten.reshape.default,
    _aten.flatten.using_ints,
    _aten.permute.default,
    _aten.transpose.int,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.unsqueeze.default,
    _aten.max_pool1d.default,
    _aten.max_pool2d.default,
    _aten.max_pool3d.default,
    _aten.cat.default,
}

BATCH_NORM: OpOverload[..., Any] = _aten.batch_norm.default
DECOMPOSED_BATCH_NORM: OpOverload[..., Any] = _aten._native_batch_norm_legit_no_training.default
DROPOUT: set[Target] = {_aten.dropout.default, _aten.feature_dropout.default}
IDENTITIES: set[Target] = {
    _aten.alias.default,
    _aten.detach.default,
    _aten.clone.default,
    _aten.contiguous.default,
    _aten.lift_fresh_copy.default,
}


def operands(node: fx.Node) -> tuple[Any, ...]:
    """The arguments of a node, each of whatever type the operator's schema says."""
    return node.args


def training_argument(node: fx.Node) -> bool:
    """Whether a batch-norm or dropout node was captured in train mode."""
    position = {BATCH_NORM: 5} | dict.fromkeys(DROPOUT, 2)
    at = position.get(node.target)
    return at is not None and bool(node.args[at])


def is_constant(value: object) -> bool:
    """Whether an argument is a parameter or buffer of the graph."""
    return isinstance(value, fx.Node) and value.op == "get_attr"


def is_tensor(value: object) -> bool:
    """Whether an argument is a floating-point tensor computed from the inputs, as far as the capture recorded."""
    if not isinstance(value, fx.Node) or value.op == "get_attr":
        return False
    recorded = value.meta.get("val")
    return isinstance(recorded, torch.Tensor) and recorded.is_floating_point()
