"""Scales of blocks by cost: against every candidate, and against least squares."""

import itertools

import torch
from torch import Tensor

from hawqfx.maths import affine
from hawqfx.maths.block_scales import settled_scales, weighted_scales

FACTORS = (1.0, 0.7, 0.85, 1.1)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_no_candidate_costs_less() -> None:
    rows, costs, ends = _randn(4, 10), _randn(10, seed=1).square(), affine.signed_range(3)
    scale = affine.block_scales(rows.float(), 3, 4).double()
    found = weighted_scales(rows, scale, ends, costs, 4, FACTORS)
    for row, block in itertools.product(range(4), range(3)):
        columns = slice(4 * block, min(10, 4 * block + 4))  # the last block has two

        def cost(step: float, row: int = row, columns: slice = columns) -> float:
            left = (rows[row, columns] / step).round().clamp(*ends) * step - rows[row, columns]
            return float((left.square() * costs[columns]).sum())

        tried = [float((sign * factor * scale[row, block]).bfloat16()) for factor in FACTORS for sign in (1, -1)]
        assert float(found[row, block]) in tried
        assert cost(float(found[row, block])) <= min(map(cost, tried)) * (1 + 1e-12)  # of float64 sums


def test_blocks_without_values_keep_their_scale() -> None:
    scale = torch.full((2, 2), torch.finfo(torch.bfloat16).tiny, dtype=torch.float64)
    rows, costs = torch.zeros(2, 8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    assert torch.equal(weighted_scales(rows, scale, (-4, 3), costs, 4, FACTORS), scale)
    assert torch.equal(settled_scales(rows, rows, scale, torch.eye(8, dtype=torch.float64), 4), scale)


def test_a_single_block_settles_at_least_squares() -> None:
    """Of 8 bits of mantissa: half a unit in the last place is one part in 256 at the most."""
    rows, inputs = _randn(5, 6), _randn(40, 6, seed=1)
    moment, scale = inputs.T @ inputs / 40, torch.full((5, 1), 0.5, dtype=torch.float64)
    codes = (rows / 0.4).round()
    found = settled_scales(codes, rows, scale, moment, 8)
    for row in range(5):
        best = torch.linalg.lstsq((inputs @ codes[row])[:, None], (inputs @ rows[row])[:, None]).solution
        assert abs(float(found[row] / best) - 1) <= 1 / 256


def test_no_error_of_a_row_rises() -> None:
    rows, inputs = _randn(30, 20), _randn(100, 20, seed=1) @ _randn(20, 20, seed=2)
    moment, scale = inputs.T @ inputs / 100, affine.block_scales(rows.float(), 2, 8).double()
    codes = (rows / affine.along_channels(scale, rows)).round().clamp(-2, 1)

    def errors(scale: Tensor) -> Tensor:
        left = codes * affine.along_channels(scale, rows) - rows
        return ((left @ moment) * left).sum(1)

    found = settled_scales(codes, rows, scale, moment, 8)
    assert torch.equal(found, found.bfloat16().double())
    assert bool((errors(found) <= errors(scale) * (1 + 1e-12)).all())  # of float64 sums
    assert float(errors(found).sum()) < 0.9 * float(errors(scale).sum())
