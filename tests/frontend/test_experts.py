"""Mixtures of experts of transformers: dense, and equal to what transformers computes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hawqfx
from hawqfx.frontend.capture import capture
from hawqfx.frontend.data import Batch

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


class Experts(nn.Module):
    """As transformers lays them out: tables of weights, and tokens sorted by the experts that they go to."""

    def __init__(self, has_gate: bool, has_bias: bool, is_transposed: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(_experts_implementation="eager")
        self.has_gate, self.has_bias, self.is_transposed = has_gate, has_bias, is_transposed
        self.act_fn = F.silu
        self.up = "gate_up_proj" if has_gate else "up_proj"
        for name, inputs, outputs in ((self.up, 8, 8 if has_gate else 4), ("down_proj", 4, 8)):
            size = (inputs, outputs) if is_transposed else (outputs, inputs)
            setattr(self, name, nn.Parameter(torch.randn(3, *size) / 3))
            if has_bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(3, outputs)))

    def _apply_gate(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    def _linear(self, name: str, number: int, x: Tensor) -> Tensor:
        weight = getattr(self, name)[number]
        x = x @ (weight if self.is_transposed else weight.T)
        return x + getattr(self, f"{name}_bias")[number] if self.has_bias else x

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states)
        for number in range(3):
            rows, place = torch.where(top_k_index == number)
            x = self._linear(self.up, number, hidden_states[rows])
            x = self._linear("down_proj", number, self._apply_gate(x) if self.has_gate else F.silu(x))
            total.index_add_(0, rows, x * top_k_weights[rows, place, None])
        return total


class Mixture(nn.Module):
    def __init__(self, *options: bool) -> None:
        super().__init__()
        self.router, self.experts, self.head = nn.Linear(8, 3), Experts(*options), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.router(x).softmax(-1).topk(2, -1)
        return self.head(self.experts(x, index, weights))


@pytest.mark.parametrize("has_gate", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_every_expert_is_two_layers(has_gate: bool, has_bias: bool, is_transposed: bool) -> None:
    torch.manual_seed(0)
    model: Any = Mixture(has_gate, has_bias, is_transposed).eval()
    before, own = model(X), model.experts.forward
    program = capture(model, Batch((X,), {}))
    # float32 sums of three experts in another order
    assert (program.run((X,), {}) - before).abs().max() < 1e-5
    assert model.experts.forward == own
    up = "gate_up_proj" if has_gate else "up_proj"
    made = hawqfx.compile(model, "weight_bits=6", [X], sensitivity="mse", rounding="nearest")
    named = {f"experts.{name}_{number}" for name in (up, "down_proj") for number in range(3)}
    assert {site.key for site in made.planned.weights} == named | {"router.weight", "head.weight"}
    assert not made.planned.float_weights()
