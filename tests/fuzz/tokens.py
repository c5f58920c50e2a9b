"""Pieces of transformers: each a function that draws a module of vectors (N, L, wide) -> (N, L, wide)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.fuzz.draws import Choices, Made, activation

LONGEST = 64  # tokens that tables of places and masks are made for

Piece = Callable[[Choices, int], nn.Module]  # of draws and the width


def norm(draw: Choices, wide: int) -> nn.Module:
    return draw.one(
        nn.LayerNorm(wide), nn.RMSNorm(wide), nn.LayerNorm(wide, elementwise_affine=False),
        Made(lambda my, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * my.gain, gain=torch.ones(wide)),
    )  # fmt: skip


def residual(draw: Choices, wide: int, inner: nn.Module) -> nn.Module:
    """A piece beside its input, with a norm before or after it."""
    first = draw.chance(50)
    return Made(
        lambda my, x: x + my.inner(my.norm(x)) if first else my.norm(x + my.inner(x)),
        inner=inner, norm=norm(draw, wide),
    )  # fmt: skip


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions, angles (L, wide / 2), of x (N, heads, L, wide)."""
    one, two = x.chunk(2, -1)
    return torch.cat([one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin()], -1)


def _module(draw: Choices, wide: int) -> nn.Module:
    attention = nn.MultiheadAttention(wide, draw.one(1, 2, 4), batch_first=True, bias=draw.chance(60))
    weights = draw.chance(30)
    return Made(lambda my, x: my.attention(x, x, x, need_weights=weights)[0], attention=attention)


