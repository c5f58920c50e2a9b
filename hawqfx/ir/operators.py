"""The operators that hawqfx knows, by the role that decides how their tensors are quantized."""

import math
import operator
from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.node import Target
from torch.utils import _pytree as pytree

_aten = torch.ops.aten

# Layers with the arguments (input, weight, bias, ...); dimension 0 of the weight is the output channel.
WEIGHTED_LAYERS: dict[Target, str] = {
    _aten.conv1d.default: "conv1d",
    _aten.conv2d.default: "conv2d",
    _aten.conv3d.default: "conv3d",
    _aten.conv1d.padding: "conv1d",
    _aten.conv2d.padding: "conv2d",
    _aten.conv3d.padding: "conv3d",
    _aten.linear.default: "linear",
}

# Number of spatial axes -> convolution.
CONVOLUTIONS: dict[int, OpOverload[..., Any]] = {
    1: _aten.conv1d.default,
    2: _aten.conv2d.default,
    3: _aten.conv3d.default,
}

# Products of two activations, as in attention; onnxruntime has integer kernels for them.
PRODUCTS: dict[Target, str] = {_aten.matmul.default: "matmul", _aten.bmm.default: "bmm"}

# Gathers rows of a table of weights; integer inputs are the numbers of the rows.
EMBEDDING: OpOverload[..., Any] = _aten.embedding.default

# Operators that choose entries of a table by numbers that are not known before.
GATHERS: set[Target] = {_aten.index.Tensor, _aten.index_select.default}

# Layers with these arguments too; dimension 1 of the weight is the output channel of a group.
TRANSPOSED_CONVOLUTIONS: dict[Target, str] = {
    _aten.conv_transpose1d.default: "conv_transpose1d",
    _aten.conv_transpose2d.input: "conv_transpose2d",
    _aten.conv_transpose3d.input: "conv_transpose3d",
}

# Operators that multiply, and for which onnxruntime has no integer kernel.
FLOAT_ONLY: dict[Target, str] = {
    **TRANSPOSED_CONVOLUTIONS,
    _aten.scaled_dot_product_attention.default: "scaled_dot_product_attention",
    _aten.lstm.input: "lstm",
    _aten.gru.input: "gru",
    _aten.rnn_tanh.input: "rnn",
    _aten.rnn_relu.input: "rnn",
}

# Operators without weights that have an integer kernel in onnxruntime -> number of activations that they take.  Beside
# float operators they run in float: see hawqfx.analysis.partition.
AVERAGE_POOLS: set[Target] = {_aten.avg_pool1d.default, _aten.avg_pool2d.default, _aten.avg_pool3d.default}
_ELEMENTWISE: dict[Target, int] = {
    _aten.add.Tensor: 2,
    _aten.mul.Tensor: 2,
    _aten.sigmoid.default: 1,
    _aten.leaky_relu.default: 1,
    **dict.fromkeys(AVERAGE_POOLS, 1),
}
_MEANS: set[Target] = {
    _aten.mean.dim,
    _aten.adaptive_avg_pool1d.default,
    _aten.adaptive_avg_pool2d.default,
    _aten.adaptive_avg_pool3d.default,
}

# Operators that cut off all values below zero, if their arguments say so: see `ceiling`.
_RECTIFIERS: set[Target] = {
    _aten.relu.default,
    _aten.relu6.default,
    _aten.hardtanh.default,
    _aten.clamp.default,
    _aten.clamp_min.default,
}

# Data-movement operators: they change no value, so that input and output share a quantizer.
_DATA_MOVEMENT: set[Target] = {
    _aten.view.default,
    _aten.reshape.default,
    _aten.flatten.using_ints,
    _aten.unflatten.int,
    _aten.permute.default,
    _aten.transpose.int,
    _aten.mT.default,
    _aten.t.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.unsqueeze.default,
    _aten.expand.default,
    _aten.slice.Tensor,
    _aten.select.int,
    _aten.index_select.default,
    _aten.max_pool1d.default,
    _aten.max_pool2d.default,
    _aten.max_pool3d.default,
    _aten.cat.default,
    _aten.pixel_shuffle.default,
    _aten.pixel_unshuffle.default,
    _aten.channel_shuffle.default,
    _aten.roll.default,
    _aten.upsample_nearest1d.vec,
    _aten.upsample_nearest2d.vec,
    _aten.upsample_nearest3d.vec,
    _aten.pad.default,
    _aten.constant_pad_nd.default,
}
# Data-movement operators that also add zeros, which every quantizer represents exactly; onnxruntime fuses them into the
# layer that follows.
PADS: set[Target] = {_aten.pad.default, _aten.constant_pad_nd.default}

