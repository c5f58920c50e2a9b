"""Patches against convolution, compensated rounding against least squares and brute force."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hawqfx.maths import rounding
from hawqfx.maths.affine import channel_scales, signed_range
from hawqfx.maths.rounding import DAMPING, Compensation, patches, second_moment, spread, weighted_error

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _correlated(groups: int, columns: int, seed: int = 0) -> Tensor:
    """The second moment of inputs that share most of their energy, as neighbouring pixels do."""
    rows = _randn(groups, 4 * columns, columns, seed=seed) + 2 * _randn(groups, 4 * columns, 1, seed=seed + 1000)
    return rows.transpose(1, 2) @ rows / rows.shape[1]


def _grid(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, low and high of every row, as (groups, R, 1)."""
    scale = channel_scales(weight.flatten(0, 1), bits).double().reshape(*weight.shape[:2], 1)
    low, high = signed_range(bits)
    return scale, torch.full_like(scale, low), torch.full_like(scale, high)


def total_error(difference: Tensor, moment: Tensor) -> float:
    return float(weighted_error(difference, moment).sum())


def _nearest(weight: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (weight / scale).round().clamp(low, high)


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch copies the input, which is no matter here
@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "padding", "dilation", "groups"),
    [
        (3, [3], [1], "valid", [1], 1),
        (4, [4], [1], "same", [3], 2),
        (3, [3, 2], [1, 1], [0, 0], [1, 1], 1),
        (3, [3, 3], [2, 3], [1, 2], [1, 1], 1),
        (4, [3, 2], [2, 1], [2, 0], [2, 3], 2),
        (4, [2, 3], [1, 1], "same", [1, 2], 1),
        (4, [3, 3], [1, 2], "valid", [2, 1], 4),
        (2, [1, 1], [2, 2], [0, 0], [1, 1], 1),
        (4, [2, 3, 1], [1, 2, 1], [1, 0, 2], [2, 1, 1], 2),
        (3, [2, 2, 3], [1, 1, 1], "same", [1, 2, 1], 3),
    ],
)
def test_patches_are_what_a_convolution_multiplies(
    channels: int, kernel: list[int], stride: list[int], padding: list[int] | str, dilation: list[int], groups: int
) -> None:
    dims, outputs = len(kernel), 2 * groups
    x = _randn(2, channels, *range(9, 9 + dims))
    weight = _randn(outputs, channels // groups, *kernel, seed=1)
    expected = CONVOLUTIONS[dims - 1](x, weight, None, stride, padding, dilation, groups)
    rows = patches(x, kernel, stride, padding, dilation, groups)
    assert rows.shape == (groups, expected.numel() // outputs, weight[0].numel())
    products = weight.reshape(groups, 2, -1) @ rows.transpose(1, 2)  # (groups, R, N * positions)
    got = products.reshape(outputs, 2, *expected.shape[2:]).transpose(0, 1)
    # sums of at most 36 products in float64, in another order
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (3, 11), (5, 6), (8, 18)])
def test_some_columns_of_patches_are_those_of_all(start: int, stop: int) -> None:
    x, geometry = _randn(2, 6, 7, 8), ([3, 2], [1, 2], [1, 0], [1, 1], 2)
    assert torch.equal(patches(x, *geometry, slice(start, stop)), patches(x, *geometry)[:, :, start:stop])


def test_many_patches_are_thinned_over_samples_and_pixels_alike() -> None:
    """Each of 40 images, and each row and column of their pixels, as often as another."""
    number, row, column = torch.meshgrid(*(torch.arange(float(n)) for n in (40, 64, 32)), indexing="ij")
    x = torch.stack([number, row, column], 1)
    rows = patches(x, [1, 1], [1, 1], "valid", [1, 1], 1, most=4096)[0]
    assert len(rows) == 4096 == len(rows.unique(dim=0))
    for values, count in zip(rows.T, (40, 64, 32), strict=True):
        found = values.unique(return_counts=True)[1]
        assert len(found) == count
        # a few more or less: the discrepancy of the sequence grows with the logarithm of its length
        assert float((found - 4096 / count).abs().max()) < 0.15 * 4096 / count + 2
    assert torch.equal(
        patches(x, [1, 1], [1, 1], "valid", [1, 1], 1, most=40 * 64 * 32)[0], x.movedim(1, 3).flatten(0, 2)
    )


def test_spread_numbers_are_all_or_as_many_as_asked_for() -> None:
    assert spread(5, 5).tolist() == [0, 1, 2, 3, 4]
    for count, most in ((1000, 999), (10**9, 50)):
        found = spread(count, most)
        assert len(found) == most
        assert int(found[0]) >= 0
        assert int(found[-1]) < count
    gaps = spread(10**6, 1000).diff()
    assert float(gaps.max() / gaps.min()) < 2.7  # the square of the golden ratio, by the three-distance theorem