def attention(draw: Choices, wide: int) -> nn.Module:
    """Attention of heads that may share keys, with masks, positions and forms of all kinds."""
    heads = draw.one(1, 2, 4)
    shared = draw.one(1, 1, heads) if heads > 1 else 1  # heads that share a key
    size = wide // heads
    form = draw.one("function", "function", "written", "einsum", "linear", "bmm")
    mask = draw.one(None, None, "causal", "bool", "float", "rows", "bias")
    rotary = size % 2 == 0 and draw.chance(25)
    scale = draw.one(None, None, 0.1)
    angles = torch.arange(LONGEST)[:, None] / 10.0 ** torch.arange(max(1, size // 2))

    def added(my: Any, length: int) -> Tensor | None:
        """What is added to scores, or whether they are seen, (L, L) or (heads, L, L)."""
        if mask is None:
            return None
        if mask == "bias":
            return (
                my.bias.index_select(0, my.steps[:length, :length].flatten())
                .reshape(length, length, heads)
                .permute(2, 0, 1)
            )
        if mask == "causal":
            return torch.ones(length, length, dtype=torch.bool).tril()
        seen = my.seen[:length, :length]
        return seen if mask == "bool" else torch.where(seen, 0.0, -1e4 if mask == "rows" else -torch.inf)

    def compute(my: Any, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = _heads(my.q(x), heads), _heads(my.k(x), heads // shared), _heads(my.v(x), heads // shared)
        if rotary:
            q, k = _turned(q, my.angles[:length]), _turned(k, my.angles[:length])
        seen = added(my, length)
        if form == "function":
            causal = mask == "causal"
            options: dict[str, Any] = {"is_causal": causal, "scale": scale, "enable_gqa": shared > 1}
            return my.out(_joined(F.scaled_dot_product_attention(q, k, v, None if causal else seen, **options)))
        if shared > 1:
            k, v = (part.repeat_interleave(shared, 1) for part in (k, v))
        if form == "linear":
            q, k = F.elu(q) + 1, F.elu(k) + 1
            return my.out(_joined(q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1))))
        if form == "bmm":
            scores = torch.baddbmm(torch.zeros(1), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=0.3)
            scores = scores.unflatten(0, (-1, heads))
        elif form == "einsum":
            scores = torch.einsum("nhqd,nhkd->nhqk", q, k) * 0.3
        else:
            scores = (q @ k.transpose(-1, -2)) / size**0.5
        if seen is not None:
            scores = scores.masked_fill(~seen, -1e9) if seen.dtype == torch.bool else scores + seen
        return my.out(_joined(scores.softmax(-1) @ v))

    seen = torch.rand(LONGEST, LONGEST, generator=draw.random) < 0.7
    seen |= torch.eye(LONGEST, dtype=torch.bool)
    places = torch.arange(LONGEST)
    return Made(
        compute, q=nn.Linear(wide, wide, draw.chance(50)), k=nn.Linear(wide, wide // shared, draw.chance(50)),
        v=nn.Linear(wide, wide // shared), out=nn.Linear(wide, wide), seen=seen, angles=angles,
        bias=nn.Parameter(draw.normal(2 * LONGEST, heads)), steps=places[:, None] - places + LONGEST,
    )  # fmt: skip


def _mlp(draw: Choices, wide: int) -> nn.Module:
    act, times = activation(draw), draw.one(1, 2, 4)
    up, gate, down = nn.Linear(wide, times * wide), nn.Linear(wide, times * wide), nn.Linear(times * wide, wide)
    if draw.chance(40):
        return Made(lambda my, x: my.down(act(my.up(x))), up=up, down=down)
    if draw.chance(30):  # both products in one layer
        return Made(lambda my, x: my.down(F.glu(my.up(x))), up=nn.Linear(wide, 2 * times * wide, bias=False), down=down)
    return Made(lambda my, x: my.down(act(my.up(x)) * my.gate(x)), up=up, gate=gate, down=down)


def _shared(draw: Choices, wide: int) -> nn.Module:
    """One matrix in two layers, the second transposed or not."""
    act, turned, one = activation(draw), draw.chance(50), nn.Linear(wide, wide)
    bias = nn.Parameter(draw.normal(wide))
    return Made(
        lambda my, x: F.linear(act(my.one(x)), my.one.weight.T if turned else my.one.weight, my.bias),
        one=one, bias=bias,
    )  # fmt: skip


def _experts(draw: Choices, wide: int) -> nn.Module:
    """A mixture whose experts all compute, as layers of their own or as stacked matrices."""
    many = draw.number(2, 3)
    if draw.chance(50):
        stacked = nn.Parameter(draw.normal(many, wide, wide) / wide**0.5)
        return Made(
            lambda my, x: torch.einsum("nle,nleo->nlo", my.router(x).softmax(-1), torch.einsum(
                "nli,eio->nleo", x, my.stacked)), router=nn.Linear(wide, many), stacked=stacked,
        )  # fmt: skip
    experts = nn.ModuleList(nn.Linear(wide, wide) for _ in range(many))

    def compute(my: Any, x: Tensor) -> Tensor:
        return (torch.stack([each(x) for each in my.experts], -1) * my.router(x).softmax(-1)[..., None, :]).sum(-1)

    return Made(compute, experts=experts, router=nn.Linear(wide, many))


def _recurrent(draw: Choices, wide: int) -> nn.Module:
    both = draw.chance(40)
    kind = draw.one(nn.LSTM, nn.GRU, nn.RNN)
    layer = kind(wide, wide // 2 if both else wide, draw.number(1, 2), bidirectional=both, batch_first=True)
    return Made(lambda my, x: my.out(my.layer(x)[0]), layer=layer, out=nn.Linear(wide, wide))


def _convolved(draw: Choices, wide: int) -> nn.Module:
    """A causal convolution of each channel along the tokens, as in state-space models."""
    act, taps = activation(draw), draw.number(2, 4)
    return Made(
        lambda my, x: my.out(act(my.conv(F.pad(x.transpose(1, 2), (taps - 1, 0))).transpose(1, 2))),
        conv=nn.Conv1d(wide, wide, taps, groups=draw.one(1, wide)), out=nn.Linear(wide, wide),
    )  # fmt: skip


def _mixed(draw: Choices, wide: int) -> nn.Module:
    """What moves tokens: shifts, sums of those before, and halves that change places."""
    way = draw.one(
        lambda x: x.roll(1, 1), lambda x: x.cumsum(1) * 0.3, lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
        lambda x: x.flip(1), lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1], lambda x: x - x.mean(1, keepdim=True),
        lambda x: x.sort(-1).values, lambda x: x[:, :1].expand_as(x), lambda x: F.normalize(x, dim=-1),
        lambda x: torch.gather(x, 2, torch.arange(wide - 1, -1, -1).expand(x.shape)), lambda x: x.half().float(),
        lambda x: x.flatten(1).unflatten(1, x.shape[1:]), lambda x: torch.where(x.mean(-1, keepdim=True) < 100, x, -x),
        lambda x: x.view(-1, x.shape[1], 2, wide // 2).transpose(2, 3).reshape(x.shape),
    )  # fmt: skip
    return Made(lambda my, x: my.two(way(my.one(x))), one=nn.Linear(wide, wide), two=nn.Linear(wide, wide))


def _low_rank(draw: Choices, wide: int) -> nn.Module:
    """Matrices of one row or column, and products of constants, as in LoRA."""
    rank = draw.number(1, 2)
    a, b = (nn.Parameter(draw.normal(*shape)) for shape in ((wide, rank), (rank, wide)))
    if draw.chance(50):
        return Made(lambda my, x: my.base(x) + x @ my.a @ my.b * 0.5, base=nn.Linear(wide, wide), a=a, b=b)
    return Made(lambda my, x: F.linear(x, my.base.weight + my.a @ my.b), base=nn.Linear(wide, wide), a=a, b=b)


def _crossed(draw: Choices, wide: int) -> nn.Module:
    """Attention to vectors that are constants."""
    memory = nn.Parameter(draw.normal(1, 3, wide))
    expand = draw.chance(50)
    return Made(
        lambda my, x: cross(my, x, my.memory.expand(x.shape[0], -1, -1) if expand else my.memory),
        memory=memory, **_cross_parts(wide),
    )  # fmt: skip


def _cross_parts(wide: int) -> dict[str, nn.Module]:
    return {name: nn.Linear(wide, wide) for name in ("q", "k", "v", "out")}


def cross(my: Any, x: Tensor, memory: Tensor) -> Tensor:
    q, k, v = _heads(my.q(x), 2), _heads(my.k(memory), 2), _heads(my.v(memory), 2)
    return my.out(_joined(F.scaled_dot_product_attention(q, k, v)))


def crossing(wide: int) -> nn.Module:
    """Attention to other tokens, which are its second input."""
    return Made(cross, **_cross_parts(wide))


PIECES: tuple[Piece, ...] = (
    _module, attention, attention, attention, attention, _mlp, _mlp, _mlp, _shared, _experts, _recurrent, _convolved,
    _mixed, _mixed, _low_rank, _crossed,
)  # fmt: skip


def blocks(draw: Choices, wide: int, most: int = 4) -> nn.Sequential:
    """A few pieces after each other, most beside their inputs."""
    pieces = [draw.one(*PIECES)(draw, wide) for _ in range(draw.number(1, most))]
    return nn.Sequential(*(residual(draw, wide, piece) if draw.chance(80) else piece for piece in pieces))
