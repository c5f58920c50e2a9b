"""Widths of rows against brute force over all of them, and on samples that they are not chosen by."""

import itertools

import pytest
import torch
from torch import Tensor

from hawqfx.maths.row_widths import NEIGHBOURS, OWN, least_sum, row_widths, shrunk

WIDTHS = range(2, 6)


def falling(rows: int, seed: int) -> Tensor:
    """Errors (widths, rows) that fall to about a quarter with each bit, less and less."""
    random = torch.Generator().manual_seed(seed)
    first = torch.rand(rows, generator=random, dtype=torch.float64) + 0.1
    falls = 0.2 + 0.1 * torch.rand(len(WIDTHS) - 1, rows, generator=random, dtype=torch.float64)
    return torch.cat([first[None], first * falls.cumprod(0)])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bits", WIDTHS)
def test_no_other_widths_of_the_same_mean_cost_less(bits: int, seed: int) -> None:
    rows = 5
    errors = falling(rows, seed)
    costs = torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 8

    def total(widths: tuple[int, ...]) -> float:
        return float(sum(errors[width - 2, row] * costs[row] for row, width in enumerate(widths)))

    found = tuple(least_sum(errors, costs, bits, WIDTHS).tolist())
    assert sum(found) == rows * bits
    best = min(map(total, (each for each in itertools.product(WIDTHS, repeat=rows) if sum(each) == rows * bits)))
    assert total(found) == pytest.approx(best, rel=1e-12)


def test_rows_alike_have_the_bits_of_the_format() -> None:
    errors = falling(1, 0).expand(-1, 8)
    assert least_sum(errors, torch.ones(8, dtype=torch.float64), 3, WIDTHS).tolist() == [3] * 8


def zipf(words: int, tokens: int, seed: int) -> Tensor:
    """How often each of the words occurs among so many that are drawn."""
    random = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(1 / (torch.arange(words) + 2.0), tokens, replacement=True, generator=random)
    return torch.bincount(drawn, minlength=words).double()


@pytest.mark.parametrize("order", ["frequent first", "any"])
def test_other_texts_lose_less_than_by_equal_bits(order: str) -> None:
    """2,000 words of Zipf's law, of which 500 tokens have a third: by costs of two halves of them, and judged by a
    million others."""
    words, bits = 2000, 3
    places = torch.randperm(words, generator=torch.Generator().manual_seed(9)) if order == "any" else slice(None)
    halves = torch.stack([zipf(words, 250, seed)[places] for seed in (1, 2)])
    judge, errors = zipf(words, 1_000_000, 3)[places], falling(words, 4)
    found = row_widths(errors, halves, bits, WIDTHS)

    def lost(widths: Tensor) -> float:
        return float((errors.gather(0, widths[None] - 2)[0] * judge).sum())

    equal = lost(torch.full((words,), bits))
    assert int(found.bits.sum()) == words * bits
    assert lost(found.bits) < 0.7 * equal
    # with their own costs alone rare words have the fewest bits, and together these lose more
    assert lost(found.bits) < lost(least_sum(errors, halves.mean(0), bits, WIDTHS))
    assert found.optimism > 1.0
    assert found.own < 1.0
    if order == "any":  # neighbours tell nothing
        assert found.neighbours == 0 or lost(found.bits) < 0.7 * equal


def test_a_single_sample_leaves_equal_bits() -> None:
    found = row_widths(falling(10, 0), zipf(10, 5, 0)[None], 3, WIDTHS)
    assert found.bits.tolist() == [3] * 10
    assert found.optimism == 1.0


def test_costs_go_from_the_mean_to_their_own() -> None:
    costs = torch.tensor([0.0, 0.0, 6.0, 0.0], dtype=torch.float64)
    assert shrunk(costs, 0.0).tolist() == [1.5] * 4
    assert shrunk(costs, 1.0).tolist() == costs.tolist()
    near = shrunk(costs, 0.0, 3)  # means of (0, 0), (0, 0, 6), (0, 6, 0) and (6, 0), and a tenth of 1.5
    assert torch.allclose(near, 0.9 * torch.tensor([0, 2, 2, 3.0], dtype=torch.float64) + 0.15)
    assert max(OWN) < 1.0
    assert all(count % 2 or count == 0 for count in NEIGHBOURS)
