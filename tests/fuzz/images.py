"""Pieces of convolutional networks: each a function that draws a module of images (N, channels, ...) -> (N, wide, ...),
and `wide`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.fuzz.draws import Choices, Made, activation

CONVOLUTIONS: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: Any = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS: Any = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORMS: Any = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
SMALLEST, LARGEST = 4, 24  # pixels along an axis, below which nothing is pooled, and above which nothing grows

Piece = Callable[[Choices, int, int], tuple[nn.Module, int]]  # of draws, channels, and the number of spatial axes


def conv(draw: Choices, channels: int, wide: int, dims: int, *, keeps: bool = True) -> nn.Module:
    """A convolution with a random geometry, perhaps a norm, and an activation.

    Args:
        draw: the choices.
        channels: of its input.
        wide: channels of its output.
        dims: spatial axes.
        keeps: whether sizes stay.
    """
    kernel = draw.one(1, 2, 3, 3, 5)
    shared = [number for number in range(1, channels + 1) if channels % number == 0 and wide % number == 0]
    groups = draw.one(1, 1, 1, shared[-1], draw.one(*shared))
    dilation = draw.one(1, 1, 2) if kernel > 1 else 1
    stride = 1 if keeps else draw.one(1, 2, 3)
    padding: Any = "same" if keeps or (stride == 1 and draw.chance(50)) else draw.number(0, kernel // 2)
    mode: Any = draw.one("zeros", "zeros", "zeros", "reflect", "replicate", "circular")
    if (dims == 3 and mode == "reflect") or kernel > 3 or dilation > 1:  # there is none, or images may be too small
        mode = "zeros"
    layer = CONVOLUTIONS[dims](
        channels, wide, kernel, stride, padding, dilation, groups, bias=draw.chance(70), padding_mode=mode
    )
    if draw.chance(5):
        layer = parametrizations.weight_norm(layer)
    norm = draw.one(
        *[BATCH_NORMS[dims](wide)] * 6, nn.Identity(), nn.Identity(), nn.GroupNorm(1, wide), nn.PReLU(wide),
        INSTANCE_NORMS[dims](wide, affine=True), BATCH_NORMS[dims](wide, affine=False),
    )  # fmt: skip
    act = activation(draw)
    return Made(lambda my, x: act(my.norm(my.conv(x))), conv=layer, norm=norm)


def _plain(draw: Choices, channels: int, dims: int) -> tuple[nn.Module, int]:
    wide, keeps = draw.one(channels, channels, 1, 5, 8), draw.chance(50)
    one = conv(draw, channels, wide, dims)
    two = conv(draw, wide, wide, dims, keeps=keeps)
    return Made(lambda my, x: my.two(my.one(x)) if min(x.shape[2:]) >= 12 else my.one(x), one=one, two=two), wide


def _residual(draw: Choices, channels: int, dims: int) -> tuple[nn.Module, int]:
    act = activation(draw)
    join = draw.one(
        lambda x, y: x + y, lambda x, y: act(x + y), lambda x, y: x - y, lambda x, y: y.add_(x), torch.maximum,
        lambda x, y: torch.add(x, y, alpha=0.5), lambda x, y: x * y, lambda x, y: (x + y).mul_(0.5).relu_(),
        lambda x, y: torch.lerp(x, y, 0.3), lambda x, y: torch.addcmul(x, y, x, value=0.1),
        lambda x, y: torch.stack([x, y]).mean(0), lambda x, y: x / (1 + y.abs()),
    )  # fmt: skip
    return Made(lambda my, x: join(x, my.conv(x)), conv=conv(draw, channels, channels, dims)), channels


def _concat(draw: Choices, channels: int, dims: int) -> tuple[nn.Module, int]:
    many = draw.number(1, 3)
    branches = nn.ModuleList(conv(draw, channels, draw.one(1, 3, channels), dims) for _ in range(many))
    wide = int(sum(branch(torch.zeros(1, channels, *[8] * dims)).shape[1] for branch in branches.eval()))
    keeps = draw.chance(60)
    return Made(
        lambda my, x: torch.cat([x] * keeps + [branch(x) for branch in my.branches], 1), branches=branches
    ), wide + channels * keeps


def _gate(draw: Choices, channels: int, dims: int) -> tuple[nn.Module, int]:
    small = max(1, channels // 4)
    gate = draw.one(torch.sigmoid, F.hardsigmoid, lambda x: x.softmax(1))
    squeeze = draw.one(lambda x: x.flatten(2).mean(2), lambda x: x.amax(list(range(2, x.ndim))))
    return Made(
        lambda my, x: x * gate(my.up(F.relu(my.down(squeeze(my.conv(x)))))).reshape(-1, channels, *[1] * dims),
        conv=conv(draw, channels, channels, dims), down=nn.Linear(channels, small), up=nn.Linear(small, channels),
    ), channels  # fmt: skip


def _shared(draw: Choices, channels: int, dims: int) -> tuple[nn.Module, int]:
    return Made(lambda my, x: my.conv(my.conv(x)), conv=conv(draw, channels, channels, dims)), channels


def _split(draw: Choices, channels: int, dims: int) -> tuple[nn.Module, int]:
    if channels % 2:
        return _residual(draw, channels, dims)
    half = channels // 2
    part = draw.one(lambda x: x.chunk(2, 1), lambda x: x.split([half, half], 1), lambda x: (x[:, ::2], x[:, 1::2]))

    def compute(my: Any, x: Tensor) -> Tensor:
        one, two = part(x)
        joined = torch.cat([one, my.conv(two)], 1)
        return F.channel_shuffle(joined, 2) if dims == 2 else joined

    return Made(compute, conv=conv(draw, half, half, dims)), channels


def _pool(draw: Choices, channels: int, dims: int) -> tuple[nn.Module, int]:
    ceil, pad, stride = draw.chance(40), draw.chance(50), draw.one(1, 2, 3)
    names = [f"max_pool{dims}d", f"avg_pool{dims}d", f"adaptive_avg_pool{dims}d", "resized"]
    name = draw.one(*names[:3], *names[3:] * (dims == 2))

    def pooled(x: Tensor) -> Tensor:
        if min(x.shape[2:]) < SMALLEST:
            return x
        if name.startswith("adaptive"):
            return getattr(F, name)(x, [(size + 1) // 2 for size in x.shape[2:]])
        if name == "resized":
            return F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
        return getattr(F, name)(x, 3, stride, int(pad), ceil_mode=ceil)

    return Made(lambda my, x: pooled(my.conv(x)), conv=conv(draw, channels, channels, dims)), channels


def _up(draw: Choices, channels: int, dims: int) -> tuple[nn.Module, int]:
    modes = {1: ("nearest", "linear"), 2: ("nearest", "bilinear", "bicubic"), 3: ("nearest", "trilinear")}
    mode = draw.one(*modes[dims], "nearest", "repeated")
    if mode == "repeated":
        return Made(
            lambda my, x: my.conv(x.repeat_interleave(2, -1) if max(x.shape[2:]) < LARGEST else x),
            conv=conv(draw, channels, channels, dims),
        ), channels

    def compute(my: Any, x: Tensor) -> Tensor:
        x = my.conv(x)
        return F.interpolate(x, scale_factor=2, mode=mode) if max(x.shape[2:]) < LARGEST else x

    return Made(compute, conv=conv(draw, channels, channels, dims)), channels


def _transposed(draw: Choices, channels: int, dims: int) -> tuple[nn.Module, int]:
    """A transposed convolution; its output is cut to a size that does not grow without end."""
    kernel, stride = draw.one(1, 2, 3, 4, 5), draw.one(1, 2, 2, 3)
    wide = draw.one(channels, 2 * channels, max(1, channels // 2))
    groups = draw.one(1, 1, channels if wide % channels == 0 else 1)
    layer = TRANSPOSED[dims](
        channels, wide, kernel, stride, draw.number(0, min(2, kernel // 2)), draw.number(0, stride - 1), groups,
        draw.chance(70), draw.one(1, 1, 1, 2),
    )  # fmt: skip
    act = activation(draw)
    norm = BATCH_NORMS[dims](wide) if draw.chance(50) else nn.Identity()

    def compute(my: Any, x: Tensor) -> Tensor:
        grown = act(my.norm(my.layer(x)))
        for axis in range(2, grown.ndim):
            if grown.shape[axis] > LARGEST:
                grown = grown.narrow(axis, 1, LARGEST)
        return grown

    return Made(compute, layer=layer, norm=norm), wide


def _moved(draw: Choices, channels: int, dims: int) -> tuple[nn.Module, int]:
    """Rolls, flips, pads, slices, shuffles and what else moves values about, before a convolution."""
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.roll(1, -1), lambda x: x.roll((1, -2), (1, 2)), lambda x: x.flip(-1), lambda x: F.pad(x, (1, 2)),
        lambda x: F.pad(x, (1, 0), value=0.5), lambda x: x[..., 1:] if x.shape[-1] > SMALLEST else x,
        lambda x: x[..., ::2] if x.shape[-1] > SMALLEST else x, lambda x: x.transpose(-1, 1).transpose(1, -1),
        lambda x: x.index_select(1, torch.arange(x.shape[1] - 1, -1, -1)), lambda x: x.unsqueeze(1).squeeze(1),
        lambda x: x.flatten(2).unflatten(2, x.shape[2:]), lambda x: x.repeat(*[1] * (x.ndim - 1), 2)[..., 1:-1],
        lambda x: torch.cat([x, x.new_zeros(x.shape[0], *x.shape[1:-1], 1)], -1), lambda x: torch.cat([x, x], -1),
        lambda x: x.narrow(-1, 0, x.shape[-1] - 1) if x.shape[-1] > SMALLEST else x,
        lambda x: torch.stack(x.unbind(1), 1), lambda x: x + x.unbind(-1)[0][..., None],
        lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    ]  # fmt: skip
    if dims == 2:
        ways += [
            lambda x: F.pixel_unshuffle(F.pixel_shuffle(x.repeat_interleave(4, 1), 2), 2)[:, :channels],
            lambda x: F.pad(x, (1, 1, 1, 1), "reflect"), lambda x: x.contiguous(memory_format=torch.channels_last),
            lambda x: F.pad(x, (0, 1, 2, 0), "replicate"), lambda x: x.mT, lambda x: x.rot90(1, [2, 3]),
        ]  # fmt: skip
    way = draw.one(*ways)
    act = activation(draw)
    first = draw.chance(50)
    return Made(
        lambda my, x: my.conv(way(act(x))) if first else way(my.conv(x)), conv=conv(draw, channels, channels, dims)
    ), channels


def _channels_last(draw: Choices, channels: int, dims: int) -> tuple[nn.Module, int]:
    """As in ConvNeXt: norm and linear layers over the last axis."""
    act = activation(draw)
    gamma = nn.Parameter(draw.normal(channels))
    return Made(
        lambda my, x: x + (my.two(act(my.one(my.norm(my.conv(x).movedim(1, -1))))) * my.gamma).movedim(-1, 1),
        conv=conv(draw, channels, channels, dims), norm=nn.LayerNorm(channels), one=nn.Linear(channels, 2 * channels),
        two=nn.Linear(2 * channels, channels), gamma=gamma,
    ), channels  # fmt: skip


def _non_local(draw: Choices, channels: int, dims: int) -> tuple[nn.Module, int]:
    """Products of two activations: each pixel, or each channel, with every other."""
    by_channel = draw.chance(40)

    def compute(my: Any, x: Tensor) -> Tensor:
        q, k, v = (part(x).flatten(2) for part in (my.q, my.k, my.v))
        if by_channel:
            mixed = (torch.bmm(q, k.mT) / q.shape[-1]).softmax(-1) @ v
        else:
            mixed = torch.einsum("ncl,nlm->ncm", v, torch.einsum("ncl,ncm->nlm", q, k).mul(0.3).softmax(1))
        return x + mixed.unflatten(2, x.shape[2:])

    parts = {name: conv(draw, channels, channels, dims) for name in "qkv"}
    return Made(compute, **parts), channels


def _constant(draw: Choices, channels: int, dims: int) -> tuple[nn.Module, int]:
    """A layer on a constant, constants that are added or multiplied, and a product with a constant matrix."""
    one, matrix = draw.normal(1, channels, *[1] * dims), draw.normal(channels, channels) / channels**0.5
    kind = draw.one("layer", "einsum", "matmul", "film", "maximum")

    def compute(my: Any, x: Tensor) -> Tensor:
        y = my.conv(x)
        if kind == "layer":
            return y + my.other(my.one)
        if kind == "einsum":
            return torch.einsum("nc...,cd->nd...", y, my.matrix)
        if kind == "matmul":
            return (my.matrix @ y.flatten(2)).unflatten(2, y.shape[2:])
        return y * my.one + 0.5 if kind == "film" else torch.maximum(y, my.one)

    return Made(
        compute, conv=conv(draw, channels, channels, dims), other=CONVOLUTIONS[dims](channels, channels, 1),
        one=nn.Parameter(one) if draw.chance(50) else one, matrix=nn.Parameter(matrix),
    ), channels  # fmt: skip


def _dead(draw: Choices, channels: int, dims: int) -> tuple[nn.Module, int]:
    """A branch that nobody reads, a product with zero, and a write into a copy."""
    kind = draw.one("unread", "zero", "written")

    def compute(my: Any, x: Tensor) -> Tensor:
        other = my.other(x)
        y = my.conv(x)
        if kind == "zero":
            return y + other * 0
        if kind == "written":
            y = y.clone()
            y[:, :1] = 0.25
            y[..., 0] += 1
        return y

    parts = {name: conv(draw, channels, channels, dims) for name in ("conv", "other")}
    return Made(compute, **parts), channels


def _narrow(draw: Choices, channels: int, dims: int) -> tuple[nn.Module, int]:
    """A bottleneck of one channel; a sum over channels that keeps one."""
    return Made(
        lambda my, x: x * my.two(my.one(x)).mean(1, keepdim=True) + my.one(x),
        one=conv(draw, channels, 1, dims), two=conv(draw, 1, channels, dims),
    ), channels  # fmt: skip


def _ranges(draw: Choices, channels: int, dims: int) -> tuple[nn.Module, int]:
    """Tensors of tiny or huge range between layers."""
    size = draw.one(1e-6, 1e-3, 1e3, 1e5)
    return Made(
        lambda my, x: x + my.two(my.one(x) * size) / size,
        one=conv(draw, channels, channels, dims), two=CONVOLUTIONS[dims](channels, channels, 1, bias=draw.chance(50)),
    ), channels  # fmt: skip


def _skipped(draw: Choices, channels: int, dims: int) -> tuple[nn.Module, int]:
    """Down, up by a transposed convolution, and a concatenation with what was there, as in a U-Net."""
    down = CONVOLUTIONS[dims](channels, channels, 2, 2)
    up = TRANSPOSED[dims](channels, channels, 2, 2)

    def compute(my: Any, x: Tensor) -> Tensor:
        x = F.pad(x, [amount for size in reversed(x.shape[2:]) for amount in (0, size % 2)])
        return torch.cat([x, F.relu(my.up(F.relu(my.inner(my.down(x)))))], 1)

    return Made(compute, down=down, up=up, inner=conv(draw, channels, channels, dims)), 2 * channels


def _glu(draw: Choices, channels: int, dims: int) -> tuple[nn.Module, int]:
    return Made(lambda my, x: F.glu(my.conv(x), 1), conv=conv(draw, channels, 2 * channels, dims)), channels


PIECES: tuple[Piece, ...] = (
    _plain, _residual, _residual, _concat, _gate, _shared, _split, _pool, _pool, _up, _transposed, _transposed, _moved,
    _moved, _channels_last, _non_local, _constant, _dead, _narrow, _ranges, _skipped, _glu,
)  # fmt: skip