# Functions of single values; they and their slopes are finite everywhere.
_POINTWISE: set[Target] = {
    _aten.relu.default, _aten.relu6.default, _aten.hardtanh.default, _aten.clamp.default, _aten.clamp_min.default,
    _aten.leaky_relu.default, _aten.elu.default, _aten.selu.default, _aten.celu.default, _aten.sigmoid.default,
    _aten.tanh.default, _aten.silu.default, _aten.gelu.default, _aten.mish.default, _aten.softplus.default,
    _aten.log_sigmoid.default, _aten.hardsigmoid.default, _aten.hardswish.default, _aten.erf.default,
    _aten.neg.default, _aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor,
}  # fmt: skip

# Operators that may take a constant, and do not multiply by it.
NO_PRODUCTS: set[Target] = _DATA_MOVEMENT | {
    _aten.add.Tensor,
    _aten.sub.Tensor,
    _aten.repeat.default,
    _aten.index.Tensor,
    _aten.gather.default,
    _aten.where.self,
    _aten.masked_fill.Scalar,
    _aten.maximum.default,
    _aten.minimum.default,
}

BATCH_NORM: OpOverload[..., Any] = _aten.batch_norm.default
DECOMPOSED_BATCH_NORM: OpOverload[..., Any] = _aten._native_batch_norm_legit_no_training.default
# The copy of a tensor that integer kernels read where float operators read the tensor too (passes/insert_copies.py).
COPY: OpOverload[..., Any] = _aten.alias.default
DROPOUT: set[Target] = {_aten.dropout.default, _aten.feature_dropout.default}
IDENTITIES: set[Target] = {
    _aten.alias.default,
    _aten.detach.default,
    _aten.clone.default,
    _aten.contiguous.default,
    _aten.lift_fresh_copy.default,
}

# Operators that part a tensor along a dimension.
PARTED: set[Target] = {
    _aten.chunk.default,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.split.sizes,
    _aten.unbind.int,
}
ATTENTION: OpOverload[..., Any] = _aten.scaled_dot_product_attention.default

# Operators that check what torch.export knows already, and return nothing.
ASSERTIONS: set[Target] = {
    _aten._assert_tensor_metadata.default,
    _aten._assert_scalar.default,
    _aten.sym_constrain_range_for_size.default,
    _aten.sym_constrain_range.default,
}
# Reshapes that share memory with their input, and refuse strides with which they cannot.
VIEWS: set[Target] = {_aten.view.default, _aten._unsafe_view.default}
# They take out dimensions of size 1.
SQUEEZES: set[Target] = {_aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims}

# Functions whose output is a distribution, as the last operator of a network.
SOFTMAXES: set[Target] = {_aten.softmax.int, _aten._softmax.default, _aten.special_softmax.default}
LOG_SOFTMAXES: set[Target] = {
    _aten.log_softmax.int,
    _aten._log_softmax.default,
    _aten.special_log_softmax.default,
}
SIGMOIDS: set[Target] = {_aten.sigmoid.default, _aten.sigmoid_.default, _aten.special_expit.default}

# Operators that return elements of their input, in another place, shape or precision, beside those above.
_ELEMENTS: set[Target] = {
    _aten.squeeze.default, _aten.movedim.int, _aten.swapaxes.default, _aten.ravel.default, _aten.unbind.int,
    _aten.chunk.default, _aten.split.Tensor, _aten.split_with_sizes.default, _aten.index.Tensor, operator.getitem,
    _aten.to.dtype, _aten._to_copy.default, _aten.type_as.default,
}  # fmt: skip