def test_second_moment_is_the_mean_of_outer_products() -> None:
    rows = _randn(2, 50, 4)
    expected = torch.stack([sum((torch.outer(x, x) for x in group), torch.zeros(4, 4)) / 50 for group in rows])
    # 50 products in float64, in another order
    assert torch.allclose(second_moment(rows), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("bits", range(2, 9))
def test_identity_moment_rounds_to_nearest_within_range(bits: int) -> None:
    weight, (low, high) = 3 * _randn(2, 5, 12), signed_range(bits)
    scale = torch.full((2, 5, 1), 0.3, dtype=torch.float64)
    bounds = torch.full_like(scale, low), torch.full_like(scale, high)
    identity = torch.eye(12, dtype=torch.float64).expand(2, -1, -1)
    before = weight.clone()
    assert torch.equal(Compensation(identity).round(weight, scale, *bounds)[0], _nearest(weight, scale, *bounds))
    assert torch.equal(weight, before)
    codes, _ = Compensation(_correlated(2, 12)).round(weight, scale, *bounds)
    assert torch.equal(codes, codes.round())
    assert low <= float(codes.min()) < float(codes.max()) <= high


@pytest.mark.parametrize("columns", [rounding.COLUMNS, 3])
@pytest.mark.parametrize("seed", range(5))
def test_each_rounding_is_compensated_by_least_squares(
    seed: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a column is rounded, the columns left are where the weighted error of those rounded is the least."""
    monkeypatch.setattr(rounding, "COLUMNS", columns)  # with three, errors move from block to block too
    weight, moment = _randn(1, 200, 7, seed=seed), _correlated(1, 7, seed)
    scale, low, high = _grid(weight, 4)
    damped = moment[0] + DAMPING * moment[0].diagonal().mean() * torch.eye(7)
    order = sorted(range(7), key=lambda k: -float(moment[0, k, k]))
    codes = torch.zeros(200, 7, dtype=torch.float64)
    for done in range(7):
        fixed, free = order[:done], order[done:]
        error = codes[:, fixed] * scale[0] - weight[0][:, fixed]
        best = weight[0][:, free] - torch.linalg.solve(damped[free][:, free], damped[free][:, fixed] @ error.T).T
        codes[:, free[0]] = _nearest(best[:, :1], scale[0], low[0], high[0])[:, 0]
    found, cost = Compensation(moment).round(weight, scale, low, high)
    assert torch.equal(found[0], codes)
    error = codes * scale[0] - weight[0]
    assert torch.allclose(cost[0], ((error @ damped) * error).sum(1), rtol=1e-9)  # what is left in the end


def test_rows_times_the_inverse_of_the_damped_moment() -> None:
    rows, moment = _randn(2, 5, 7), _correlated(2, 7)
    damped = moment + torch.diag_embed(0.3 * moment.diagonal(dim1=1, dim2=2).mean(1)[:, None].expand(-1, 7))
    assert torch.allclose(Compensation(moment, 0.3).damped(moment), damped, rtol=1e-12, atol=0)
    assert torch.allclose(Compensation(moment, 0.3).solved(rows) @ damped, rows, rtol=0, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_compensation_lowers_the_error_on_correlated_inputs(bits: int, seed: int) -> None:
    weight, moment = _randn(2, 8, 18, seed=seed), _correlated(2, 18, seed)
    grid = _grid(weight, bits)
    errors = [
        total_error(codes * grid[0] - weight, moment)
        for codes in (Compensation(moment).round(weight, *grid)[0], _nearest(weight, *grid))
    ]
    assert errors[0] < errors[1]


def test_widths_rounded_together_are_as_rounded_apart() -> None:
    weight, moment = _randn(2, 4, 10), _correlated(2, 10)
    grids = [_grid(weight, bits) for bits in (2, 4, 8)]
    stacked = [torch.cat(parts, 1) for parts in zip(*grids, strict=True)]
    together = Compensation(moment).round(weight.repeat(1, 3, 1), *stacked)[0].chunk(3, 1)
    for codes, grid in zip(together, grids, strict=True):
        assert torch.equal(codes, Compensation(moment).round(weight, *grid)[0])


def test_against_brute_force_over_every_code_of_three_columns() -> None:
    found, least = [], []
    for seed in range(50):
        weight, inputs = _randn(1, 1, 3, seed=seed), _randn(64, 3, seed=seed + 50) @ _randn(3, 3, seed=seed + 100)
        moment, grid = second_moment(inputs[None]), _grid(weight, 2)
        every = torch.tensor(list(product(range(-2, 2), repeat=3)), dtype=torch.float64)
        found.append(total_error(Compensation(moment).round(weight, *grid)[0] * grid[0] - weight, moment))
        least.append(min(total_error(codes * grid[0] - weight, moment) for codes in every.reshape(-1, 1, 1, 3)))
        assert found[-1] >= least[-1] * (1 - 1e-12)  # the same sums
    # greedy, and what clipping loses in the last column cannot be moved on: 1.1 to 1.4 times for five sets of seeds
    assert sum(found) < 1.6 * sum(least)


@pytest.mark.parametrize("bits", [2, 4])
def test_singular_moments_are_rounded_too(bits: int) -> None:
    weight = _randn(3, 4, 6)
    moment = _correlated(3, 6)
    moment[0] = 0
    moment[1, 2, :] = moment[1, :, 2] = 0  # an input that is never on
    moment[2] = torch.outer(moment[2, 0], moment[2, 0])
    scale, low, high = _grid(weight, bits)
    codes, nearest = Compensation(moment).round(weight, scale, low, high)[0], _nearest(weight, scale, low, high)
    assert bool(((codes >= low) & (codes <= high)).all())  # NaN is not
    assert torch.equal(codes[0], nearest[0])
    assert torch.equal(codes[1, :, 2], nearest[1, :, 2])
    assert not torch.equal(codes[2], nearest[2])


def test_damping_grows_until_there_is_a_factor() -> None:
    """Moments that rounding left with an eigenvalue of -0.3: ten times 0.01 is too little, a hundred times is not."""
    moment = torch.stack([torch.eye(4, dtype=torch.float64), _correlated(1, 4)[0], torch.zeros(4, 4).double()])
    moment[0, 0, 1] = moment[0, 1, 0] = 1.3
    compensation = Compensation(moment)
    assert compensation.damping.tolist() == pytest.approx([1.0, DAMPING, DAMPING])
    damped = moment[0] + torch.eye(4)
    assert torch.allclose(compensation.upper[0].T @ compensation.upper[0], damped.inverse(), rtol=1e-12, atol=1e-12)
    assert torch.equal(compensation.upper[1:], Compensation(moment[1:]).upper)


def test_moments_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        Compensation(torch.full((1, 2, 2), float("nan"), dtype=torch.float64))


def test_weighted_error_is_the_plain_one_when_inputs_are_white_or_dead() -> None:
    difference = _randn(2, 3, 5)
    moment = torch.stack([2.5 * torch.eye(5, dtype=torch.float64), torch.zeros(5, 5, dtype=torch.float64)])
    assert total_error(difference, moment) == pytest.approx(float(difference.square().sum()), rel=1e-12)  # summation


def test_weighted_error_is_the_expected_output_error() -> None:
    difference, inputs = _randn(2, 3, 5), _randn(2, 40, 5, seed=1) * torch.arange(1.0, 6.0)
    expected = 0.0
    for d, x in zip(difference, inputs, strict=True):
        output = sum(float((d @ row).square().sum()) for row in x) / 40
        energy = sum(float(row.square().sum()) for row in x) / 40  # tr(A)
        expected += output * 5 / energy
    assert total_error(difference, second_moment(inputs)) == pytest.approx(expected, rel=1e-12)  # summation order


@pytest.mark.parametrize("columns", [1, 7, rounding.SOLVED, rounding.SOLVED + 1, 3 * rounding.SOLVED - 5])
def test_the_factor_is_that_of_the_inverse(columns: int) -> None:
    """U^T U is the inverse of the damped moment, by blocks too; cond(A) is below 1e3, and float64 has 16 digits."""
    vectors = torch.randn(2, 3 * columns, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moment = vectors.transpose(1, 2) @ vectors / (3 * columns)
    found = rounding.Compensation(moment, 0.01)
    assert torch.equal(found.upper, found.upper.triu())
    damped = moment + 0.01 * moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(columns)
    inverse = found.solved(torch.eye(columns, dtype=torch.float64).expand(2, -1, -1))
    torch.testing.assert_close(inverse @ damped, torch.eye(columns).double().expand(2, -1, -1), atol=1e-10, rtol=0)


@pytest.mark.parametrize("per_element", [False, True])
def test_no_code_alone_can_be_better_after_descent(per_element: bool) -> None:
    """Against every other value of every code of two groups of rows, 70 columns in two blocks, by the whole error."""
    random, (groups, rows, columns) = torch.Generator().manual_seed(3), (2, 3, 70)
    moment = _correlated(groups, columns)
    weight = torch.randn(groups, rows, columns, generator=random, dtype=torch.float64)
    scale = 0.25 + torch.rand(groups, rows, columns if per_element else 1, generator=random, dtype=torch.float64)
    low, high = (torch.full((groups, rows, 1), end, dtype=torch.float64) for end in (-2.0, 1.0))
    begun = Compensation(moment).round(weight, scale, low, high)[0]
    found = rounding.descended(begun, weight, scale, low, high, moment, sweeps=100)

    def errors(codes: Tensor) -> Tensor:
        away = codes * scale - weight
        return ((away @ moment) * away).sum(-1)

    least = errors(found)
    assert bool((least <= errors(begun)).all())
    assert bool((least < errors(begun)).any())
    assert set(found.unique().tolist()) <= {-2.0, -1.0, 0.0, 1.0}
    for column in range(columns):
        for value in (-2.0, -1.0, 0.0, 1.0):
            other = found.clone()
            other[..., column] = value
            assert bool((errors(other) >= least * (1 - 1e-9)).all())  # sums of float64 in another order
