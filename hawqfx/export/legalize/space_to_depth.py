"""Let a strided convolution of an image read blocks of pixels.

A convolution with stride s of an image with few channels is a convolution with stride 1 of an image that has the pixels
of every block of s x s as its channels, with the kernel laid out alike: the same products.  onnxruntime copies the
pixels that a position reads by rows of channels, and an image of few channels makes many short copies.  The image is
parted into blocks before it is quantized, since onnxruntime 1.24 parts only floats.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from hawqfx.export.legalize.tolerances import FLIPPED_CODES
from hawqfx.ir.custom_ops import DEQUANTIZE, FAKE_QUANTIZE, SPACE_TO_DEPTH
from hawqfx.ir.facts import StoredBits
from hawqfx.ir.operators import PADS, is_data_movement, operands
from hawqfx.ir.program import Program
from hawqfx.ir.rewriter import GraphRewriter
from hawqfx.ir.sites import ActivationSite
from hawqfx.pass_manager.base import Kind, Rewrite

OF_BLOCKS = "_of_blocks"  # behind the name of a scale: of an image whose blocks are channels
MOST_CHANNELS = 64  # of an image whose blocks are channels; with more, the copies are long enough as they are

_aten = torch.ops.aten


@dataclass(frozen=True)
class SpaceToDepth(Rewrite):
    """Lets strided convolutions of images read blocks of pixels."""

    tolerance: ClassVar[float] = FLIPPED_CODES
    needs: ClassVar[tuple[Kind, ...]] = (StoredBits,)

    def rewrite(self, program: Program) -> Program:
        rewriter = GraphRewriter(program)
        for node in rewriter.calls(_aten.conv2d.default):
            weight = operands(node)[1]
            if weight.target is not DEQUANTIZE:
                continue
            blocks = _blocks(node, rewriter.value(operands(weight)[0]).shape)
            if blocks is not None:
                _read_blocks(rewriter, node, blocks)
        return _without_lost_pads(rewriter.done())


@dataclass(frozen=True)
class _Blocks:
    """An image in blocks of pixels, as a convolution reads it.

    Args:
        image: the quantized input of the graph.
        stride: the sides of a block.
        pads: zeros around the image: left, right, top, bottom.
        kernel: the shape of the kernel, (O, C, k, k).
        taps: the blocks that the kernel covers, by axis.
    """

    image: fx.Node
    stride: int
    pads: list[int]
    kernel: Sequence[int]
    taps: list[int]


def _blocks(node: fx.Node, kernel: Sequence[int]) -> _Blocks | None:
    """The blocks of a convolution's image, if the image is an input of the graph, and the convolution gains."""
    arguments: tuple[Any, ...] = (*operands(node), *(None, 1, 0, 1, 1)[len(node.args) - 2 :])
    image, _, _, strides, padding, dilation, groups = arguments
    around = [0, 0, 0, 0]
    if image.target in PADS and is_data_movement(image):
        around = [*image.args[1], 0, 0][:4] if len(image.args[1]) <= 4 else []
        image = image.args[0]
    if image.target is not FAKE_QUANTIZE or image.args[0].op != "placeholder":
        return None
    stride, other = _pair(strides)
    channels, *sizes = image.meta["val"].shape[1:]
    if stride != other or {*_pair(dilation)} != {1} or groups != 1 or min(around, default=-1) < 0:
        return None
    if stride == 1 or stride**2 * channels > MOST_CHANNELS or not all(isinstance(size, int) for size in sizes):
        return None
    first = [around[2] + _pair(padding)[0], around[0] + _pair(padding)[1]]
    taps = [-(-size // stride) for size in kernel[2:]]
    pads = _pads(node, first, taps, stride, sizes)
    return _Blocks(image, stride, pads, kernel, taps) if min(pads) >= 0 else None


def _pads(node: fx.Node, first: Sequence[int], taps: Sequence[int], stride: int, sizes: Sequence[int]) -> list[int]:
    """Zeros left, right, top and bottom, so that blocks start where the first position reads and end with the last.

    Args:
        node: the convolution.
        first: zeros before the image, by axis.
        taps: blocks that the kernel covers, by axis.
        stride: the sides of a block.
        sizes: of the image.
    """
    pads: list[int] = []
    for axis in (1, 0):
        positions = node.meta["val"].shape[2 + axis]
        pads += [first[axis], stride * (positions + taps[axis] - 1) - sizes[axis] - first[axis]]
    return pads


def _pair(value: Any) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * (2 // len(values))


def _read_blocks(rewriter: GraphRewriter, node: fx.Node, blocks: _Blocks) -> None:
    """The convolution reads the image in blocks, with stride 1."""
    weight, *bias = operands(node)[1:3]
    codes, scale = operands(weight)
    image, image_scale, *grid = operands(blocks.image)
    with rewriter.before(node):
        parted = rewriter.call(SPACE_TO_DEPTH, image, blocks.pads, blocks.stride)
        own_scale = rewriter.buffer(f"{image_scale.target}{OF_BLOCKS}", rewriter.value(image_scale).clone())
        parted = rewriter.call(FAKE_QUANTIZE, parted, own_scale, *grid, like=parted)
        kernel = rewriter.call(DEQUANTIZE, _kernel_of_blocks(rewriter, codes, blocks), scale)
    node.args = (parted, kernel, *bias)


def _kernel_of_blocks(rewriter: GraphRewriter, codes: fx.Node, blocks: _Blocks) -> fx.Node:
    """Codes (O, C, k, k) -> (O, stride^2 C, taps, taps); onnxruntime does that once, when it loads the file."""
    (outputs, channels, *sizes), stride, (rows, columns) = blocks.kernel, blocks.stride, blocks.taps
    more = [amount for axis in (1, 0) for amount in (0, stride * blocks.taps[axis] - sizes[axis])]
    padded = rewriter.call(_aten.constant_pad_nd.default, codes, more)
    parted = rewriter.call(_aten.view.default, padded, [outputs, channels, rows, stride, columns, stride])
    moved = rewriter.call(_aten.permute.default, parted, [0, 3, 5, 1, 2, 4])
    return rewriter.call(_aten.reshape.default, moved, [outputs, stride**2 * channels, rows, columns])


def _without_lost_pads(program: Program) -> Program:
    """Sites forget the paddings that SpaceToDepth does itself."""
    names = {node.name for node in program.graph.graph.nodes}
    sites = [
        replace(site, data_movement=tuple(name for name in site.data_movement if name in names))
        if isinstance(site, ActivationSite) else site
        for site in program.sites
    ]  # fmt: skip
    return replace(program, sites=tuple(sites))
