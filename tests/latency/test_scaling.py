"""The fit of the parts to the whole network, on sums that are known."""

import math

import pytest

from hawqfx.latency.scaling import Scales, fit, parted, scaled
from hawqfx.maths.formats import FLOAT, Format, blockwise
from hawqfx.maths.latency_model import ConversionTimes, KernelTimes, LatencyModel


def test_float_parts_stay_as_they_were_timed() -> None:
    """In ms: 10 in float, of which the parts take 8; 6 at 8 bits, of which the parts take 2."""
    assert fit(10.0, 6.0, 8.0, 2.0) == Scales(1.0, 2.0, 2.0)


def test_what_a_quantized_network_leaves_in_float_scales_as_float() -> None:
    """10 in float, of which the parts take 8; of 6 quantized, 1 is in float and 2 are not."""
    assert fit(10.0, 6.0, 8.0, 2.0, 1.0) == Scales(1.0, 1.5, 2.0)
    scales = fit(10.0, 6.0, 20.0, 5.0, 4.0)
    assert scales.floating * 20 + scales.rest == pytest.approx(10)
    assert scales.floating * 4 + scales.integer * 5 + scales.rest == pytest.approx(6)


def test_parts_in_float_are_told_from_the_others() -> None:
    """Of a layer in each way in which it runs, and a conversion."""
    kernel = KernelTimes("n", ("x", "w"), "w", 1.0, 2.0, 4.0, 8.0, ((blockwise(4, 32), 16.0),))
    parts = LatencyModel(0.0, (kernel,), (ConversionTimes("x", None, (None,), 32.0, 64.0, 128.0),), "")
    found = [
        parted(parts, {"x": x, "w": w})
        for x, w in ((FLOAT, FLOAT), (FLOAT, Format(8)), (FLOAT, blockwise(4, 32)), (Format(8), Format(8)))
    ]
    assert found == [(2.0, 0.0), (4.0, 0.0), (0.0, 16.0), (0.0, 1.0 + 32.0 + 64.0)]


def test_float_parts_that_exceed_the_network_shrink() -> None:
    scales = fit(10.0, 6.0, 20.0, 5.0)
    assert scales.floating == pytest.approx(0.49)
    assert scales.floating * 20 + scales.rest == pytest.approx(10)
    assert scales.integer * 5 + scales.rest == pytest.approx(6)
    assert scales.plausible


def test_an_implausible_factor_takes_the_remainder_nearest_to_both() -> None:
    """The integer parts alone would have to take 9 times as long; with any other remainder one factor is farther."""
    scales = fit(10.0, 9.0, 10.0, 1.0)
    assert scales.floating * 10 + scales.rest == pytest.approx(10)
    assert scales.integer * 1 + scales.rest == pytest.approx(9)
    cost = math.log(scales.floating) ** 2 + math.log(scales.integer) ** 2
    others = ((10 - rest) / 10 for rest in (scales.rest - 0.1, scales.rest + 0.1))
    assert all(math.log(x) ** 2 + math.log(10 * x - 1) ** 2 >= cost for x in others)


def test_a_network_without_parts_is_all_remainder() -> None:
    assert fit(10.0, 6.0, 0.0, 2.0) == Scales(1.0, 1.0, 10.0)


def test_conversions_scale_as_integer_parts() -> None:
    kernel = KernelTimes("n", ("w", "x"), "w", integer=1.0, floating=2.0, unpacking=3.0, dynamic=4.0)
    parts = LatencyModel(0.0, (kernel,), (ConversionTimes("x", None, ("n",), 1.0, 2.0, 3.0),), "")
    model = scaled(parts, Scales(floating=0.5, integer=2.0, rest=7.0))
    expected = KernelTimes("n", ("w", "x"), "w", integer=2.0, floating=1.0, unpacking=1.5, dynamic=8.0)
    assert model.timed == (expected,)
    assert model.timed[0].blockwise == ()
    assert model.converted == (ConversionTimes("x", None, ("n",), 2.0, 4.0, 6.0),)
    assert (model.rest, model.setting) == (7.0, "")
