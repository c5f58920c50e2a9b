"""Seeded draws, and modules that are written as one function of their layers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)


class Made(nn.Module):
    """A function of a module's own layers and of its inputs.

    Args:
        compute: a function of this module and of what it is called with.
        parts: its layers, and its parameters, by name.
    """

    def __init__(self, compute: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.compute(self, *inputs, **named)


def activation(draw: Choices) -> Callable[[Tensor], Tensor]:
    return draw.one(
        F.relu, F.relu, F.relu6, F.gelu, F.silu, F.leaky_relu, F.hardswish, torch.sigmoid, torch.tanh, F.elu,
        nn.Identity(), lambda x: x.clamp(0, 4), lambda x: x.clamp_min(0), lambda x: x.clamp(-1, 2), F.mish, F.softplus,
        lambda x: torch.relu_(x * 1.5), lambda x: F.gelu(x, approximate="tanh"), lambda x: torch.relu(x) ** 2,
        lambda x: x.abs().add_(0.1).sqrt(), lambda x: torch.where(x > 0, x, 0.2 * x), F.hardsigmoid, F.selu,
        lambda x: torch.maximum(x, -0.1 * x), lambda x: x.double().tanh().float(), lambda x: x.masked_fill(x < 0, 0.0),
    )  # fmt: skip


@torch.no_grad()
def odd_weights(draw: Choices, model: nn.Module) -> None:
    """In some networks, a weight of zeros, dead or equal channels, channels of tiny or huge range, or one far value."""
    weights = [value for value in model.parameters() if value.ndim >= 2]
    for weight in weights:
        if not draw.chance(6):
            continue
        channel = draw.number(0, len(weight) - 1)
        kind = draw.one("zeros", "dead", "tiny", "huge", "far", "equal", "small")
        if kind == "zeros":
            weight.zero_()
        elif kind == "small":
            weight.mul_(1e-5)
        elif kind == "equal":
            weight.copy_(weight[channel].clone().expand_as(weight))
        elif kind == "far":
            weight[channel].flatten()[0] = 50.0
        else:
            weight[channel].mul_({"dead": 0.0, "tiny": 1e-7, "huge": 100.0}[kind])
