"""What a width stands for: the bits of a tensor, and the scheme by which a layer computes with it.

A width is an int, under which everything is known of a site at that choice.

    2 to 8      static: the quantizer is fixed by calibration, layers run on integer kernels
    BLOCKWISE   of a weight, weight-only: 4 bits, with a scale for each block of BLOCK inputs of an output channel;
                the kernel reads the bits as they are stored, and rounds what it multiplies them by to 8 bits in blocks
    DYNAMIC     of an activation: 8 bits in a range that is taken from the values of each run
    32          float

Wider ones lose less.
"""

from typing import Literal

from hawqfx.maths.pricing import FLOAT_BITS

Scheme = Literal["static", "dynamic", "weight-only", "float"]

BLOCK = 128
_MORE = 16
BLOCKWISE, DYNAMIC = 4 + _MORE, 8 + _MORE


def bits_of(width: int) -> int:
    """How many bits an element has."""
    return width - _MORE if width in (BLOCKWISE, DYNAMIC) else width


def is_static(width: int) -> bool:
    return width < _MORE


def scheme(width: int) -> Scheme:
    if width == BLOCKWISE:
        return "weight-only"
    if width == DYNAMIC:
        return "dynamic"
    return "float" if width == FLOAT_BITS else "static"


def layer_scheme(weight: int, activation: int) -> Scheme:
    """How a layer computes, by the widths of its weight and of what it reads.  A weight that is quantized for integer
    kernels and meets floats is multiplied in float."""
    if weight == BLOCKWISE:
        return "weight-only"
    return scheme(activation) if is_static(weight) else "float"


def width_of(bits: int, how: str) -> int:
    """The width that has so many bits and this scheme.  Raises ValueError if there is none."""
    for width in (*range(2, 9), BLOCKWISE, DYNAMIC, FLOAT_BITS):
        if (bits_of(width), scheme(width)) == (bits, how):
            return width
    raise ValueError(f"there is no width of {bits} bits, {how}")


def described(width: int) -> str:
    """A width as a reader has it."""
    if width == BLOCKWISE:
        return f"{bits_of(width)} bits in blocks"
    if width == DYNAMIC:
        return f"{bits_of(width)} bits, dynamic"
    return "float" if width == FLOAT_BITS else f"{width} bits"


def blocks(columns: int) -> int:
    """How many blocks a row of so many inputs has; the last may be short."""
    return -(-columns // BLOCK)
