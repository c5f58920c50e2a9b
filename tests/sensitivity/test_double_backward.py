"""Networks with operators that torch cannot differentiate twice, and transformers from their configurations."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hawqfx
from hawqfx.errors import DerivativeError
from hawqfx.ir.facts import Sensitivity
from hawqfx.passes.hawq_v2 import HawqV2
from hawqfx.sensitivity.double_backward import twice_differentiable
from hawqfx.sensitivity.layer_derivatives import LAYERS
from tests.nets import Recurrent, build, images
from tests.tools import captured, context, quick

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class InvertedResidual(nn.Module):
    """A block of MobileNet-V3: depthwise, squeeze and excitation, hard sigmoid and hard swish."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depthwise = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.project, self.head = nn.Conv2d(8, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.depthwise(F.hardswish(self.expand(x))))
        x = x * F.hardsigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head(self.project(x).mean((2, 3)))


class Resampled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        grid = torch.tanh(x[:, :2].permute(0, 2, 3, 1))
        return self.head(F.grid_sample(x, grid, align_corners=False).mean((2, 3)))


@torch.library.custom_op("hawqfx_tests::square", mutates_args=())
def square(x: Tensor) -> Tensor:
    return x * x


@torch.library.custom_op("hawqfx_tests::square_backward", mutates_args=())
def square_backward(x: Tensor, gradient: Tensor) -> Tensor:
    return 2 * x * gradient


@square.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@square_backward.register_fake
def _(x: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(x)


square.register_autograd(
    lambda ctx, gradient: square_backward(ctx.saved_tensors[0], gradient),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.hawqfx_tests.square(x)


class Opaque(nn.Module):
    """An operator of the user's own whose backward pass has no derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Conv2d(1, 4, 3), Square()), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Logits(nn.Module):
    """A transformers classifier on 8x8 images, taken as 8 tokens or as pixels."""

    def __init__(self, model: nn.Module, tokens: bool) -> None:
        super().__init__()
        self.model, self.tokens = model, tokens

    def forward(self, x: Tensor) -> Tensor:
        if self.tokens:
            return self.model(input_ids=(x.mean((1, 3)).abs() * 15).long().clamp(0, 15)).logits
        return self.model(pixel_values=x).logits


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=8, num_labels=3,  # type: ignore[call-arg]
    )  # fmt: skip
    return Logits(BertForSequenceClassification(config), tokens=True)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_channels=1, num_labels=3,  # type: ignore[call-arg]
    )  # fmt: skip
    return Logits(ViTForImageClassification(config), tokens=False)


@pytest.mark.parametrize("make", [InvertedResidual, Recurrent, Resampled, bert, vit])
def test_hessians_of_every_network(make: Callable[[], nn.Module]) -> None:
    compiled = quick(make, "bops=100%")
    facts = [compiled.planned.facts.get(site.key, Sensitivity) for site in compiled.planned.weights]
    assert all(fact.curvature != 0 for fact in facts)  # few probes: any sign


@pytest.mark.parametrize(
    ("make", "operators"),
    [
        (InvertedResidual, {"aten.hardsigmoid.default"}),
        (Recurrent, set()),  # torch's kernels for a CPU have second derivatives
        (Resampled, set()),
    ],
)
def test_replacements_compute_the_same(make: Callable[[], nn.Module], operators: set[str]) -> None:
    program, batch = captured(make), context().batches[0]
    found = twice_differentiable(program, batch)
    assert {str(operator) for operator in found.keys() - LAYERS.keys()} == operators
    plain, replaced = (program.run(batch.args, {}, operators=table) for table in ({}, found))
    # the same sums in another order
    assert torch.allclose(plain, replaced, rtol=1e-5, atol=1e-6)


def test_nothing_is_replaced_without_need() -> None:
    for make in (bert, vit):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            assert twice_differentiable(captured(make), context().batches[0]) == LAYERS


def test_an_operator_that_nothing_helps_is_named_and_fisher_works() -> None:
    with pytest.raises(DerivativeError, match=r"hawqfx_tests\.square\.default \(body\.1\): .*sensitivity=\"fisher\""):
        hawqfx.compile(build(Opaque), "weight_bits=6", images(), sensitivity=HawqV2(4))
    compiled = hawqfx.compile(build(Opaque), "weight_bits=6", images(), sensitivity="fisher")
    assert all(compiled.planned.facts.get(site.key, Sensitivity).curvature > 0 for site in compiled.planned.weights)


def test_the_fisher_trace_is_the_hessian_trace_where_labels_are_the_networks_own() -> None:
    """Drawn labels make the expected Hessian the Fisher matrix: both agree within 6 standard errors of each other, of
    which the one counts labels and the other probes."""
    data: list[Any] = [x.repeat(40, 1, 1, 1) for x, _ in images(count=1, batch=4)]  # 40 labels drawn for each image
    found = {}
    for name in ("hawq-v2", "fisher"):
        compiled = hawqfx.compile(build(InvertedResidual), "weight_bits=6", data, sensitivity=name)
        found[name] = compiled.planned.facts.get("head.weight", Sensitivity)
    hessian, fisher = found.values()
    assert abs(hessian.curvature - fisher.curvature) <= 6 * (hessian.stderr**2 + fisher.stderr**2) ** 0.5