def operands(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments of a node; their types are those of the operator's schema, which fx does not state."""
    return node.args


def ceiling(node: fx.Node) -> float | None:
    """The largest value that a rectifier lets pass.

    The quantizer of a rectifier's output can do the rectifier's work: it cannot represent the values that the rectifier
    cuts off.

    Args:
        node: any node.

    Returns:
        The ceiling, which is infinity for ReLU; None if the node is no rectifier.
    """
    if node.target not in _RECTIFIERS:
        return None
    if node.target is _aten.relu.default:
        return math.inf
    if node.target is _aten.relu6.default:
        return 6.0
    default = (-1.0, 1.0) if node.target is _aten.hardtanh.default else (None, None)
    low, high = (node.args[at] if len(node.args) > at else default[at - 1] for at in (1, 2))
    low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
    low, high = node.kwargs.get("min_val", low), node.kwargs.get("max_val", high)
    if low != 0 or not (high is None or (isinstance(high, (int, float)) and high > 0)):
        return None
    return math.inf if high is None else float(high)


def spatial_mean(node: fx.Node) -> bool:
    """Whether a node averages images (N, C, ...) over all axes but batch and channel."""
    value = node.args[0].meta.get("val") if node.target in _MEANS and isinstance(node.args[0], fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.ndim < 3 or node.kwargs:
        return False
    if node.target is not _aten.mean.dim:
        return all(size == 1 for size in node.args[1])  # type: ignore[union-attr]
    axes = node.args[1] if isinstance(node.args[1], (list, tuple)) else ()
    return {axis % value.ndim for axis in axes} == set(range(2, value.ndim))  # type: ignore[operator]


def counts_beyond_padding(node: fx.Node) -> bool:
    """Whether an average pool has windows that reach beyond the padding, and counts what is padded: onnxruntime's
    integer kernel (1.32) divides by the whole window there, and its float kernel by what lies within, as torch does."""
    ceil, counts = (node.args[at] if len(node.args) > at else default for at, default in ((4, False), (5, True)))
    return bool(node.kwargs.get("ceil_mode", ceil) and node.kwargs.get("count_include_pad", counts))


def elementwise(node: fx.Node) -> tuple[fx.Node, ...]:
    """The activations that an elementwise operator takes.

    Args:
        node: any node.

    Returns:
        The activations, if onnxruntime has an integer kernel for the operator and no argument is a weight; else ().
    """
    count = 1 if spatial_mean(node) else _ELEMENTWISE.get(node.target, 0)
    if node.target in AVERAGE_POOLS and counts_beyond_padding(node):
        return ()
    taken = node.args[:count]
    if not count or not is_tensor(node) or not all(map(is_tensor, taken)) or (count == 2 and node.kwargs):
        return ()
    return taken  # type: ignore[return-value]


def is_product(node: fx.Node) -> bool:
    """Whether a node multiplies two matrices of activations."""
    return node.target in PRODUCTS and all(map(is_tensor, node.args[:2]))


def is_data_movement(node: fx.Node) -> bool:
    """Whether a node only moves activations, or also adds zeros, so that its input and output share a quantizer."""
    if any(_is_float_constant(source) for source in node.all_input_nodes):
        return False
    if node.target in PADS:
        constant = node.target is _aten.constant_pad_nd.default or len(node.args) < 3 or node.args[2] == "constant"
        value = node.args[-1] if len(node.args) == (4 if node.target is _aten.pad.default else 3) else 0
        return constant and value in (0, None) and not node.kwargs
    return node.target in _DATA_MOVEMENT and is_tensor(node)


def elements_of(node: fx.Node) -> tuple[fx.Node, ...]:
    """The tensors whose elements a node returns as they are: those that it moves, chooses or casts; () if it computes
    new ones."""
    kept = _DATA_MOVEMENT - PADS | IDENTITIES | DROPOUT | _ELEMENTS
    return tuple(pytree.tree_leaves(node.args[0])) if node.target in kept else ()


def is_pointwise(node: fx.Node) -> bool:
    """Whether a node computes every value from the values at the same place, by a function that is finite everywhere,
    with a finite slope."""
    if not is_tensor(node):
        return False
    if node.target is _aten.div.Tensor:  # a divisor that varies may be zero
        return not isinstance(node.args[1], fx.Node)
    if node.target is _aten.pow.Tensor_Scalar:
        return isinstance(node.args[1], int) and node.args[1] > 0
    return node.target in _POINTWISE


def value_readers(node: fx.Node) -> list[fx.Node]:
    """The users of a node that read its values; other users read only its size."""
    return [user for user in node.users if not isinstance(user.meta.get("val"), torch.SymInt)]


def training_argument(node: fx.Node) -> bool:
    """Whether a batch-norm or dropout node was captured in train mode."""
    position = {BATCH_NORM: 5} | dict.fromkeys(DROPOUT, 2)
    at = position.get(node.target)
    return at is not None and bool(node.args[at])


def _is_float_constant(node: fx.Node) -> bool:
    """Whether a node reads a floating-point parameter or buffer, or a constant of unknown type."""
    value = node.meta.get("val")
    return node.op == "get_attr" and not (isinstance(value, torch.Tensor) and not value.is_floating_point())


def kept_in_float(node: fx.Node, patterns: Iterable[str]) -> bool:
    """Whether the user keeps a layer or an embedding in float.

    Args:
        node: a weighted layer or an embedding.
        patterns: of weight names, as in a shell.

    Returns:
        True if the qualified name of the node's weight matches a pattern.
    """
    weight = node.args[0 if node.target is EMBEDDING else 1]
    name = str(weight.target) if isinstance(weight, fx.Node) else ""
    return matches(name, patterns)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of some patterns, as in a shell."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def is_constant(value: object) -> bool:
    """Whether an argument is a parameter or buffer of the graph."""
    return isinstance(value, fx.Node) and value.op == "get_attr"


def is_size(value: object) -> bool:
    """Whether an argument is a number that a node takes from the shape of a tensor."""
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), int | torch.SymInt)


def is_tensor(value: object) -> bool:
    """Whether an argument is an activation: a floating-point tensor, as recorded at capture, and no constant."""
    if not isinstance(value, fx.Node) or value.op == "get_attr":
        return False
    recorded = value.meta.get("val")
    return isinstance(recorded, torch.Tensor) and recorded.is_floating_point()
