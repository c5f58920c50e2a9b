"""Hutchinson's estimate against the dense float64 Hessian of a network of 32 numbers in three blocks."""

import gc
import math
import statistics
import weakref
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from hawqfx.maths.curvature import (
    Hessian,
    Moments,
    dot,
    gradient,
    is_finite,
    pooled,
    rademacher,
    spread,
    top_eigenvalues,
)

SHAPES = ((4, 3), (2, 4), (3, 4))  # two weights, and a perturbation of the hidden activation of 3 samples
SMALL, LARGE, FEW, MANY = 2, 32, 512, 128  # FEW estimates of SMALL probes, then MANY estimates of LARGE probes
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
    hessian, random = Hessian(loss, {str(i): [x] for i, x in enumerate(inputs)}), torch.Generator().manual_seed(2)
    rows = []
    for _ in range(count):
        probes = {str(i): [rademacher(x, random)] for i, x in enumerate(inputs)}
        found = hessian.forms({key: partial(list, probe) for key, probe in probes.items()})
        rows.append(list(found.values()))
    return torch.tensor(rows, dtype=torch.float64)


def _variance(hessian: list[list[Tensor]], i: int) -> float:
    block = hessian[i][i]
    own = 2 * (block.square().sum() - block.diagonal().square().sum())
    return float(own + sum(other.square().sum() for j, other in enumerate(hessian[i]) if j != i))


@pytest.mark.parametrize("block", range(3))
def test_mean_is_the_dense_trace(hessian: list[list[Tensor]], samples: Tensor, block: int) -> None:
    mean, stderr = pooled([Moments.of(samples[:, block].tolist())], [1.0])
    # 5 standard errors: a correct estimate fails for one seed in two million
    assert abs(mean - float(hessian[block][block].trace())) < 5 * stderr
    assert stderr == pytest.approx(math.sqrt(_variance(hessian, block) / PROBES), rel=0.05)  # deviates by 1.1 %


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
def test_moments_agree_with_statistics(samples: list[float]) -> None:
    moments = Moments.of(samples)
    # both round correctly up to a few operations in float64
    assert moments.mean == pytest.approx(statistics.mean(samples), rel=1e-14)
    assert moments.variance == pytest.approx(statistics.variance(samples) / len(samples), rel=1e-14)


def test_one_sample_has_no_finite_error_unless_it_is_the_truth() -> None:
    assert Moments.of([2.5]).variance == math.inf
    assert pooled([Moments.of([2.5])], [1.0], exact=True) == (2.5, 0.0)


def test_pooling_weighs_means_by_shares_and_variances_by_their_squares() -> None:
    parts = [Moments.of([1.0, 3.0]), Moments.of([5.0, 5.0, 8.0])]  # means 2 and 6, variances of the mean 1 and 1
    assert pooled(parts, [0.25, 0.75]) == pytest.approx((5.0, math.sqrt(0.0625 + 0.5625)), rel=1e-15)


