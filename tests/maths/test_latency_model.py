"""The rule that adds up measured seconds, against sums by hand of powers of two, which show their parts."""

import math

import pytest

from hawqfx.maths.formats import DYNAMIC, FLOAT, Format
from hawqfx.maths.latency_model import ConversionTimes, KernelTimes, LatencyModel

EIGHT, FOUR, BLOCKS = Format(8), Format(4), Format(4, "weight-only", 32)
LAYER = KernelTimes("n", ("x", "w", "y"), "w", 1.0, 2.0, 4.0, dynamic=8.0, blockwise=((BLOCKS, 16.0),))
POOL = KernelTimes("p", ("y",), None, 32.0, 64.0, math.nan)


@pytest.mark.parametrize(
    ("x", "w", "y", "kernel", "seconds"),
    [
        (EIGHT, FOUR, EIGHT, "integer", 1.0),
        (FLOAT, FLOAT, FLOAT, "floating", 2.0),
        (EIGHT, FLOAT, EIGHT, "floating", 2.0),
        (EIGHT, FOUR, FLOAT, "unpacking", 4.0),
        (FLOAT, EIGHT, EIGHT, "unpacking", 4.0),
        (DYNAMIC, EIGHT, EIGHT, "dynamic", 8.0),
        (FLOAT, BLOCKS, EIGHT, "blockwise", 16.0),
        (DYNAMIC, BLOCKS, EIGHT, "blockwise", 16.0),
    ],
)
def test_a_layer_runs_as_its_formats_say(x: Format, w: Format, y: Format, kernel: str, seconds: float) -> None:
    formats = {"x": x, "w": w, "y": y}
    assert LAYER.kernel(formats) == kernel
    assert LAYER.seconds(formats) == seconds
    assert LAYER.is_integer(formats) == (kernel == "integer")


@pytest.mark.parametrize(
    ("x", "y", "seconds"),
    [
        (EIGHT, EIGHT, 1 + 32 + 128),  # all in integers; x is made in float
        (EIGHT, FOUR, 1 + 32 + 128 + 4096),  # likewise, and y is cut
        (FOUR, EIGHT, 1 + 32 + 128 + 512),  # likewise, and x is cut
        (FLOAT, EIGHT, 4 + 32 + 1024),  # the layer is in float, and y goes from float to integers
        (EIGHT, FLOAT, 4 + 64 + 128 + 256),  # it is in float, and x goes to integers and back
        (FLOAT, FLOAT, 4 + 64),
        (DYNAMIC, EIGHT, 8 + 32 + 1024),  # no conversion of its own: the kernel has it
    ],
)
def test_conversions_lie_where_float_meets_integers(x: Format, y: Format, seconds: float) -> None:
    into = ConversionTimes("x", None, ("n",), quantize=128.0, dequantize=256.0, clip=512.0)
    between = ConversionTimes("y", "n", ("p",), quantize=1024.0, dequantize=2048.0, clip=4096.0)
    model = LatencyModel(0.5, (LAYER, POOL), (into, between), "")
    assert model.seconds({"x": x, "w": EIGHT, "y": y}) == 0.5 + seconds
    assert model.sites == {"x", "w", "y"}


def test_a_reader_that_is_always_in_float_takes_a_conversion_once() -> None:
    for readers, times in {("n", None): 1, (None, None): 1, ("n",): 0, (): 0}.items():
        tensor = ConversionTimes("y", "n", readers, quantize=1024.0, dequantize=2048.0, clip=4096.0)
        model = LatencyModel(0.0, (LAYER,), (tensor,), "")
        assert model.seconds(dict.fromkeys(("x", "w", "y"), EIGHT)) == 1.0 + 2048.0 * times
