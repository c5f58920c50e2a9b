"""decompose and fold_constants: the function stays, and what was written anew has integer kernels."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hawqfx.errors import CaptureError
from hawqfx.frontend.capture import capture
from hawqfx.frontend.data import Batch
from hawqfx.ir.program import Program
from hawqfx.pass_manager.base import Pass
from hawqfx.passes.decompose import Decompose
from hawqfx.passes.fold_batchnorm import FoldBatchnorm
from hawqfx.passes.fold_constants import FoldConstants

# float32 sums of at most a few hundred products of size one, in another order
ROUNDING = 1e-5


def rewritten(model: nn.Module, x: Tensor, *passes: Any) -> tuple[Program, float]:
    """The program after passes, and the largest change of its output relative to the largest output."""
    program = capture(model.eval(), Batch((x,), {}))
    before = program.run((x,), {})
    steps: list[Pass] = [FoldBatchnorm(), *passes]
    for step in steps:
        program = step.rewrite(program)  # type: ignore[attr-defined]
    after = program.run((x,), {})
    return program, float((after - before).abs().max() / before.abs().max())


def targets(program: Program) -> list[str]:
    return [str(node.target).split(".")[1] for node in program.graph.graph.nodes if node.op == "call_function"]


CASES = [
    (axes, kernel, stride, padding, extra, groups)
    for axes in (1, 2, 3)
    for kernel, stride, padding, extra in (
        (2, 2, 0, 0), (4, 2, 1, 0), (3, 2, 1, 1), (3, 2, 0, 0), (3, 1, 1, 0), (2, 3, 0, 0), (5, 3, 2, 2),
    )
    for groups in ((1, 2) if axes == 2 else (1,))
]  # fmt: skip


@pytest.mark.parametrize(("axes", "kernel", "stride", "padding", "extra", "groups"), CASES)
def test_a_transposed_convolution_is_a_convolution_and_a_shuffle(
    axes: int, kernel: int, stride: int, padding: int, extra: int, groups: int
) -> None:
    torch.manual_seed(0)
    make: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
    x = torch.randn(2, 4, *(5, 6, 4)[:axes])
    program, change = rewritten(make(4, 6, kernel, stride, padding, extra, groups), x, Decompose())
    assert change < ROUNDING
    assert f"conv{axes}d" in targets(program)
    assert not any("transpose" in target and target != "transpose" for target in targets(program))


def test_strides_that_differ_by_axis() -> None:
    torch.manual_seed(0)
    program, change = rewritten(nn.ConvTranspose2d(3, 2, (4, 3), (2, 3)), torch.randn(2, 3, 5, 4), Decompose())
    assert change < ROUNDING
    assert targets(program) == ["conv2d", "reshape", "permute", "reshape"]


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(2, 2, 3, 2, dilation=2), nn.ConvTranspose2d(2, 2, 2, 3, 0, 2)])
def test_other_transposed_convolutions_stay(layer: nn.Module) -> None:
    program, change = rewritten(layer, torch.randn(2, 2, 4, 4), Decompose())
    assert change == 0
    assert targets(program) == ["conv_transpose2d"]


class Attending(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.mask = nn.Buffer(torch.ones(6, 6, dtype=torch.bool).tril(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.reshape(-1, 3, 2, 6, 4).unbind(1)
        mask: dict[str, Any] = {"attn_mask": self.mask} if self.options.get("masked") else {}
        return F.scaled_dot_product_attention(
            q, k, v, **mask, **{k: v for k, v in self.options.items() if k != "masked"}
        )


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"is_causal": True}, {"masked": True}])
def test_attention_is_two_products_and_a_softmax(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    program, change = rewritten(Attending(**options), torch.randn(2, 144), Decompose())
    assert change < ROUNDING
    found = targets(program)
    assert found.count("matmul") == 2
    assert "scaled_dot_product_attention" not in found
    assert "unbind" not in found
    assert found.count("select") == 3


class Products(nn.Module):
    """Products with constant matrices, as GPT-2 has them, and a linear layer of matrices that ends in a rectifier."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))
        self.other, self.stacked = nn.Parameter(torch.randn(6, 5)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.reshape(-1, 4), self.one) @ self.other
        return torch.relu(self.stacked(y.reshape(-1, 2, 3, 5)))


def test_products_with_constants_are_layers_of_one_matrix() -> None:
    torch.manual_seed(0)
    program, change = rewritten(Products(), torch.randn(2, 24), Decompose())
    assert change < ROUNDING
    assert targets(program) == ["reshape", "linear", "linear", "reshape", "reshape", "linear", "relu", "reshape"]
    assert program.tensor("one").shape == (6, 4)


class Parted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        one, other = x.chunk(2, 1)
        first, _, last = torch.split(other, [1, 2, 1], 1)
        return F.silu(one[:, :1]) + first * last


def test_parts_are_slices_and_silu_is_a_product() -> None:
    program, change = rewritten(Parted(), torch.randn(2, 8), Decompose())
    assert change < ROUNDING
    assert sorted(set(targets(program))) == ["add", "mul", "sigmoid", "slice"]


