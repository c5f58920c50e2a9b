"""Hutchinson's estimate against the dense float64 Hessian of a network of 32 numbers in three blocks."""

import math
import statistics
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from hawqfx.maths.curvature import gradient, mean_and_stderr, rademacher, trace_samples

SHAPES = ((4, 3), (2, 4), (3, 4))  # two weights, and a perturbation of the hidden activation of 3 samples
SMALL, LARGE, FEW, MANY = 4, 64, 512, 128  # FEW estimates of SMALL probes, then MANY estimates of LARGE probes
PROBES = SMALL * FEW + LARGE * MANY


def _loss(first: Tensor, second: Tensor, perturbation: Tensor) -> Tensor:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(3, 3).sin()
    logits = torch.tanh(torch.tanh(x @ first.T) + perturbation) @ second.T
    return torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1]))


@pytest.fixture(scope="module")
def point() -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=random, dtype=torch.float64).requires_grad_() for s in SHAPES]


@pytest.fixture(scope="module")
def hessian(point: list[Tensor]) -> list[list[Tensor]]:
    """Blocks H_ij of the Hessian of all inputs together, by autograd's own dense double backward."""
    sizes = [x.numel() for x in point]

    def flat_loss(flat: Tensor) -> Tensor:
        first, second, perturbation = (p.reshape(s) for p, s in zip(flat.split(sizes), SHAPES, strict=True))
        return _loss(first, second, perturbation)

    flat = torch.cat([x.detach().flatten() for x in point])
    dense = torch.autograd.functional.hessian(flat_loss, flat)
    assert isinstance(dense, Tensor)
    return [list(rows.split(sizes, 1)) for rows in dense.split(sizes, 0)]


@pytest.fixture(scope="module")
def samples(point: list[Tensor]) -> Tensor:
    """(PROBES, blocks): every row comes from one Hessian-vector product with all blocks' probes."""
    return _draw(_loss(*point), point, PROBES)


def _draw(loss: Tensor, inputs: Sequence[Tensor], count: int) -> Tensor:
    gradients, random = gradient(loss, inputs), torch.Generator().manual_seed(2)
    rows = [trace_samples(gradients, inputs, random, last=k == count - 1) for k in range(count)]
    return torch.tensor(rows, dtype=torch.float64)


def _variance(hessian: list[list[Tensor]], i: int) -> float:
    block = hessian[i][i]
    own = 2 * (block.square().sum() - block.diagonal().square().sum())
    return float(own + sum(other.square().sum() for j, other in enumerate(hessian[i]) if j != i))


@pytest.mark.parametrize("block", range(3))
def test_mean_is_the_dense_trace(hessian: list[list[Tensor]], samples: Tensor, block: int) -> None:
    mean, stderr = mean_and_stderr(samples[:, block].tolist())
    # 5 standard errors: a correct estimate fails for one seed in two million
    assert abs(mean - float(hessian[block][block].trace())) < 5 * stderr
    assert stderr == pytest.approx(math.sqrt(_variance(hessian, block) / PROBES), rel=0.05)  # deviates by 0.8 %


@pytest.mark.parametrize("block", range(3))
def test_error_falls_like_one_over_root_n(hessian: list[list[Tensor]], samples: Tensor, block: int) -> None:
    trace = hessian[block][block].trace()
    small, large = samples[: SMALL * FEW, block], samples[SMALL * FEW :, block]
    coarse = (small.reshape(FEW, SMALL).mean(1) - trace).square().mean().sqrt()
    fine = (large.reshape(MANY, LARGE).mean(1) - trace).square().mean().sqrt()
    # An rms over R errors that are close to normal has relative deviation 1/sqrt(2R): 6.3 % and 3.1 %, together 7 %.
    # 4 * sqrt(2) and 4 / sqrt(2) are ln(sqrt(2)) / 0.07 = 5 deviations away; a rate of 1/n or n^(-1/4) gives 16 or 2.
    assert 2.8 < coarse / fine < 5.6


@pytest.mark.parametrize("block", range(3))
def test_variance_is_the_documented_formula(hessian: list[list[Tensor]], samples: Tensor, block: int) -> None:
    expected = _variance(hessian, block)
    own = 2 * (hessian[block][block].square().sum() - hessian[block][block].diagonal().square().sum())
    centred = samples[:, block] - samples[:, block].mean()
    variance = float(centred.square().mean())
    # the deviation of a sample variance is sqrt((m4 - s^4) / n); 5 of them, which the cross terms alone exceed
    tolerance = 5 * math.sqrt((float(centred.pow(4).mean()) - variance**2) / PROBES)
    assert abs(variance - expected) < tolerance < expected - float(own)


def test_a_diagonal_hessian_is_exact_in_one_probe() -> None:
    x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    assert _draw((x**3).sum(), [x], 1).item() == 12.0  # 6 (1 - 2 + 3): small integers are exact in float32


def test_linear_and_ignored_inputs_have_no_curvature() -> None:
    x, y, ignored = (torch.arange(1.0, 4.0, requires_grad=True) for _ in range(3))
    assert _draw((2 * x).sum() - y.sum(), [x, y, ignored], 2).tolist() == [[0.0] * 3] * 2
    assert _draw((x**2).sum() - y.sum(), [x, y, ignored], 2).tolist() == [[6.0, 0.0, 0.0]] * 2
    assert gradient((2 * x).sum(), [x, ignored])[1].tolist() == [0.0] * 3


def test_rademacher_is_signs_seeded_and_balanced() -> None:
    like = torch.empty(100, 100, dtype=torch.float64)
    first, again, other = (rademacher(like, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first.shape == like.shape
    assert first.dtype == like.dtype
    assert set(first.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(first, again)
    # means of 10^4 independent signs have deviation 0.01: 5 of them
    assert abs(float(first.mean())) < 0.05
    assert abs(float((first * other).mean())) < 0.05
    assert abs(float((first[1:] * first[:-1]).mean())) < 0.05


@pytest.mark.parametrize("samples", [[1.0, 2.0, 4.0, -3.5], [1e9, 1e9 + 1, 1e9 + 2], [0.0, 0.0]])
def test_mean_and_stderr_agree_with_statistics(samples: list[float]) -> None:
    mean, stderr = mean_and_stderr(samples)
    # both round correctly up to a few operations in float64
    assert mean == pytest.approx(statistics.mean(samples), rel=1e-14)
    assert stderr == pytest.approx(statistics.stdev(samples) / math.sqrt(len(samples)), rel=1e-14)


def test_one_sample_has_no_finite_error() -> None:
    assert mean_and_stderr([2.5]) == (2.5, math.inf)
