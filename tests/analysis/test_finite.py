"""finite: quantized networks that divide by zero are refused, and masks of minus infinity are not."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hawqfx
from hawqfx.errors import LossError
from tests.nets import build


class LinearAttention(nn.Module):
    """Attention by positive features, which divides by their sums; one channel is so wide that 8 bits round the sums of
    most tokens to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        width = torch.tensor([1e-4] * 7 + [1.0])
        query, key = (torch.exp(8 * layer(x)) * width for layer in (self.query, self.key))
        weights = query @ key.transpose(1, 2)
        return self.head(weights @ self.value(x) / weights.sum(2, keepdim=True)).mean(1)


class Masked(nn.Module):
    """Attention with minus infinity where a token may not look."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = (self.query(x) @ self.key(x).transpose(1, 2)).masked_fill(later, -torch.inf)
        return self.head(scores.softmax(2) @ x).mean(1)


def tokens() -> list[Tensor]:
    return [torch.randn(16, 5, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]


@pytest.mark.parametrize("rounding", ["nearest", "sequential"])
def test_a_network_that_divides_by_what_is_rounded_to_zero(rounding: Any) -> None:
    """The remedy that the message names is one."""
    options = {"rounding": rounding, "sensitivity": "mse", "activation_bits": (8, 32)}
    fixed = dict.fromkeys(("input *", "* output"), 8)
    with pytest.raises(LossError, match="is not finite in the quantized network") as refused:
        hawqfx.compile(build(LinearAttention), "weight_bits=8", tokens(), fix=fixed, **options)
    _, _, named = str(refused.value).partition("fix=")
    kept = hawqfx.compile(build(LinearAttention), "weight_bits=8", tokens(), fix=json.loads(named), **options)
    assert bool(torch.isfinite(kept.model(tokens()[0])).all())


def test_minus_infinity_in_a_mask_is_no_overflow() -> None:
    compiled = hawqfx.compile(build(Masked), "weight_bits=8", tokens(), sensitivity="mse")
    assert bool(torch.isfinite(compiled.model(tokens()[0])).all())
