"""equalize: the function stays, channels come to one range, and what cannot be scaled exactly is left alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hawqfx.frontend.capture import capture
from hawqfx.ir.program import Program
from hawqfx.pass_manager.manager import run
from hawqfx.passes.decompose import Decompose
from hawqfx.passes.equalize import Equalize
from tests.nets import build, images
from tests.tools import captured, context, quick, tensor_at

CHANNELS = torch.tensor([1.0, 1e-3, 0.1, 2e-3, 7e-4, 1e-2])
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu, "silu": F.silu, "gate": lambda x: torch.tanh(x) * x, "nothing": lambda x: x,
}  # fmt: skip


class Unequal(nn.Module):
    """A convolution whose channels lie a thousand times apart, a function of each value, a depthwise convolution that
    makes up for that; `joined` adds one that reads all channels, `multiplier` gives each channel several."""

    def __init__(self, gate: Callable[[Tensor], Tensor] = F.silu, joined: bool = False, multiplier: int = 1) -> None:
        super().__init__()
        self.gate = gate
        self.make = nn.Conv2d(1, 6, 3)
        self.read = nn.Conv2d(6, 6 * multiplier, 3, groups=6)
        self.also = nn.Conv2d(6, 6 * multiplier, 3) if joined else None
        self.head = nn.Linear(6 * multiplier, 3)
        for layer, factor in ((self.make, CHANNELS), (self.read, (1 / CHANNELS).repeat_interleave(multiplier))):
            layer.weight.data *= factor.reshape(-1, 1, 1, 1)
        assert self.make.bias is not None
        self.make.bias.data *= CHANNELS

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate(self.make(x))
        y = self.read(x)
        if self.also is not None:
            y = y + self.also(x)
        return self.head(torch.relu(y).mean((2, 3)))


def equalized(model: nn.Module, **options: Any) -> tuple[Program, Program]:
    before = run([Decompose()], capture(model, context().batches[0]), context())
    return before, run([Equalize(**options)], before, context())


def ranges(program: Program) -> Tensor:
    made = tensor_at(program, context().batches[0], "conv2d")
    return made.abs().amax((0, 2, 3))


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("name", GATES)
def test_channels_come_to_one_range_and_the_function_stays(name: str, multiplier: int) -> None:
    model = build(lambda: Unequal(GATES[name], multiplier=multiplier))
    before, after = equalized(model)
    x = images()[0][0]
    expected = model(x).detach()
    # weights and values are rounded to float32 once more: 1e-7 of each term, of sums of at most 54
    assert float((after.run((x,), {}).detach() - expected).abs().max() / expected.abs().max()) < 1e-5
    assert float(ranges(before).max() / ranges(before).min()) > 500
    assert float(ranges(after).max() / ranges(after).min()) < 10  # norms of weights were alike to within a few
    convolutions = len(after.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default))
    assert convolutions == (3 if name in ("silu", "gate") else 2)  # a gate reads what was there before


def test_quantized_networks_lose_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the pass the small channels have one code each; with it, 256."""
    x = images()[0][0]
    reference = build(Unequal)(x)
    errors = {}
    for gain in (256.0, float("inf")):
        monkeypatch.setattr("hawqfx.pipeline.Equalize", lambda keep_float, gain=gain: Equalize(gain, keep_float))
        compiled = quick(Unequal, "weight_bits=8")
        errors[gain] = float((compiled.model(x) - reference).detach().square().mean())
    assert errors[256.0] < errors[float("inf")] / 30


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: Unequal(joined=True), {}),  # a layer that reads all channels at once
        (lambda: Unequal(torch.tanh), {}),  # no gate: tanh(s x) is not s tanh(x)
        (lambda: Unequal(F.relu6), {}),  # a ceiling at the same value for all channels
        (lambda: Unequal(F.gelu), {}),
        (Unequal, {"gain": 1e9}),
        (Unequal, {"keep_float": ("read.*",)}),
        (Unequal, {"keep_float": ("make.*",)}),
    ],
)
def test_what_cannot_be_or_need_not_be_scaled_is_left_alone(
    make: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    before, after = equalized(build(make), **options)
    assert after.graph is before.graph


def test_a_weight_with_two_layers_is_left_alone() -> None:
    class Twice(Unequal):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + F.silu(self.make(x * x)).mean((1, 2, 3))[:, None]

    before, after = equalized(build(Twice))
    assert after.graph is before.graph


def test_a_convolution_whose_padding_is_a_word_is_scaled_too() -> None:
    model: Any = Unequal()
    model.make.padding = "same"
    before, after = equalized(model.eval())
    assert after.graph is not before.graph
    x = images()[0][0]
    torch.testing.assert_close(after.run((x,), {}), model(x), rtol=1e-4, atol=1e-5)  # float32 of small channels


def test_channels_of_zeros_stay_finite() -> None:
    model: Any = build(Unequal)
    model.make.weight.data[1] = 0
    _, after = equalized(model)
    x = images()[0][0]
    torch.testing.assert_close(after.run((x,), {}), model(x), rtol=1e-4, atol=1e-5)


def test_a_channel_that_is_its_bias_alone_is_not_blown_up() -> None:
    model: Any = build(Unequal)
    model.make.weight.data[1], model.make.bias.data[1] = 0, 0.3
    _, after = equalized(model)
    assert float(ranges(after).max()) < 10 * float(ranges(after)[0])  # the largest one, which keeps its range


def test_the_users_model_stays_as_it_was() -> None:
    model = build(Unequal)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, after = equalized(model)
    assert not torch.equal(after.tensor("make.weight"), before["make.weight"])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_sizes_are_relative_to_the_network_as_it_was() -> None:
    compiled = quick(Unequal, "weight_bits=6")
    assert compiled.planned.float_bytes() == 4 * sum(value.numel() for value in build(Unequal).parameters())
    assert captured(Unequal).float_bytes() == compiled.planned.float_bytes()