@pytest.mark.parametrize("shape", [(), (1,), (63, 65), (4096,), (3, 4097)])
def test_dot_is_that_of_float64(shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(3)
    x, y = (torch.randn(shape, generator=random) for _ in range(2))
    # rows of 4096 are summed in float32: relative to the sum of magnitudes, below 4096 roundings of 6e-8
    assert dot(x, y) == pytest.approx(float((x.double() * y).sum()), abs=2.5e-4 * float((x * y).abs().sum()))


def _power(point: list[Tensor], i: int, blocks: int, iterations: int) -> Tensor:
    gradients = gradient(_loss(*point), point)
    start = torch.randn(point[i].shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return top_eigenvalues([gradients[i]], [point[i]], [start], [0], blocks, iterations, 1e-12)


@pytest.mark.parametrize("block", range(3))
def test_top_eigenvalue_is_the_dense_one(point: list[Tensor], hessian: list[list[Tensor]], block: int) -> None:
    eigenvalues = torch.linalg.eigvalsh(hessian[block][block])
    expected = float(eigenvalues[eigenvalues.abs().argmax()])
    # the error of a Rayleigh quotient falls by (second/first)^2 per step: below 1e-6 of it after 500 here
    assert float(_power(point, block, 1, 500)) == pytest.approx(expected, rel=1e-6)


def test_blocks_of_samples_have_their_own_eigenvalues(point: list[Tensor], hessian: list[list[Tensor]]) -> None:
    dense = hessian[2][2].reshape(3, 4, 3, 4)
    for sample, found in enumerate(_power(point, 2, 3, 500)):
        eigenvalues = torch.linalg.eigvalsh(dense[sample, :, sample])
        assert float(found) == pytest.approx(float(eigenvalues[eigenvalues.abs().argmax()]), rel=1e-6)


def test_a_block_without_curvature_has_eigenvalue_zero() -> None:
    x = torch.ones(3, requires_grad=True)
    assert top_eigenvalues(gradient((2 * x).sum(), [x]), [x], [torch.ones(3)], [0], 1, 5, 0.1).tolist() == [0.0]


def test_a_hessian_goes_with_its_last_reference() -> None:
    """The graph of a gradient is gigabytes on a real network: no circle of references may keep it."""

    class User:
        def __init__(self) -> None:
            x = torch.ones(3, requires_grad=True)
            self.hessian = Hessian((x**3).sum(), {"x": [x]})

        def vector(self) -> list[Tensor]:
            return [torch.ones(3)]

    gc.disable()
    try:
        user = User()
        assert user.hessian.forms({"x": user.vector}) == {"x": 18.0}
        gone = weakref.ref(user.hessian)
        del user
        assert gone() is None
    finally:
        gc.enable()


def test_is_finite_looks_twice_only_where_a_sum_overflows() -> None:
    largest = torch.finfo(torch.float32).max
    assert is_finite(torch.tensor([largest, largest]))
    for bad in (math.nan, math.inf, -math.inf):
        assert not is_finite(torch.tensor([1.0, bad]))
    assert not is_finite(torch.tensor([math.inf, -math.inf]))


def test_inner_tensors_and_leaves_have_the_same_forms_together_and_alone() -> None:
    """y is computed from x: its block is passed on the way to x, and is asked for alone, too."""
    x = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
    y = x.sin()
    hessian = Hessian((y**4).sum(), {"x": [x], "y": [y]})
    v = torch.tensor([1.0, 2.0], dtype=torch.float64)
    second = 12 * y.detach() ** 2  # of y alone; x has the chain rule's terms
    of_x = second * x.detach().cos() ** 2 - 4 * y.detach() ** 3 * x.detach().sin()
    # the same few operations in float64
    assert hessian.forms({"y": lambda: [v]})["y"] == pytest.approx(float((second * v * v).sum()), rel=1e-12)
    assert hessian.forms({"x": lambda: [v]})["x"] == pytest.approx(float((of_x * v * v).sum()), rel=1e-12)


def test_the_spread_over_parts_is_the_standard_error_of_their_weighted_mean() -> None:
    """Equal shares: s / sqrt(n); a single part: the error of its own samples."""
    parts = [Moments.of([value]) for value in (1.0, 2.0, 6.0)]
    assert spread(parts, [1 / 3] * 3) == pytest.approx((3.0, math.sqrt(7 / 3)), rel=1e-14)
    # mean 0.5 + 0.5 + 1.5; squares of 0.5 (1 - 2.5), 0.25 (2 - 2.5), 0.25 (6 - 2.5)
    assert spread(parts, [0.5, 0.25, 0.25]) == pytest.approx((2.5, math.sqrt((0.5625 + 0.015625 + 0.765625) * 1.5)))
    assert spread([Moments.of([1.0, 3.0])], [1.0]) == (2.0, 1.0)