class FrozenNorm(nn.Module):
    """Batch-norm written out, after a convolution and after a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.gain, self.shift, self.variance = (nn.Buffer(torch.rand(4) + 0.5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.gain * (self.variance + 1e-5).rsqrt()).reshape(1, -1, 1, 1)
        shift = self.shift.reshape(1, -1, 1, 1)
        y = self.conv(x) * scale + shift
        return torch.relu(torch.cat([y[:, 2:], y[:, :2]], 1) * scale + shift)


def test_a_scale_and_shift_per_channel_goes_into_the_layer_before_or_is_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 2, 6, 6)
    program, change = rewritten(FrozenNorm(), x, FoldConstants(), FoldBatchnorm(), Decompose())
    assert change < ROUNDING
    assert targets(program) == ["conv2d", "slice", "slice", "cat", "conv2d", "relu"]
    layers = [node for node in program.graph.graph.nodes if "conv2d" in str(node.target)]
    assert layers[1].args[6] == 4  # a channel each


class LeftOver(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm3d(2, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(x.reshape(-1, 2, 1, 2, math.prod((2, 1)))))


def test_a_batchnorm_without_a_layer_is_a_convolution_of_each_channel() -> None:
    model = LeftOver()
    model.norm.running_mean, model.norm.running_var = torch.tensor([0.3, -1.0]), torch.tensor([0.5, 2.0])
    program, change = rewritten(model, torch.randn(2, 8), Decompose())
    assert change < ROUNDING
    assert targets(program) == ["reshape", "conv3d", "relu"]


class Masked(nn.Module):
    """Attention with a mask, with which several layers may share it, or with fewer heads of keys than of queries."""

    def __init__(self, kind: str, shared_heads: bool = False) -> None:
        super().__init__()
        self.kind, self.shared_heads = kind, shared_heads
        self.fixed = nn.Buffer(torch.ones(5, 5, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        seen = (x[:, :, 0] > -0.5)[:, None] & self.fixed
        masks = {
            "bool": seen,
            "infinite": torch.zeros(()).masked_fill(~seen, -math.inf),
            "least": torch.zeros(()).masked_fill(~seen, torch.finfo(torch.float32).min),
            "fixed": self.fixed,
        }
        if self.shared_heads:
            q, k = x.reshape(-1, 5, 4, 2).transpose(1, 2), x[..., :4].reshape(-1, 5, 2, 2).transpose(1, 2)
            mask = masks[self.kind]
            mask = mask[:, None] if mask.ndim == 3 else mask
            return F.scaled_dot_product_attention(q, k, k * 2, mask, enable_gqa=True)
        for _ in range(2):
            x = x + F.scaled_dot_product_attention(x, x * 2, x, masks[self.kind])
        return x


@pytest.mark.parametrize("shared_heads", [False, True])
@pytest.mark.parametrize("kind", ["bool", "infinite", "least", "fixed"])
def test_rows_that_a_mask_hides_wholly_are_as_torch_has_them(kind: str, shared_heads: bool) -> None:
    """Zeros; but the mean of all values where the mask adds the least finite number."""
    x = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
    assert bool((x[:, 0, 0] <= -0.5).any())  # the first position sees itself alone
    program, change = rewritten(Masked(kind, shared_heads), x, Decompose())
    assert change < ROUNDING
    assert "scaled_dot_product_attention" not in targets(program)
    if kind == "fixed":  # what is added is a constant, too
        assert not {"where", "clamp_min"} & {*targets(program)}
    rows = targets(program).count("any")
    assert rows == (kind != "fixed")  # once for both layers, and not for a constant that hides no row


class FromTheLeft(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight @ x + self.weight @ x[0]


def test_a_product_with_a_matrix_on_the_left_is_the_transpose_of_a_layer() -> None:
    torch.manual_seed(0)
    program, change = rewritten(FromTheLeft(), torch.randn(3, 8, 6), Decompose())
    assert change < ROUNDING
    assert targets(program).count("linear") == 2


class Packed(nn.Module):
    """Attention of one sequence to another, whose three projections are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x[:, :2], x, x, need_weights=False)[0]


def test_projections_that_are_packed_are_layers_of_their_own() -> None:
    torch.manual_seed(0)
    program, change = rewritten(Packed(), torch.randn(3, 5, 8), FoldConstants(), Decompose())
    assert change < ROUNDING
    called = [str(node.target) for node in program.graph.graph.nodes if node.op == "call_function"]
    assert called.count("aten.linear.default") == 3
    assert "aten.split_with_sizes.default" not in called
    assert {f"attention.in_proj_weight_{part}" for part in (0, 1)} <= program.constants().keys()


def test_bags_of_a_length_that_varies_are_a_table_and_a_reduction() -> None:
    sizes = {"input": {0: torch.export.Dim("batch"), 1: torch.export.Dim("words")}}
    program = capture(nn.EmbeddingBag(10, 4).eval(), Batch((torch.randint(0, 10, (3, 5)),), {}), sizes)
    written = Decompose().rewrite(program)
    assert "embedding_bag" not in targets(written)
    words = torch.randint(0, 10, (2, 7))
    assert torch.allclose(written.run((words,), {}), program.run((words,), {}), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_words_are_a_table_and_a_reduction(mode: str) -> None:
    torch.manual_seed(0)
    words = torch.randint(0, 10, (3, 5))
    program, change = rewritten(nn.EmbeddingBag(10, 4, mode=mode), words, Decompose())
    assert change < ROUNDING
    assert "embedding" in targets(program)
    assert "embedding_bag" not in targets(program)


class _Weighted(nn.EmbeddingBag):
    def forward(self, words: Tensor) -> Tensor:  # type: ignore[override]
        return F.embedding_bag(words, self.weight, mode="sum", per_sample_weights=torch.ones(words.shape))


def test_bags_whose_words_have_weights_are_refused_with_the_way_out() -> None:
    """onnxruntime 1.32 ends the process, by a fault in memory, on the loop that they become."""
    with pytest.raises(CaptureError, match=r"use torch\.nn\.Embedding"):
        rewritten(_Weighted(10, 4), torch.randint(0, 10, (3, 5)), Decompose())
