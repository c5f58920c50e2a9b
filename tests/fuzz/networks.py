"""Random networks of the operators that hawqfx knows, each made from its seed alone.

Three families: "convolutional" (odd sizes, strides, dilations, groups, padding modes, pools, batch-norms, branches,
concatenations, shared layers), "transformer" (embeddings or projections, attention in its forms, norms, gated and plain
MLPs) and "mixed" (a convolutional stem, tokens, attention, several inputs or outputs, constants, views).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Family = Literal["convolutional", "transformer", "mixed"]
FAMILIES: tuple[Family, ...] = ("convolutional", "transformer", "mixed")


class Choices:
    """Draws from a seeded generator."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)

    def number(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.random))

    def one(self, *values: Any) -> Any:
        return values[self.number(0, len(values) - 1)]

    def chance(self, percent: int) -> bool:
        return self.number(1, 100) <= percent


@dataclass(frozen=True)
class Case:
    """A network and its inputs.

    Args:
        model: in eval mode.
        batches: of inputs, as compile() takes them.
    """

    model: nn.Module
    batches: list[Any]


def _activation(draw: Choices) -> Callable[[Tensor], Tensor]:
    return draw.one(
        F.relu, F.relu6, F.gelu, F.silu, F.leaky_relu, F.hardswish, torch.sigmoid, torch.tanh, F.elu, nn.Identity(),
        lambda x: x.clamp(0, 4), lambda x: x.clamp_min(0), F.mish, F.softplus,
    )  # fmt: skip


class _Conv(nn.Module):
    """A convolution with a random geometry, perhaps a batch-norm, and an activation."""

    def __init__(self, draw: Choices, channels: int, wide: int, dims: int, keeps: bool) -> None:
        super().__init__()
        kernel = draw.one(1, 2, 3, 3, 5)
        groups = draw.one(1, 1, 1, channels if wide % channels == 0 else 1)
        dilation = draw.one(1, 1, 2) if kernel > 1 else 1
        stride = 1 if keeps else draw.one(1, 2, 3)
        same = keeps or draw.chance(50)
        padding: Any = "same" if same and stride == 1 else draw.number(0, kernel // 2)
        mode: Any = draw.one("zeros", "zeros", "zeros", "reflect", "replicate", "circular") if dims == 2 else "zeros"
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.conv = kind(
            channels, wide, kernel, stride, padding, dilation, groups, bias=draw.chance(70), padding_mode=mode
        )
        norms = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
        self.norm = norms[dims](wide) if draw.chance(60) else draw.one(nn.Identity(), nn.GroupNorm(1, wide))
        self.activation = _activation(draw)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)))


