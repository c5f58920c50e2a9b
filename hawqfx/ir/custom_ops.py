"""The operators that hawqfx adds to a graph.

A lowered graph has these operators of fake quantization:

    fake_quantize          static quantizers; export writes it as QuantizeLinear and DequantizeLinear
    fake_quantize_dynamic  the input of a linear layer in the scheme "dynamic" (hawqfx.maths.formats)
    fake_quantize_blocks   the input of a linear layer in the scheme "weight-only"

The gradient of fake_quantize passes unchanged where the value is in range, and is zero where the value is clipped
(Bengio, Leonard, Courville 2013), so that a lowered graph can be trained.

In the graph that is exported, other operators replace them and some of ATen's:

    dequantize             values of constant codes
    dequantize_rows        rows of a table of codes
    blockwise_rows         rows of a table in blocks
    global_average         the average over all pixels; onnxruntime has an integer kernel under this name only
    permute_codes          fake_quantize of a permuted tensor, with the permutation between quantizer and dequantizer
    space_to_depth         an image whose channels are the pixels of a block
    dynamic_linear         a linear layer in the scheme "dynamic"
    blockwise_linear       a linear layer in the scheme "weight-only"
    pack_blocks            codes of 3 bits as these two read them
"""

from typing import Any

import torch
from torch import Tensor, library

from hawqfx.maths import affine


@library.custom_op("hawqfx::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor, zero_point: int, low: int, high: int) -> Tensor:
    """`x` through a static quantizer and back; arguments and result are those of hawqfx.maths.affine.fake_quantize."""
    return affine.fake_quantize(x, scale, zero_point, low, high)


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: int, low: int, high: int) -> Tensor:
    return torch.empty_like(x)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, low, high = inputs
    ctx.save_for_backward(x, scale)
    ctx.range = (low - zero_point, high - zero_point)


