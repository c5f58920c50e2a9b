"""Codes from quantized inputs: the moments against all vectors, the target against least squares."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hawqfx.analysis.asymmetric import PairMoments, Recoded, pair_moments, recoded
from hawqfx.frontend.capture import capture
from hawqfx.frontend.data import gather
from hawqfx.maths import affine, rounding
from hawqfx.maths.rounding import SCALES
from hawqfx.pass_manager.manager import run
from hawqfx.passes.find_sites import FindSites
from tests.tools import context

FINE = (-(1 << 20), 1 << 20)  # so many codes that rounding is as good as none


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _moments(exact: Tensor, quantized: Tensor) -> PairMoments:
    """Of vectors (rows, K)."""
    x, z = exact.double(), quantized.double()
    gap = x - z
    second, cross = (each.T @ z / len(z) for each in (z, gap))
    return PairMoments(second[None], cross[None], z.mean(0)[None], gap.mean(0)[None])


def _halves(exact: Tensor, quantized: Tensor) -> list[tuple[float, PairMoments]]:
    return [(0.5, _moments(one, other)) for one, other in zip(exact.chunk(2), quantized.chunk(2), strict=True)]


def _fine(weight: Tensor, known: list[tuple[float, PairMoments]], *, bias: bool, damping: float = 1e-9) -> Recoded:
    scale = torch.full((len(weight),), 1e-4)
    return recoded(weight, scale, FINE, known, 1, damping, bias=bias, scales=(1.0,))


@pytest.mark.parametrize("bias", [False, True])
def test_without_rounding_it_is_the_least_squares_from_quantized_inputs(bias: bool) -> None:
    exact = _randn(400, 6) @ _randn(6, 6, seed=1) + 1
    quantized = exact + 0.3 * (exact @ _randn(6, 6, seed=2)) + 0.1 * _randn(400, 6, seed=3) + 0.5
    weight = _randn(3, 6, seed=4)
    columns = torch.cat([quantized, torch.ones(400, 1)], 1) if bias else quantized
    best = torch.linalg.lstsq(columns.double(), (exact @ weight.T).double()).solution
    found = _fine(weight, _halves(exact, quantized), bias=bias)
    # all that the halves have in common is taken, but for the little that either half has alone
    assert 0.98 < found.part <= 1
    assert torch.allclose(found.weight.double(), best[:6].T, rtol=0, atol=0.05)
    if bias:
        assert found.shift is not None
        # the means agree exactly, whatever the part: of what 2^-20 of a scale, and float32, leave
        wanted, given = (exact @ weight.T).double().mean(0), (quantized.double() @ found.weight.double().T).mean(0)
        assert torch.allclose(given + found.shift, wanted, rtol=0, atol=1e-4)
    else:
        assert found.shift is None


def test_errors_that_the_inputs_do_not_tell_are_not_fitted() -> None:
    """From as many samples as twice the columns, noise would be fitted well, and lose on others."""
    quantized, others = _randn(80, 20), _randn(2000, 20, seed=9)
    exact = quantized + 0.5 * _randn(80, 20, seed=1)
    weight = _randn(4, 20, seed=2)
    found = _fine(weight, _halves(exact, quantized), bias=False)
    fitted = _fine(weight, [(1.0, _moments(exact, quantized))] * 1, bias=False)
    assert fitted.part == 0  # a single half has no judge
    everything = torch.linalg.lstsq(quantized, exact @ weight.T).solution.T
    lost = [float(((others @ (each - weight).T) ** 2).mean()) for each in (found.weight, everything)]
    assert found.part < 0.3
    assert lost[0] < 0.1 * lost[1]


def test_every_row_takes_the_scale_that_leaves_the_least() -> None:
    inputs, weight = _randn(500, 12) @ _randn(12, 12, seed=1), _randn(40, 12, seed=2)
    known, ends = _halves(inputs, inputs), affine.signed_range(3)
    scale = affine.channel_scales(weight, 3)
    alone, chosen = (
        recoded(weight, scale, ends, known, 1, 0.01, bias=False, scales=scales) for scales in ((1.0,), SCALES)
    )
    assert torch.equal(alone.scale, scale)
    assert torch.equal(chosen.codes * chosen.scale[:, None], chosen.weight)
    errors = [_errors(each, weight, known) for each in (alone, chosen)]
    assert bool((errors[1] <= errors[0] * (1 + 1e-6)).all())  # float32 values of the codes
    assert float(errors[1].sum()) < 0.85 * float(errors[0].sum())


def _errors(found: Recoded, weight: Tensor, known: list[tuple[float, PairMoments]]) -> Tensor:
    """Of each row, by the damped moment that it was fitted to."""
    moment = sum(share * each.second[0] for share, each in known)
    assert isinstance(moment, Tensor)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment))
    difference = found.weight.double() - weight.double()
    return ((difference @ damped) * difference).sum(1)


@pytest.mark.parametrize("columns", [64, 80])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_blocks_take_scales_that_leave_less(bits: int, columns: int) -> None:
    """Of channels of unlike size, as those of language models are; the last of 80 columns are half a block."""
    sizes = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=torch.Generator().manual_seed(3))]
    inputs, weight = _randn(2000, columns) * sizes, _randn(50, columns, seed=2)
    known, ends = _halves(inputs, inputs), affine.signed_range(bits)
    scale = affine.block_scales(weight, bits, 32)
    alone, chosen = (
        recoded(weight, scale, ends, known, 1, 0.01, bias=False, scales=scales, block=32) for scales in ((1.0,), SCALES)
    )
    assert torch.equal(alone.scale, scale)
    assert torch.equal(chosen.scale, chosen.scale.bfloat16().float())
    assert torch.equal(chosen.codes * affine.along_channels(chosen.scale, weight), chosen.weight)
    assert int(chosen.codes.min()) >= ends[0]
    assert int(chosen.codes.max()) <= ends[1]
    errors = [float(_errors(each, weight, known).sum()) for each in (alone, chosen)]
    assert errors[1] < 0.85 * errors[0]


@pytest.mark.parametrize(("groups", "stride", "padding"), [(1, 1, 1), (2, 2, 0), (4, 1, 2)])
def test_moments_are_those_of_all_patches(groups: int, stride: int, padding: int) -> None:
    """Small enough for all to be taken."""
    layer = torch.nn.Conv2d(4, 8, 3, stride=stride, padding=padding, groups=groups)
    exact = _randn(6, 4, 7, 7)
    quantized = exact + 0.2 * _randn(6, 4, 7, 7, seed=1)
    program = capture(torch.nn.Sequential(layer, torch.nn.Flatten()).eval(), gather([exact])[0])
    found = run([FindSites()], program, context([exact]))
    (use,) = found.layers
    node = next(node for node in found.graph.graph.nodes if node.name == use.node)
    batches = [(exact[:4], quantized[:4]), (exact[4:], quantized[4:])]
    moments = pair_moments(node, use, layer.weight, batches, [4, 2])
    assert sum(share for share, _ in moments) == pytest.approx(1)
    whole = moments[0][1].mixed(moments[1][1], moments[1][0])
    x, z = (
        F.unfold(each.double(), 3, padding=padding, stride=stride).unflatten(1, (groups, -1)).transpose(0, 1)
        for each in (exact, quantized)
    )
    x, z = (each.transpose(2, 3).flatten(1, 2) for each in (x, z))  # (groups, rows, K)
    rows = x.shape[1]
    assert torch.allclose(whole.second, z.transpose(1, 2) @ z / rows, rtol=1e-4, atol=1e-5)  # products in float32
    assert torch.allclose(whole.cross, (x - z).transpose(1, 2) @ z / rows, rtol=1e-4, atol=1e-5)
    assert torch.allclose(whole.mean, z.mean(1), rtol=1e-5, atol=1e-6)
    assert torch.allclose(whole.gap, (x - z).mean(1), rtol=1e-5, atol=1e-6)


def test_scales_leave_room_for_biases() -> None:
    """Calibration leaves half of the int32 range to biases of narrower steps."""
    assert min(SCALES) > 0.5
    assert SCALES[0] == 1  # of rows that gain nothing
    assert rounding.DAMPING > 0