class Convolutional(nn.Module):
    """Convolutions with branches; some layers are used twice."""

    def __init__(self, draw: Choices) -> None:
        super().__init__()
        self.dims = draw.one(1, 2, 2, 2, 3)
        self.inputs, wide = draw.number(1, 4), draw.one(4, 6, 8, 12)
        self.stem = _Conv(draw, self.inputs, wide, self.dims, keeps=False)
        self.blocks, self.kinds = nn.ModuleList(), []
        for _ in range(draw.number(1, 3)):
            kind = draw.one("plain", "residual", "concat", "gate", "shared", "pool", "up", "split")
            self.kinds.append(kind)
            own = wide // 2 if kind == "split" else wide
            self.blocks.append(_Conv(draw, own, own, self.dims, keeps=kind != "plain"))
            if kind == "concat":
                self.blocks.append(nn.Identity())
                wide *= 2
        self.pool, self.scale = draw.one("max", "avg", "ceil"), nn.Parameter(torch.randn(1))
        self.ends, self.several = draw.one("mean", "flat", "map"), draw.chance(25)
        self.head = nn.Linear(wide, draw.number(2, 7))

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        blocks = iter(self.blocks)
        for kind in self.kinds:
            x = self._block(kind, blocks, x)
        pooled = x.flatten(2).mean(2)
        if self.ends == "map":
            return x, self.head(pooled)
        out = self.head(F.relu(pooled) if self.ends == "flat" else pooled)
        return {"logits": out, "features": pooled} if self.several else out

    def _block(self, kind: str, blocks: Any, x: Tensor) -> Tensor:
        block = next(blocks)
        if kind == "plain":
            return block(x) if min(x.shape[2:]) >= 12 else x + block.activation(x) * self.scale
        if kind == "residual":
            return x + block(x)
        if kind == "concat":
            next(blocks)
            return torch.cat([x, block(x)], 1)
        if kind == "gate":
            return x * torch.sigmoid(block(x).flatten(2).mean(2)).reshape(-1, x.shape[1], *[1] * self.dims)
        if kind == "shared":
            return block(block(x))
        if kind == "split":
            one, two = x.chunk(2, 1)
            return torch.cat([one, block(two)], 1)
        if kind == "up":
            return F.interpolate(block(x), scale_factor=2, mode="nearest")
        return self._pooled(block(x))

    def _pooled(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < 4:
            return x
        name = "max" if self.pool == "max" else "avg"
        return getattr(F, f"{name}_pool{self.dims}d")(x, 3, 2, 1, ceil_mode=self.pool == "ceil")


class _Block(nn.Module):
    """Attention and an MLP, before or after a norm."""

    def __init__(self, draw: Choices, wide: int) -> None:
        super().__init__()
        self.heads, self.form = draw.one(1, 2, 4), draw.one("module", "function", "written", "causal")
        self.attention = nn.MultiheadAttention(wide, self.heads, batch_first=True) if self.form == "module" else None
        self.projection, self.out = nn.Linear(wide, 3 * wide, bias=draw.chance(50)), nn.Linear(wide, wide)
        self.norms = nn.ModuleList([draw.one(nn.LayerNorm(wide), nn.RMSNorm(wide)) for _ in range(2)])
        self.up, self.gate, self.down = nn.Linear(wide, 2 * wide), nn.Linear(wide, 2 * wide), nn.Linear(2 * wide, wide)
        self.gated, self.first, self.activation = draw.chance(50), draw.chance(50), _activation(draw)

    def forward(self, x: Tensor) -> Tensor:
        attention, norm = self.norms
        x = x + self._attend(attention(x)) if self.first else attention(x + self._attend(x))
        return x + self._mlp(norm(x)) if self.first else norm(x + self._mlp(x))

    def _attend(self, x: Tensor) -> Tensor:
        if self.attention is not None:
            return self.attention(x, x, x, need_weights=False)[0]
        batch, length, wide = x.shape
        q, k, v = (
            part.reshape(batch, length, self.heads, -1).transpose(1, 2) for part in self.projection(x).chunk(3, -1)
        )
        if self.form == "written":
            mixed = ((q @ k.transpose(-1, -2)) * (wide // self.heads) ** -0.5).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.form == "causal")
        return self.out(mixed.transpose(1, 2).reshape(batch, length, wide))

    def _mlp(self, x: Tensor) -> Tensor:
        inner = self.activation(self.up(x))
        return self.down(inner * self.gate(x) if self.gated else inner)


class Transformer(nn.Module):
    """Blocks over tokens of a table or over vectors; the table may be the head, too."""

    def __init__(self, draw: Choices) -> None:
        super().__init__()
        self.wide, self.words = draw.one(8, 12, 16), draw.number(10, 30)
        if self.wide % 4:
            self.wide = 16
        self.tokens = draw.chance(60)
        self.table = nn.Embedding(self.words, self.wide) if self.tokens else nn.Linear(6, self.wide)
        self.places = nn.Parameter(torch.randn(1, 32, self.wide)) if draw.chance(50) else None
        self.blocks = nn.Sequential(*(_Block(draw, self.wide) for _ in range(draw.number(1, 2))))
        self.head = nn.Linear(self.wide, self.words if self.tokens else 5, bias=False)
        if self.tokens and draw.chance(40):
            self.head.weight = self.table.weight
        self.ends = draw.one("all", "mean", "first")

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        if self.places is not None:
            x = x + self.places[:, : x.shape[1]]
        x = self.blocks(x)
        return self.head(x if self.ends == "all" else x.mean(1) if self.ends == "mean" else x[:, 0])


class Mixed(nn.Module):
    """A convolutional stem whose pixels are tokens, and vectors beside the images."""

    def __init__(self, draw: Choices) -> None:
        super().__init__()
        wide = draw.one(8, 16)
        self.inputs = draw.number(1, 3)
        self.stem = nn.Conv2d(self.inputs, wide, draw.one(2, 4), draw.one(2, 4))
        self.block, self.side = _Block(draw, wide), nn.Linear(5, wide)
        self.constant = nn.Parameter(torch.randn(wide), requires_grad=False)
        self.join, self.again = draw.one("add", "cat", "film"), draw.chance(30)
        self.head = nn.Linear(2 * wide if self.join == "cat" else wide, draw.number(2, 6))

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        x = self.stem(image).flatten(2).transpose(1, 2)
        x = self.block(self.block(x) if self.again else x)
        side = torch.tanh(self.side(vector)) * self.constant
        pooled = x.mean(1)
        if self.join == "cat":
            return self.head(torch.cat([pooled, side], 1))
        return self.head(pooled + side if self.join == "add" else pooled * side + side)


def case(family: Family, seed: int) -> Case:
    """The network of a seed, with two batches of its inputs."""
    draw = Choices(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = {"convolutional": Convolutional, "transformer": Transformer, "mixed": Mixed}[family](draw)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2.0)
        model.eval()
        batches = [_inputs(model, draw) for _ in range(2)] if draw.chance(50) else [_inputs(model, draw)] * 2
    return Case(model, batches)


def _inputs(model: Any, draw: Choices) -> Any:
    rows = 3
    if isinstance(model, Convolutional):
        size = {1: 40, 2: 17, 3: 9}[model.dims]
        return torch.randn(rows, model.inputs, *[size] * model.dims, generator=draw.random)
    if isinstance(model, Transformer):
        if model.tokens:
            return torch.randint(0, model.words, (rows, 7), generator=draw.random)
        return torch.randn(rows, 7, 6, generator=draw.random)
    image = torch.randn(rows, model.inputs, 16, 16, generator=draw.random)
    return {"image": image, "vector": torch.randn(rows, 5, generator=draw.random)}
