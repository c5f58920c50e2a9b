"""Write operators that have no integer kernel as operators that have one.

The results are equal but for the order of float sums:

* a transposed convolution with stride s is a convolution that makes s outputs per axis at every position, its kernel
  parted by phase, and a pixel shuffle (Shi et al. 2016, "Is the deconvolution layer the same as a convolutional
  layer?"); where s does not divide the kernel, zeros pad it;
* a product with a constant matrix is a linear layer;
* a linear layer of stacked matrices is a layer of a single matrix, with the kernel that adds the bias;
* a batch-norm that no layer took in is a convolution of each channel with one weight;
* attention is two products and a softmax;
* silu(x) is x times sigmoid(x);
* chunks of a tensor are slices of it;
* the sum, mean or maximum of bags of words, all of one length, is that of what a table gives;
* an average pool without padding counts none.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx.node import Target

from hawqfx.errors import CaptureError
from hawqfx.ir.operators import (
    AVERAGE_POOLS,
    BATCH_NORM,
    CONVOLUTIONS,
    PARTED,
    ceiling,
    counts_beyond_padding,
    is_constant,
    is_tensor,
    operands,
)
from hawqfx.ir.program import Program
from hawqfx.ir.rewriter import GraphRewriter
from hawqfx.pass_manager.base import Rewrite

_aten = torch.ops.aten
HIDDEN = torch.finfo(torch.float32).min / 2  # added to the scores of what a mask hides
_END = torch.iinfo(torch.int64).max
_TRANSPOSED: set[Target] = {
    _aten.conv_transpose1d.default,
    _aten.conv_transpose2d.input,
    _aten.conv_transpose3d.input,
}


def _item(rewriter: GraphRewriter, node: fx.Node) -> fx.Node | None:
    """An item of what has several."""
    whole, _ = operands(node)
    if isinstance(whole, fx.Node) and whole.target is _aten.embedding_bag.padding_idx:
        return _bags(rewriter, node)
    return _pieces(rewriter, node)


def _bags(rewriter: GraphRewriter, node: fx.Node) -> fx.Node:
    """The sum, mean or maximum of the vectors of each bag of words, the words being a matrix with a bag in each row.

    Raises:
        CaptureError: if bags may differ in their length, or words have weights: ONNX has such sums as a loop over bags
            alone, on which onnxruntime 1.32 ends the process.
    """
    whole, number = operands(node)
    table, words, starts, _, mode, _, weights, has_last, padding = whole.args
    rows = words.args[0] if words.target is _aten.reshape.default and words.args[1] == [-1] else None
    even = rows is not None and rows.meta["val"].ndim == 2 and _starts(starts, rows)
    if number != 0 or not even or weights is not None or has_last or padding is not None:
        raise CaptureError(
            "embedding_bag is supported for words (N, L), bags of one length, without per_sample_weights= and "
            "padding_idx=: use torch.nn.Embedding, and sum what it gives under a mask"
        )
    read = rewriter.call(_aten.embedding.default, table, rows)
    reduced = (_aten.sum.dim_IntList, _aten.mean.dim, _aten.amax.default)[mode]  # as torch numbers them
    return rewriter.call(reduced, read, [1])


def _starts(starts: fx.Node, rows: fx.Node) -> bool:
    """Whether these are the numbers of the first words of rows, one after another: arange(0, N L, L)."""
    if starts.target is not _aten.arange.start_step or starts.args[0] != 0:
        return False
    step, length = starts.args[2], rows.meta["val"].shape[1]
    if isinstance(step, fx.Node):
        return step.target is _aten.sym_size.int and step.args == (rows, 1)
    return bool(step == length)


def _pieces(rewriter: GraphRewriter, node: fx.Node) -> fx.Node | None:
    """An item of chunk, split or unbind."""
    whole, number = operands(node)
    if not isinstance(whole, fx.Node) or whole.target not in PARTED or not is_tensor(whole.args[0]):
        return None
    tensor = whole.args[0]
    assert isinstance(tensor, fx.Node)
    if whole.kwargs:
        return None
    if whole.target is _aten.unbind.int:
        axis = whole.args[1] if len(whole.args) > 1 else 0
        return rewriter.call(_aten.select.int, tensor, axis, number)
    axis = operands(whole)[2] if len(whole.args) > 2 else 0
    sizes = [value.shape[axis] for value in whole.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        return None
    start = sum(sizes[:number])
    return rewriter.call(_aten.slice.Tensor, tensor, axis, start, start + sizes[number])


def _nothing_cut(rewriter: GraphRewriter, node: fx.Node) -> fx.Node | None:
    """A slice that keeps the whole tensor."""
    defaults: tuple[Any, ...] = (0, None, None, 1)
    tensor, _, start, end, step = (*operands(node), *defaults[len(node.args) - 1 :])
    return tensor if start in (0, None) and end in (_END, None) and step == 1 else None


def _silu(rewriter: GraphRewriter, node: fx.Node) -> fx.Node:
    (tensor,) = operands(node)
    return rewriter.call(_aten.mul.Tensor, tensor, rewriter.call(_aten.sigmoid.default, tensor))


def _average(rewriter: GraphRewriter, node: fx.Node) -> fx.Node | None:
    """An average pool without padding, which has none to count, for the integer kernel: `counts_beyond_padding`."""
    defaults: tuple[Any, ...] = ([], 0, False, True)
    tensor, kernel, stride, padding, ceil, _, *rest = (*operands(node), *defaults[len(node.args) - 2 :])
    padded = any(padding) if isinstance(padding, (list, tuple)) else padding
    if node.kwargs or padded or not counts_beyond_padding(node):
        return None
    return rewriter.call(node.target, tensor, kernel, stride, padding, ceil, False, *rest)


def _linear(rewriter: GraphRewriter, node: fx.Node) -> fx.Node | None:
    """addmm(bias, x, W), and x W for a matrix W that nothing else reads, as a layer with the transpose of W; and W x as
    the transpose of a layer with W, of the transpose of x."""
    if node.kwargs:
        return None
    bias, (tensor, weight) = operands(node)[:-2], operands(node)[-2:]
    if not bias and is_constant(tensor) and is_tensor(weight) and tensor.meta["val"].ndim == 2:
        if weight.meta["val"].ndim < 2:
            return None
        turned = rewriter.call(_aten.transpose.int, weight, -2, -1)
        return rewriter.call(_aten.transpose.int, rewriter.call(_aten.linear.default, turned, tensor), -2, -1)
    if not is_constant(weight) or not is_tensor(tensor) or weight.meta["val"].ndim != 2 or len(weight.users) > 1:
        return None
    if bias and (not is_constant(bias[0]) or bias[0].meta["val"].ndim != 1):
        return None
    turned = rewriter.parameter(str(weight.target), rewriter.value(weight).T.contiguous(), weight)
    return rewriter.call(_aten.linear.default, tensor, turned, *bias)


def _shared(rewriter: GraphRewriter, target: Any, tensor: fx.Node, *args: Any) -> fx.Node:
    """A call on a tensor, or the earlier one that is the same."""
    calls = (user for user in tensor.users if (user.target, user.args) == (target, (tensor, *args)))
    return next(calls, None) or rewriter.call(target, tensor, *args)


def _size(rewriter: GraphRewriter, tensor: fx.Node, axis: int) -> Any:
    """The size of a dimension: a number, or a node where it varies."""
    size = tensor.meta["val"].shape[axis]
    return size if isinstance(size, int) else _shared(rewriter, _aten.sym_size.int, tensor, axis)


def _flat(rewriter: GraphRewriter, node: fx.Node) -> fx.Node | None:
    """A linear layer, and the rectifier after it, with all axes but the last flattened."""
    tensor, weight, *_ = operands(node)
    shape = list(node.meta["val"].shape)
    if len(shape) < 3 or not is_constant(weight) or not is_tensor(tensor) or node.kwargs:
        return None
    sizes = [-1, *(_size(rewriter, tensor, axis) for axis in range(1, len(shape) - 1)), shape[-1]]
    flat = _shared(rewriter, _aten.reshape.default, tensor, [-1, weight.meta["val"].shape[1]])
    made = rewriter.call(_aten.linear.default, flat, *operands(node)[1:])
    user = next(iter(node.users))
    if len(node.users) > 1 or ceiling(user) is None:
        return rewriter.call(_aten.reshape.default, made, sizes)
    options: dict[str, Any] = dict(user.kwargs)
    made = rewriter.call(user.target, made, *operands(user)[1:], **options)
    user.replace_all_uses_with(rewriter.call(_aten.reshape.default, made, sizes))
    return made


def _scaled(rewriter: GraphRewriter, node: fx.Node) -> fx.Node | None:
    """Batch-norm of images."""
    tensor, *statistics, training, _, epsilon, _ = operands(node)
    axes = tensor.meta["val"].ndim - 2
    if training or axes not in CONVOLUTIONS or not all(value is None or is_constant(value) for value in statistics):
        return None
    gamma, beta, mean, variance = (None if value is None else rewriter.value(value).double() for value in statistics)
    assert mean is not None
    assert variance is not None
    gain = (1 if gamma is None else gamma) / (variance + epsilon).sqrt()
    bias = (0 if beta is None else beta) - mean * gain
    key, like = str(statistics[2].target).rpartition(".")[0], statistics[2]
    weight = rewriter.parameter(f"{key}.gain", gain.reshape(-1, *[1] * (axes + 1)).float(), like)
    rest = [1] * axes, [0] * axes, [1] * axes, len(gain)
    return rewriter.call(
        CONVOLUTIONS[axes], tensor, weight, rewriter.parameter(f"{key}.folded_bias", bias.float(), like), *rest
    )


def _attention(rewriter: GraphRewriter, node: fx.Node) -> fx.Node | None:
    """Attention; rows that a mask hides wholly come out as zeros, as torch has them."""
    query, key, value, mask, _, causal = (*operands(node), *(None, 0.0, False)[max(0, len(node.args) - 3) :])[:6]
    mask = node.kwargs.get("attn_mask", mask)
    scale = node.kwargs.get("scale")
    causal = node.kwargs.get("is_causal", causal)
    if not node.kwargs.keys() <= {"attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"}:
        return None
    if node.kwargs.get("enable_gqa"):
        key, value = (_repeated_heads(rewriter, tensor, query) for tensor in (key, value))
    width = query.meta["val"].shape[-1]
    scores = rewriter.call(_aten.matmul.default, query, rewriter.call(_aten.transpose.int, key, -2, -1))
    scores = rewriter.call(_aten.mul.Tensor, scores, scale if scale is not None else 1 / math.sqrt(width))
    visible = None
    if causal:
        scores = rewriter.call(_aten.add.Tensor, scores, _triangle(rewriter, node, query, key))
    elif mask is not None:
        scores = rewriter.call(_aten.add.Tensor, scores, _added(rewriter, mask))
        visible = _rows(rewriter, mask)
    chances = rewriter.call(_aten.softmax.int, scores, -1)
    if visible is not None:
        chances = rewriter.call(_aten.where.ScalarOther, visible, chances, 0.0)
    return rewriter.call(_aten.matmul.default, chances, value)


def _repeated_heads(rewriter: GraphRewriter, tensor: fx.Node, query: fx.Node) -> fx.Node:
    """Keys or values (N, heads, L, width) with each head as often as several heads of queries share it."""
    times = query.meta["val"].shape[-3] // tensor.meta["val"].shape[-3]
    return tensor if times == 1 else rewriter.call(_aten.repeat_interleave.self_int, tensor, times, -3)


def _triangle(rewriter: GraphRewriter, node: fx.Node, query: fx.Node, key: fx.Node) -> fx.Node:
    """What is added to the scores so that no position sees a later one, (rows, columns)."""
    rows, columns = query.meta["val"].shape[-2], key.meta["val"].shape[-2]
    if isinstance(rows, int) and isinstance(columns, int):
        return rewriter.buffer(f"{node.name}_mask", torch.full((rows, columns), -math.inf).triu(1), query)
    positions = []
    for tensor, axis in ((query, 1), (key, 0)):
        count = rewriter.call(_aten.sym_size.int, tensor, -2)
        positions.append(rewriter.call(_aten.unsqueeze.default, rewriter.call(_aten.arange.default, count), axis))
    seen = rewriter.call(_aten.ge.Tensor, *positions)
    return rewriter.call(_aten.where.Scalar, seen, 0.0, HIDDEN)


def _added(rewriter: GraphRewriter, mask: fx.Node) -> fx.Node:
    """What a mask adds to the scores, finite in rows that it hides wholly."""
    if is_constant(mask):
        value = rewriter.value(mask)
        hidden = torch.where(value, 0.0, HIDDEN) if value.dtype == torch.bool else value.clamp_min(HIDDEN)
        return rewriter.buffer(f"{mask.target}_added", hidden, mask)
    if mask.meta["val"].dtype == torch.bool:
        return _shared(rewriter, _aten.where.Scalar, mask, 0.0, HIDDEN)
    return _shared(rewriter, _aten.clamp_min.default, mask, HIDDEN)


def _rows(rewriter: GraphRewriter, mask: fx.Node) -> fx.Node | None:
    """Whether a row sees anything, (..., rows, 1); None for a constant mask that hides none."""
    if is_constant(mask):
        value = rewriter.value(mask)
        seen = value if value.dtype == torch.bool else value > -math.inf
        if bool(seen.any(-1).all()):
            return None
    if mask.meta["val"].dtype != torch.bool:
        mask = _shared(rewriter, _aten.gt.Scalar, mask, -math.inf)
    return _shared(rewriter, _aten.any.dim, mask, -1, True)


@dataclass(frozen=True)
class _Transposed:
    """The arguments of a transposed convolution; a number for each axis.

    Args:
        tensor: its input.
        weight: its kernel, (inputs, outputs / groups, k, ...).
        bias: its bias, or None.
        strides: of the output.
        paddings: cut off at both ends of an axis.
        extras: positions added at the end of an axis.
        groups: of channels.
        dilations: of the kernel.
    """

    tensor: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    strides: list[int]
    paddings: list[int]
    extras: list[int]
    groups: int
    dilations: list[int]

    @staticmethod
    def of(node: fx.Node) -> "_Transposed":
        defaults: tuple[Any, ...] = (None, 1, 0, 0, 1, 1)
        tensor, weight, *rest = (*operands(node), *defaults[max(0, len(node.args) - 2) :])
        bias, stride, padding, extra, groups, dilation = rest
        axes = tensor.meta["val"].ndim - 2
        strides, paddings, extras, dilations = (_by_axis(value, axes) for value in (stride, padding, extra, dilation))
        return _Transposed(tensor, weight, bias, strides, paddings, extras, groups, dilations)

    @property
    def taps(self) -> list[int]:
        """K = ceil(k / s)."""
        kernel = self.weight.meta["val"].shape[2:]
        return [-(-size // stride) for size, stride in zip(kernel, self.strides, strict=True)]

    @property
    def surplus(self) -> list[int]:
        """Positions that the shuffled image has behind the last that is wanted."""
        sizes = zip(self.strides, self.taps, self.paddings, self.weight.meta["val"].shape[2:], self.extras, strict=True)
        return [s * t + p - k - e for s, t, p, k, e in sizes]

    def fits(self) -> bool:
        """Whether a convolution and a shuffle compute the same."""
        if not is_constant(self.weight) or len(self.weight.users) > 1 or any(d != 1 for d in self.dilations):
            return False
        if (self.bias is not None and not is_constant(self.bias)) or min(self.surplus) < 0:
            return False
        shuffles = len(self.strides) == 2 and len(set(self.strides)) == 1  # pixel_shuffle, which takes any size
        return shuffles or _static(self.tensor)


def _by_axis(value: Any, axes: int) -> list[int]:
    return list(value) * (axes // len(value)) if isinstance(value, (list, tuple)) else [value] * axes


def _convolution(rewriter: GraphRewriter, node: fx.Node) -> fx.Node | None:
    """y[q s + r - p] = sum over m of x[q - (K - 1) + m] V_r[m], V_r[m] = W[(K - 1 - m) s + r], K = ceil(k / s)."""
    layer = _Transposed.of(node)
    if node.kwargs or not layer.fits():
        return None
    whole = _shuffled(rewriter, _phases(rewriter, layer), layer.strides)
    for axis, (first, last) in enumerate(zip(layer.paddings, layer.surplus, strict=True), 2):
        if first or last:
            whole = rewriter.call(_aten.slice.Tensor, whole, axis, first, -last if last else _END)
    return whole


def _phases(rewriter: GraphRewriter, layer: _Transposed) -> fx.Node:
    """The convolution that makes all phases of the output at every position, (N, C x phases, Q, ...)."""
    axes, taps = len(layer.strides), layer.taps
    kernel = _by_phase(rewriter.value(layer.weight), layer.strides, taps, layer.groups)
    weight, bias = rewriter.parameter(str(layer.weight.target), kernel, layer.weight), layer.bias
    if bias is not None:
        repeated = rewriter.value(bias).repeat_interleave(math.prod(layer.strides))
        bias = rewriter.parameter(f"{bias.target}_by_phase", repeated, bias)
    pads = [tap - 1 for tap in taps]
    rest = [1] * axes, pads, [1] * axes, layer.groups
    return rewriter.call(CONVOLUTIONS[axes], layer.tensor, weight, bias, *rest)


def _static(tensor: fx.Node) -> bool:
    return all(isinstance(size, int) for size in tensor.meta["val"].shape[1:])


def _by_phase(weight: Tensor, strides: Sequence[int], taps: Sequence[int], groups: int) -> Tensor:
    """(inputs, outputs / groups, k, ...) -> (outputs x phases, inputs / groups, taps, ...)."""
    axes = len(strides)
    short = [s * t - k for s, t, k in zip(strides, taps, weight.shape[2:], strict=True)]
    padded = torch.nn.functional.pad(weight, [amount for size in reversed(short) for amount in (0, size)])
    inputs, outputs = weight.shape[:2]
    parted = padded.reshape(
        groups, inputs // groups, outputs, *(n for ts in zip(taps, strides, strict=True) for n in ts)
    )
    parted = parted.flip([3 + 2 * axis for axis in range(axes)])
    # (group, input, output, tap, phase, tap, phase) -> (group, output, phases, input, taps)
    order = [0, 2, *(4 + 2 * axis for axis in range(axes)), 1, *(3 + 2 * axis for axis in range(axes))]
    return parted.permute(order).reshape(groups * outputs * math.prod(strides), inputs // groups, *taps).contiguous()


def _shuffled(rewriter: GraphRewriter, wide: fx.Node, strides: Sequence[int]) -> fx.Node:
    """(N, C x phases, Q, ...) -> (N, C, Q s, ...)."""
    axes = len(strides)
    if math.prod(strides) == 1:
        return wide
    if axes == 2 and strides[0] == strides[1]:
        return rewriter.call(_aten.pixel_shuffle.default, wide, strides[0])
    _, channels, *sizes = wide.meta["val"].shape
    channels //= math.prod(strides)
    parted = rewriter.call(_aten.reshape.default, wide, [-1, channels, *strides, *sizes])
    order = [0, 1, *(at for axis in range(axes) for at in (2 + axes + axis, 2 + axis))]
    moved = rewriter.call(_aten.permute.default, parted, order)
    return rewriter.call(_aten.reshape.default, moved, [-1, channels, *map(operator.mul, sizes, strides)])


_Rule = Callable[[GraphRewriter, fx.Node], fx.Node | None]
_RULES: dict[Target, _Rule] = {
    operator.getitem: _item,
    _aten.slice.Tensor: _nothing_cut,
    _aten.silu.default: _silu,
    **dict.fromkeys(AVERAGE_POOLS, _average),
    _aten.addmm.default: _linear,
    _aten.mm.default: _linear,
    _aten.matmul.default: _linear,
    _aten.scaled_dot_product_attention.default: _attention,
    BATCH_NORM: _scaled,
    **dict.fromkeys(_TRANSPOSED, _convolution),
}


@dataclass(frozen=True)
class Decompose(Rewrite):
    """Writes operators that have no integer kernel as operators that have one."""

    tolerance: ClassVar[float] = 1e-4  # float32 sums in another order, through a deep network

    def rewrite(self, program: Program) -> Program:
        rewriter = GraphRewriter(program)
        flattening: dict[Target, _Rule] = {_aten.linear.default: _flat}  # of layers that the first rules made, too
        for rules in (_RULES, flattening):
            for node in rewriter.calls():
                if node.target in rules and node.users:
                    with rewriter.before(node):
                        made = rules[node.target](rewriter, node)
                    if made is not None:
                        rewriter.replace(node, made)  # erased, since attention counts as random, and would stay
        return rewriter.done()
