"""Paired differences, against their own spread over repeated samples."""

import math

import pytest
import torch

from hawqfx.maths.paired import paired_difference


@pytest.mark.parametrize("weights", ["equal", "unequal"])
def test_the_standard_error_is_that_of_repeated_means(weights: str) -> None:
    """2,000 samples of 50 pairs: the mean of the squared errors is the variance of the means.  The relative standard
    error of a variance from 2,000 means is sqrt(2 / 2000) = 3%; five of them are allowed."""
    random = torch.Generator().manual_seed(0)
    w = torch.ones(50).double() if weights == "equal" else torch.rand(50, generator=random).double() + 0.5
    found = []
    for _ in range(2000):
        common = 10 * torch.randn(50, generator=random).double()  # alike in both networks
        one, other = (common + torch.randn(50, generator=random).double() for _ in range(2))
        found.append(paired_difference(one + 0.3, other, w))
    means = torch.tensor([difference.mean for difference in found])
    errors = torch.tensor([difference.stderr for difference in found])
    assert float(errors.square().mean()) == pytest.approx(float(means.var()), rel=0.15)
    assert float(means.mean()) == pytest.approx(0.3, abs=5 * float(means.std()) / 2000**0.5)


def test_a_single_pair_decides_nothing() -> None:
    difference = paired_difference(torch.ones(1).double(), torch.zeros(1).double(), torch.ones(1).double())
    assert (difference.mean, difference.stderr) == (1.0, math.inf)
    assert not difference.is_significant
    pairs = torch.full((4,), 2.0).double(), torch.tensor([1.0, 1.1, 0.9, 1.0]).double()
    assert paired_difference(*pairs, torch.ones(4).double()).is_significant