def _gradient_in_range(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient for `x`: unchanged where the code is in range, zero where it is clipped."""
    x, scale = ctx.saved_tensors
    low, high = ctx.range
    codes = x.div(affine.along_channels(scale, x)).round_()
    return gradient * ((codes >= low) & (codes <= high)), None, None, None, None


fake_quantize.register_autograd(_gradient_in_range, setup_context=_save_inputs)

FAKE_QUANTIZE = torch.ops.hawqfx.fake_quantize.default


@library.custom_op("hawqfx::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """The values of signed integer codes with zero-point 0.

    Args:
        codes: integers of any shape.
        scale: as in fake_quantize; the values have its type.

    Returns:
        codes * scale, in the shape of the codes.
    """
    values = codes.to(scale.dtype)
    return values * affine.along_channels(scale, values)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


DEQUANTIZE = torch.ops.hawqfx.dequantize.default


@library.custom_op("hawqfx::global_average", mutates_args=())
def global_average(x: Tensor) -> Tensor:
    """The mean over all axes but batch and channel: (N, C, ...) -> (N, C, 1, ...)."""
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


@global_average.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], *[1] * (x.ndim - 2)))


GLOBAL_AVERAGE = torch.ops.hawqfx.global_average.default


@library.custom_op("hawqfx::space_to_depth", mutates_args=())
def space_to_depth(x: Tensor, pads: list[int], block: int) -> Tensor:
    """Blocks of an image as pixels with more channels.

    Args:
        x: (N, C, H, W).
        pads: columns and rows of zeros to add: left, right, top, bottom.  H' and W', the sizes with these zeros, are
            multiples of `block`.
        block: height and width of a block.

    Returns:
        (N, block^2 C, H' / block, W' / block).  Channel (i * block + j) * C + c holds row i, column j of every block
        in channel c of the image.
    """
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


@library.custom_op("hawqfx::permute_codes", mutates_args=())
def permute_codes(x: Tensor, scale: Tensor, zero_point: int, low: int, high: int, order: list[int]) -> Tensor:
    """A tensor whose dimensions are permuted between quantizer and dequantizer.

    Args:
        x: the tensor.
        scale: of all its elements.
        zero_point: the code of zero.
        low: the lowest code.
        high: the highest code.
        order: the dimensions of `x` in those of the result.

    Returns:
        What fake_quantize makes of the permuted tensor.
    """
    return affine.fake_quantize(x.permute(order), scale, zero_point, low, high).clone()


@permute_codes.register_fake
def _(x: Tensor, scale: Tensor, zero_point: int, low: int, high: int, order: list[int]) -> Tensor:
    return torch.empty_like(x.permute(order))


PERMUTE_CODES = torch.ops.hawqfx.permute_codes.default


@library.custom_op("hawqfx::dequantize_rows", mutates_args=())
def dequantize_rows(codes: Tensor, scale: Tensor, rows: Tensor) -> Tensor:
    """The values of some rows of a table of signed integer codes with zero-point 0.

    Args:
        codes: (V, D) integers.
        scale: (V,), the scale of every row.
        rows: numbers of rows, of any shape.

    Returns:
        (*rows.shape, D), in the type of `scale`.
    """
    return codes[rows].to(scale.dtype) * scale[rows].unsqueeze(-1)


@dequantize_rows.register_fake
def _(codes: Tensor, scale: Tensor, rows: Tensor) -> Tensor:
    return scale.new_empty((*rows.shape, codes.shape[1]))


DEQUANTIZE_ROWS = torch.ops.hawqfx.dequantize_rows.default


@library.custom_op("hawqfx::fake_quantize_dynamic", mutates_args=())
def fake_quantize_dynamic(x: Tensor) -> Tensor:
    """`x` through an 8-bit quantizer over the range of its values; see hawqfx.maths.affine.fake_quantize_dynamic."""
    return affine.fake_quantize_dynamic(x)


@library.custom_op("hawqfx::fake_quantize_blocks", mutates_args=())
def fake_quantize_blocks(x: Tensor, block: int) -> Tensor:
    """Rows (..., K) through an 8-bit quantizer for every block; see hawqfx.maths.affine.fake_quantize_blocks."""
    return affine.fake_quantize_blocks(x, block)


# Gradients pass unchanged: the range covers all values, and no value is clipped.
fake_quantize_dynamic.register_fake(torch.empty_like)
fake_quantize_dynamic.register_autograd(lambda ctx, gradient: gradient)
fake_quantize_blocks.register_fake(lambda x, block: torch.empty_like(x))
fake_quantize_blocks.register_autograd(lambda ctx, gradient: (gradient, None))

FAKE_QUANTIZE_DYNAMIC = torch.ops.hawqfx.fake_quantize_dynamic.default
FAKE_QUANTIZE_BLOCKS = torch.ops.hawqfx.fake_quantize_blocks.default


@library.custom_op("hawqfx::dynamic_linear", mutates_args=())
def dynamic_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """A linear layer without bias in the scheme "dynamic".

    Args:
        x: (..., K); it goes through fake_quantize_dynamic.
        codes: (N, K), signed integer codes of the weight.
        scale: (N,), per-channel scales of the weight.

    Returns:
        (..., N).
    """
    return affine.fake_quantize_dynamic(x) @ (codes.to(scale.dtype) * scale[:, None]).T


@library.custom_op("hawqfx::pack_blocks", mutates_args=())
def pack_blocks(codes: Tensor, bits: int) -> Tensor:
    """Codes as hawqfx.maths.packing.pack_blocks packs them.

    Args:
        codes: int8 (N, blocks, block), of at most so many bits.
        bits: of a packed code: 2, 4 or 8.

    Returns:
        uint8 (N, blocks, bits * block / 8).
    """
    unsigned = (codes.to(torch.int16) + (1 << (bits - 1))).unflatten(2, (-1, 8 // bits))
    return (unsigned << torch.arange(0, 8, bits, device=codes.device)).sum(-1).to(torch.uint8)


def _unpack_blocks(codes: Tensor, scale: Tensor, columns: int, bits: int) -> Tensor:
    """The values (N, K) of packed codes (N, blocks, bytes) of so many bits, with scales (N, blocks, 1)."""
    parts = [(codes >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    signed = torch.stack(parts, -1).flatten(2).to(torch.int16) - (1 << (bits - 1))
    return (signed * scale).flatten(1)[:, :columns]


@library.custom_op("hawqfx::blockwise_linear", mutates_args=())
def blockwise_linear(x: Tensor, codes: Tensor, scale: Tensor, columns: int, bits: int) -> Tensor:
    """A linear layer without bias in the scheme "weight-only".

    Args:
        x: (..., K); it goes through fake_quantize_blocks.
        codes: of the weight, uint8 (N, blocks, bytes), as hawqfx.maths.packing.pack_blocks packs them.
        scale: (N * blocks,), the scale of every block, in bfloat16.
        columns: K, which leaves out the zeros that fill up the last block.
        bits: in which the kernel reads a code: 2, 4 or 8.

    Returns:
        (..., N).
    """
    weight = _unpack_blocks(codes, scale.float().reshape(*codes.shape[:2], 1), columns, bits)
    return affine.fake_quantize_blocks(x, codes.shape[2] * 8 // bits) @ weight.T


@library.custom_op("hawqfx::blockwise_rows", mutates_args=())
def blockwise_rows(codes: Tensor, scale: Tensor, rows: Tensor, columns: int, bits: int) -> Tensor:
    """The values of some rows of a table in blocks.

    Args:
        codes: of the table, as in blockwise_linear, which may multiply by it too.
        scale: likewise.
        rows: numbers of rows, of any shape.
        columns: K, likewise.
        bits: likewise.

    Returns:
        (*rows.shape, K) in float32.
    """
    flat, steps = rows.flatten(), scale.float().reshape(*codes.shape[:2], 1)
    return _unpack_blocks(codes[flat], steps[flat], columns, bits).reshape(*rows.shape, columns)


@dynamic_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@pack_blocks.register_fake
def _(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty((*codes.shape[:2], codes.shape[2] * bits // 8), dtype=torch.uint8)


@blockwise_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, columns: int, bits: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@blockwise_rows.register_fake
def _(codes: Tensor, scale: Tensor, rows: Tensor, columns: int, bits: int) -> Tensor:
    return scale.new_empty((*rows.shape, columns), dtype=torch.float32)


DYNAMIC_LINEAR = torch.ops.hawqfx.dynamic_linear.default
PACK_BLOCKS = torch.ops.hawqfx.pack_blocks.default
BLOCKWISE_LINEAR = torch.ops.hawqfx.blockwise_linear.default
BLOCKWISE_ROWS = torch.ops.hawqfx.blockwise_rows.default
