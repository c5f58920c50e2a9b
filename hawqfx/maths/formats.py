"""Number formats: the bits of a tensor's elements, and the scheme by which a layer computes with them.

    scheme        bits      tensor
    static        2 to 8    calibration fixes the quantizer; layers run on integer kernels
    weight-only   2, 3,     a weight with a scale for each block of 32, 64 or 128 inputs of an output channel; a kernel
                  4, 8      reads packed bits, and rounds the activations that it multiplies them by to 8 bits in
                            blocks; rows of a table are looked up in the same bits
    dynamic       8         an activation whose range is taken from its values in each run
    float         32        not quantized

Formats are ordered: within a scheme by bits, then from long blocks to short ones, and from static to float.  A later
format of a site loses less.

onnxruntime's kernels of weight-only layers read 2, 4 or 8 bits (MatMulNBits; at one sample, blocks of 32 to 128 differ
by half in time, and 16 or 256 have no fast kernel at 2 bits: benchmarks/weight_only.py).  3 bits are stored in 3, and
unpacked into the 4 of the kernel when the file is loaded.
"""

from dataclasses import dataclass
from functools import total_ordering
from typing import Literal, get_args

Scheme = Literal["static", "weight-only", "dynamic", "float"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)

BLOCKS = (32, 64, 128)  # inputs that share a scale in the scheme "weight-only"
BLOCKWISE_BITS = (2, 3, 4, 8)
FLOAT_BITS = 32
STATIC_BITS = range(2, 9)


@total_ordering
@dataclass(frozen=True)
class Format:
    """The number format of one site.

    Args:
        bits: bits of an element.
        scheme: how the tensor is quantized; see the module.
        block: inputs that share a scale in the scheme "weight-only", else 0.
    """

    bits: int
    scheme: Scheme = "static"
    block: int = 0

    def __lt__(self, other: "Format") -> bool:
        return self._rank < other._rank

    @property
    def _rank(self) -> tuple[int, int, int]:
        return SCHEMES.index(self.scheme), self.bits, -self.block

    @property
    def is_static(self) -> bool:
        return self.scheme == "static"

    @property
    def is_blockwise(self) -> bool:
        return self.scheme == "weight-only"

    @property
    def is_float(self) -> bool:
        return self.scheme == "float"

    def __str__(self) -> str:
        """The format in words, such as "4 bits", "4 bits in blocks of 128", "8 bits, dynamic" or "float"."""
        if self.is_float:
            return "float"
        how = {"weight-only": f" in blocks of {self.block}", "dynamic": ", dynamic"}
        return f"{self.bits} bits" + how.get(self.scheme, "")


FLOAT = Format(FLOAT_BITS, "float")
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


def blockwise(bits: int, block: int) -> Format:
    """The weight-only format of so many bits in blocks of so many inputs."""
    return Format(bits, "weight-only", block)


def kernel_bits(bits: int) -> int:
    """The bits in which onnxruntime's kernel reads the codes of a weight-only layer."""
    return next(width for width in (2, 4, 8) if width >= bits)


def known_format(bits: int, scheme: str, block: int = 0) -> Format:
    """The format with these bits, this scheme and blocks of so many inputs.

    Raises:
        ValueError: if there is no such format.
    """
    blocks = [blockwise(bits, block) for bits in BLOCKWISE_BITS for block in BLOCKS]
    for known in (*map(Format, STATIC_BITS), *blocks, DYNAMIC, FLOAT):
        if (known.bits, known.scheme, known.block) == (bits, scheme, block):
            return known
    raise ValueError(f"there is no format of {bits} bits, {scheme}" + f", in blocks of {block}" * bool(block))


def layer_scheme(weight: Format, activation: Format) -> Scheme:
    """The scheme by which a layer computes, from the formats of its weight and of its input.

    A static weight that meets a float input is multiplied in float.
    """
    if weight.is_blockwise:
        return "weight-only"
    return activation.scheme if weight.is_static else "float"


def blocks(columns: int, block: int) -> int:
    """The number of blocks in a row of so many inputs; the last block may be short."""
    return -(-columns // block)


def bit_operations(macs: int, weight_bits: int, activation_bits: int) -> int:
    """BOPs of `macs` multiplications: MACs x weight bits x activation bits, as HAWQ-V3 counts them."""
    return macs * weight_bits * activation_bits
