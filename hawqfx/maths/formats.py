"""Number formats: the bits of a tensor's elements, and the scheme by which a layer computes with them.

    scheme        bits      tensor
    static        2 to 8    calibration fixes the quantizer; layers run on integer kernels
    weight-only   4         a weight with a scale for each block of BLOCK inputs of an output channel; the kernel reads
                            the packed bits, and rounds the activations that it multiplies them by to 8 bits in blocks
    dynamic       8         an activation whose range is taken from its values in each run
    float         32        not quantized

Formats are ordered: within a scheme by bits, and from static to float.  A later format of a site loses less.
"""

from dataclasses import dataclass
from functools import total_ordering
from typing import Literal, get_args

Scheme = Literal["static", "weight-only", "dynamic", "float"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)

BLOCK = 128  # inputs that share a scale in the scheme "weight-only"
FLOAT_BITS = 32
STATIC_BITS = range(2, 9)


@total_ordering
@dataclass(frozen=True)
class Format:
    """The number format of one site.

    Args:
        bits: bits of an element.
        scheme: how the tensor is quantized; see the module.
    """

    bits: int
    scheme: Scheme = "static"

    def __lt__(self, other: "Format") -> bool:
        return self._rank < other._rank

    @property
    def _rank(self) -> tuple[int, int]:
        return SCHEMES.index(self.scheme), self.bits

    @property
    def is_static(self) -> bool:
        return self.scheme == "static"

    @property
    def is_float(self) -> bool:
        return self.scheme == "float"

    def __str__(self) -> str:
        """The format in words, such as "4 bits", "4 bits in blocks", "8 bits, dynamic" or "float"."""
        if self.is_float:
            return "float"
        return f"{self.bits} bits" + {"weight-only": " in blocks", "dynamic": ", dynamic"}.get(self.scheme, "")


FLOAT = Format(FLOAT_BITS, "float")
BLOCKWISE = Format(4, "weight-only")
DYNAMIC = Format(8, "dynamic")


def format_of(bits: int) -> Format:
    """The format that a user names by its bits: static for 2 to 8, float for 32.

    Raises:
        ValueError: if there is no such format.
    """
    if bits == FLOAT_BITS:
        return FLOAT
    if bits in STATIC_BITS:
        return Format(bits)
    raise ValueError(f"there is no format of {bits} bits: bits are 2 to 8, or 32 for float")


def known_format(bits: int, scheme: str) -> Format:
    """The format with these bits and this scheme.

    Raises:
        ValueError: if there is no such format.
    """
    for known in (*map(Format, STATIC_BITS), BLOCKWISE, DYNAMIC, FLOAT):
        if (known.bits, known.scheme) == (bits, scheme):
            return known
    raise ValueError(f"there is no format of {bits} bits, {scheme}")


def layer_scheme(weight: Format, activation: Format) -> Scheme:
    """The scheme by which a layer computes, from the formats of its weight and of its input.

    A static weight that meets a float input is multiplied in float.
    """
    if weight == BLOCKWISE:
        return "weight-only"
    return activation.scheme if weight.is_static else "float"


def blocks(columns: int) -> int:
    """The number of blocks in a row of so many inputs; the last block may be short."""
    return -(-columns // BLOCK)


def bit_operations(macs: int, weight_bits: int, activation_bits: int) -> int:
    """BOPs of `macs` multiplications: MACs x weight bits x activation bits, as HAWQ-V3 counts them."""
    return macs * weight_bits * activation_bits
