"""Packed integers of 1 to 8 bits, signed, in two's complement.

Portable packing is one bit stream: bit 0 of every code, then bit 1 of every code, ... (bit-planes), least significant
bit of each byte first.  n codes of b bits take ceil(n b / 8) bytes, so a tensor is rounded up by less than a byte.
8 bits are whole bytes, stored as they are.

Native packing splits a code of b bits into a signed high part that ONNX has a type for, and the bits that remain:

    b   2     3           4     5           6             7                   8
        int2  int2 + bit  int4  int4 + bit  int4 + uint2  int4 + uint2 + bit  int8

code = high * 2^(b-h) + uint2 * 2^(bit present) + bit.  Each part is rounded up by less than a byte.

Rows of a weight that have bits of their own are one bit stream too, row after row, and within a row bit 0 of every
code, then bit 1, ... (the portable packing of each row, without gaps), with a byte for each row that tells its bits.
A row of one bit has the codes -1 and 1, of which bit 0 is always 1: it is not stored, but for a row of ones that comes
before all others; bit 1 is.

Blocks are stored as the kernel of onnxruntime's MatMulNBits reads 2, 4 or 8 bits: code + 2^(b-1), 8 / b to a byte, the
first in the lowest bits.  For 3 bits the portable or native packing of whole blocks comes before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hawqfx.maths.formats import blocks

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]


def packed_bytes(count: int, bits: int) -> int:
    """The bytes of `count` codes of `bits` bits in the portable packing."""
    return -(-count * bits // 8)


def pack(codes: Codes, bits: int) -> Bytes:
    """The portable packing of codes: their bit-planes.

    Args:
        codes: int8, of any shape.
        bits: bits of a code.

    Returns:
        (ceil(n bits / 8),) for n codes.

    Raises:
        ValueError: if a code does not fit.
    """
    _check_range(codes, bits)
    planes = (codes.reshape(1, -1).view(np.uint8) >> np.arange(bits, dtype=np.uint8)[:, None]) & 1
    return np.packbits(planes.reshape(-1), bitorder="little")


def pack_rows(codes: Codes, rows: Sequence[int]) -> Bytes:
    """The packing of rows that have bits of their own.

    Args:
        codes: int8, (C, ...).
        rows: bits of the codes of each row, 1 to 8.

    Returns:
        (row_bytes(rows, columns),).

    Raises:
        ValueError: if a code does not fit.
    """
    widths, flat = np.asarray(rows), codes.reshape(len(codes), -1)
    signs = widths == 1
    if not (np.abs(flat[signs]) == 1).all():
        raise ValueError("a code of one bit is neither -1 nor 1")
    for bits in np.unique(widths[~signs]):
        _check_range(flat[widths == bits], int(bits))
    planes = (flat.view(np.uint8)[:, None] >> np.arange(8, dtype=np.uint8)[:, None]) & 1  # (C, 8, columns)
    planes[signs, 0] = planes[signs, 1]
    stored = planes[np.arange(8) < widths[:, None]].reshape(-1, flat.shape[1])
    return np.packbits(np.concatenate([np.ones_like(stored[:1]), stored]).reshape(-1), bitorder="little")


def row_bytes(rows: Sequence[int], columns: int) -> int:
    """The bytes of rows of so many codes, that have bits of their own."""
    return packed_bytes((1 + sum(rows)) * columns, 1)


def plane_values(bits: int) -> NDArray[np.int32]:
    """(bits,): the value of a one in every bit-plane: 1, 2, 4, ..., and -2^(bits-1) for the sign."""
    values = 1 << np.arange(bits, dtype=np.int32)
    values[-1] = -values[-1]
    return values


@dataclass(frozen=True)
class NativeParts:
    """The bits of the native parts of a code.

    Args:
        high: of the signed high part.
        pair: of the unsigned pair: 2, or 0 without a pair.
        bit: of the single bit: 1, or 0 without it.
    """

    high: int
    pair: int
    bit: int


NATIVE: dict[int, NativeParts] = {
    2: NativeParts(2, 0, 0),
    3: NativeParts(2, 0, 1),
    4: NativeParts(4, 0, 0),
    5: NativeParts(4, 0, 1),
    6: NativeParts(4, 2, 0),
    7: NativeParts(4, 2, 1),
    8: NativeParts(8, 0, 0),
}


def split(codes: Codes, bits: int) -> tuple[Codes, Bytes, Bytes]:
    """The native parts of codes, unpacked.

    Args:
        codes: int8, of any shape.
        bits: bits of a code.

    Returns:
        The parts high, pair and bit in the shape of `codes`; a part that the code does not have is zero.

    Raises:
        ValueError: if a code does not fit.
    """
    _check_range(codes, bits)
    parts = NATIVE[bits]
    wide = codes.astype(np.int16)
    high = wide >> (parts.pair + parts.bit)
    pair = (wide >> parts.bit) & ((1 << parts.pair) - 1)
    bit = wide & ((1 << parts.bit) - 1)
    return high.astype(np.int8), pair.astype(np.uint8), bit.astype(np.uint8)


def fill_blocks(codes: Codes, block: int) -> Codes:
    """Codes (N, K) as (N, blocks, block); zeros fill up the last block of a row."""
    rows, columns = codes.shape
    filled = np.zeros((rows, blocks(columns, block) * block), np.int8)
    filled[:, :columns] = codes
    return filled.reshape(rows, -1, block)


def pack_blocks(codes: Codes, bits: int, block: int) -> Bytes:
    """The packing of blocks of codes of 2, 4 or 8 bits.

    Args:
        codes: (N, K).
        bits: bits of a code.
        block: codes of a block.

    Returns:
        (N, blocks, bits * block / 8).

    Raises:
        ValueError: if a code does not fit.
    """
    _check_range(codes, bits)
    unsigned = (fill_blocks(codes, block).astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    parts = unsigned.reshape(*unsigned.shape[:2], -1, 8 // bits) << np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(parts, axis=-1)


def _check_range(codes: Codes, bits: int) -> None:
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if codes.size and (int(codes.min()) < low or int(codes.max()) > high):
        raise ValueError(f"codes from {codes.min()} to {codes.max()} do not fit {bits} signed bits ({low} to {high})")
