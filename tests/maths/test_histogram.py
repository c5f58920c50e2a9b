"""A growing histogram against the values themselves."""

import pytest
import torch
from torch import Tensor

from hawqfx.maths.histogram import BINS, Histogram


def histogram(*parts: Tensor) -> Histogram:
    made = Histogram()
    for part in parts:
        made.add(part)
    return made


def drawn(*scales: float) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [scale * torch.randn(5, 400, generator=random) for scale in scales]


@pytest.mark.parametrize("offset", [0.0, -0.5, 1000.0])
@pytest.mark.parametrize("scales", [(1.0, 3.0, 100.0), (100.0, 0.01), (1e-30, 1e-28), (1e20, 1e30)])
def test_every_value_is_in_a_bin_that_its_neighbours_share(scales: tuple[float, ...], offset: float) -> None:
    parts = [part + offset for part in drawn(*scales)]
    values, counts = histogram(*parts).filled()
    every = torch.cat([part.flatten() for part in parts]).double().sort().values
    assert counts.sum() == len(every)
    ends = counts.long().cumsum(0)
    width = float(every[-1] - every[0]) / (BINS // 2 - 1)  # at least half of the bins are in use
    for mean, part in zip(values, every.tensor_split(ends[:-1]), strict=True):
        assert part[-1] - part[0] <= width
        assert float(mean) == pytest.approx(float(part.mean()), rel=1e-12)  # sums in float64


def test_counts_do_not_depend_on_the_order_of_the_data() -> None:
    parts = drawn(1.0, 0.01, 70.0, 3.0)
    (values, counts), (others, same) = histogram(*parts).filled(), histogram(*parts[::-1]).filled()
    assert torch.equal(counts, same)
    torch.testing.assert_close(values, others, rtol=1e-12, atol=1e-12)  # sums in float64, in another order


def test_values_on_both_sides_of_zero_never_share_a_bin() -> None:
    values, _ = histogram(torch.tensor([-1e-6, 1e-6, 0.0]), torch.tensor([-1000.0, 1000.0])).filled()
    assert values.tolist() == pytest.approx([-1000, -1e-6, 5e-7, 1000])


@pytest.mark.parametrize("value", [0.0, 3.5, -1e-40, 3e38])
def test_one_value(value: float) -> None:
    values, counts = histogram(torch.full((7,), value)).filled()
    assert counts.tolist() == [7]
    assert float(values) == pytest.approx(float(torch.tensor(value)), rel=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        histogram(torch.tensor([1.0, value]))
