"""The operators that hawqfx adds to a graph.

fake_quantize stands for a QuantizeLinear and DequantizeLinear pair, which export writes.  Its gradient passes unchanged
where the value was in range and is zero where it was clipped (Bengio, Leonard, Courville 2013), so that a lowered
graph can be trained.  dequantize takes its place where the codes are constants, in the graph that is exported; there
dequantize_rows gathers rows of a table of codes, global_average is an average over all pixels, for which onnxruntime
has an integer kernel under that name only, and phases makes the pixels of every block of an image its channels.

fake_quantize_dynamic and fake_quantize_blocks are what the schemes "dynamic" and "weight-only" do to what a linear
layer reads (hawqfx.maths.formats); dynamic_linear and blockwise_linear take the places of such layers in the graph that
is exported.
"""

from typing import Any

import torch
from torch import Tensor

from hawqfx.maths import affine


@torch.library.custom_op("hawqfx::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor, zero_point: int, low: int, high: int) -> Tensor:
    return affine.fake_quantize(x, scale, zero_point, low, high)


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: int, low: int, high: int) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, low, high = inputs
    ctx.save_for_backward(x, scale)
    ctx.range = (low - zero_point, high - zero_point)


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, scale = ctx.saved_tensors
    low, high = ctx.range
    codes = x.div(affine.along_channels(scale, x)).round_()
    return gradient * ((codes >= low) & (codes <= high)), None, None, None, None


fake_quantize.register_autograd(_straight_through, setup_context=_keep)

FAKE_QUANTIZE = torch.ops.hawqfx.fake_quantize.default


@torch.library.custom_op("hawqfx::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Values of signed integer codes with zero-point 0; `scale` as in fake_quantize."""
    values = codes.to(scale.dtype)
    return values * affine.along_channels(scale, values)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


DEQUANTIZE = torch.ops.hawqfx.dequantize.default


@torch.library.custom_op("hawqfx::global_average", mutates_args=())
def global_average(x: Tensor) -> Tensor:
    """(N, C, ...) -> (N, C, 1, ...)."""
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


@global_average.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], *[1] * (x.ndim - 2)))


GLOBAL_AVERAGE = torch.ops.hawqfx.global_average.default


@torch.library.custom_op("hawqfx::space_to_depth", mutates_args=())
def space_to_depth(x: Tensor, pads: list[int], block: int) -> Tensor:
    """(N, C, H, W) -> (N, block^2 C, H' / block, W' / block), what is at one place of every block being C channels side
    by side; H', W' are with zeros around, `pads` being left, right, top, bottom."""
    padded = torch.nn.functional.pad(x, pads)
    rows, columns = (size // block for size in padded.shape[2:])
    parted = padded.reshape(*padded.shape[:2], rows, block, columns, block)
    return parted.permute(0, 3, 5, 1, 2, 4).reshape(len(x), -1, rows, columns).clone()


@space_to_depth.register_fake
def _(x: Tensor, pads: list[int], block: int) -> Tensor:
    left, right, top, bottom = pads
    size = (x.shape[2] + top + bottom) // block, (x.shape[3] + left + right) // block
    return x.new_empty((x.shape[0], block * block * x.shape[1], *size))


SPACE_TO_DEPTH = torch.ops.hawqfx.space_to_depth.default


@torch.library.custom_op("hawqfx::dequantize_rows", mutates_args=())
def dequantize_rows(codes: Tensor, scale: Tensor, rows: Tensor) -> Tensor:
    """Values of the rows of codes (V, D) with a scale (V,) each that `rows`, of any shape, asks for."""
    return codes[rows].to(scale.dtype) * scale[rows].unsqueeze(-1)


@dequantize_rows.register_fake
def _(codes: Tensor, scale: Tensor, rows: Tensor) -> Tensor:
    return scale.new_empty((*rows.shape, codes.shape[1]))


DEQUANTIZE_ROWS = torch.ops.hawqfx.dequantize_rows.default


@torch.library.custom_op("hawqfx::fake_quantize_dynamic", mutates_args=())
def fake_quantize_dynamic(x: Tensor) -> Tensor:
    return affine.fake_quantize_dynamic(x)


@torch.library.custom_op("hawqfx::fake_quantize_blocks", mutates_args=())
def fake_quantize_blocks(x: Tensor) -> Tensor:
    return affine.fake_quantize_blocks(x)


def _pass(ctx: Any, gradient: Tensor) -> Tensor:
    return gradient  # nothing is clipped


for _operator in (fake_quantize_dynamic, fake_quantize_blocks):
    _operator.register_fake(torch.empty_like)
    _operator.register_autograd(_pass)

FAKE_QUANTIZE_DYNAMIC = torch.ops.hawqfx.fake_quantize_dynamic.default
FAKE_QUANTIZE_BLOCKS = torch.ops.hawqfx.fake_quantize_blocks.default


@torch.library.custom_op("hawqfx::dynamic_linear", mutates_args=())
def dynamic_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x (..., K) through fake_quantize_dynamic, times weights of codes (N, K) with scales (N,) -> (..., N)."""
    return affine.fake_quantize_dynamic(x) @ (codes.to(scale.dtype) * scale[:, None]).T


@torch.library.custom_op("hawqfx::blockwise_linear", mutates_args=())
def blockwise_linear(x: Tensor, packed: Tensor, scale: Tensor, columns: int) -> Tensor:
    """x (..., K) through fake_quantize_blocks, times weights of packed codes (N, blocks, bytes) with scales
    (N * blocks,) -> (..., N); see hawqfx.maths.packing.pack_blocks."""
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(2).to(scale.dtype) - 8
    weight = (codes * scale.reshape(*codes.shape[:2], 1)).flatten(1)[:, :columns]
    return affine.fake_quantize_blocks(x) @ weight.T


@dynamic_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@blockwise_linear.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, columns: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


DYNAMIC_LINEAR = torch.ops.hawqfx.dynamic_linear.default
BLOCKWISE_LINEAR = torch.ops.hawqfx.blockwise_linear.default
