"""Packed bytes against a bit stream written out in Python integers, and native parts against their definition."""

import random

import numpy as np
import pytest

from hawqfx.maths.packing import NATIVE, Codes, pack, pack_rows, packed_bytes, plane_values, row_bytes, split

WIDTHS = range(2, 9)


def _every_code(bits: int) -> list[int]:
    return list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))


def _some_codes(count: int, bits: int) -> list[int]:
    return random.Random(100 * bits + count).choices(_every_code(bits), k=count)


def _reference(codes: list[int], bits: int) -> bytes:
    """One big integer whose bit p n + i is bit p of code i modulo 2^bits, as little-endian bytes."""
    stream = 0
    for position in range(bits):
        for i, code in enumerate(codes):
            stream += ((code % 2**bits) // 2**position % 2) * 2 ** (position * len(codes) + i)
    return stream.to_bytes(-(-len(codes) * bits // 8), "little")


def _unpack(packed: bytes, count: int, bits: int) -> list[int]:
    codes = []
    for i in range(count):
        places = [position * count + i for position in range(bits)]
        unsigned = sum((packed[place // 8] // 2 ** (place % 8) % 2) * 2**p for p, place in enumerate(places))
        codes.append(unsigned - 2**bits if unsigned >= 2 ** (bits - 1) else unsigned)
    return codes


def _array(codes: list[int]) -> Codes:
    return np.array(codes, np.int8)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 33])
@pytest.mark.parametrize("bits", WIDTHS)
def test_bytes_are_the_reference_stream(bits: int, count: int) -> None:
    codes = _some_codes(count, bits)
    packed = pack(_array(codes), bits)
    assert packed.dtype == np.uint8
    assert packed.tobytes() == _reference(codes, bits)
    assert len(packed) == packed_bytes(count, bits) == (count * bits + 7) // 8
    assert _unpack(packed.tobytes(), count, bits) == codes


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_survives(bits: int) -> None:
    codes = _every_code(bits)
    packed = pack(_array(codes), bits).tobytes()
    assert packed == _reference(codes, bits)
    assert _unpack(packed, len(codes), bits) == codes


def test_a_stream_by_hand() -> None:
    """1, -2, -1 are 01, 10, 11: low bits 1 0 1, high bits 0 1 1, least significant first 0b110101."""
    assert pack(_array([1, -2, -1]), 2).tolist() == [0b110101]


@pytest.mark.parametrize("bits", WIDTHS)
def test_shape_and_memory_order_do_not_matter(bits: int) -> None:
    codes = _some_codes(24, bits)
    cube = _array(codes).reshape(2, 3, 4)
    expected = _reference(codes, bits)
    assert pack(cube, bits).tobytes() == expected
    assert pack(np.asfortranarray(cube), bits).tobytes() == expected
    spread = np.repeat(_array(codes), 2)[::2]
    assert not spread.flags.c_contiguous
    assert pack(spread, bits).tobytes() == expected


@pytest.mark.parametrize("bits", WIDTHS)
def test_plane_values_add_up_to_the_code(bits: int) -> None:
    values = plane_values(bits).tolist()
    assert len(values) == bits
    for code in _every_code(bits):
        assert sum(value * (code % 2**bits // 2**p % 2) for p, value in enumerate(values)) == code


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("side", ["below", "above"])
def test_out_of_range_is_refused(bits: int, side: str) -> None:
    outside = -(2 ** (bits - 1)) - 1 if side == "below" else 2 ** (bits - 1)
    codes = _array([0, outside, 0])
    with pytest.raises(ValueError, match=f"do not fit {bits} signed bits"):
        pack(codes, bits)
    with pytest.raises(ValueError, match=f"do not fit {bits} signed bits"):
        split(codes, bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_native_parts_make_up_every_code(bits: int) -> None:
    parts, codes = NATIVE[bits], _every_code(bits)
    assert parts.high + parts.pair + parts.bit == bits
    assert parts.high in (2, 4, 8)  # the signed integer types of ONNX
    assert parts.pair in (0, 2)
    assert parts.bit in (0, 1)
    arrays = split(_array(codes).reshape(2, -1), bits)
    assert [a.dtype for a in arrays] == [np.int8, np.uint8, np.uint8]
    assert {a.shape for a in arrays} == {(2, len(codes) // 2)}
    high, pair, bit = (a.reshape(-1).tolist() for a in arrays)
    rebuilt = zip(high, pair, bit, strict=True)
    assert [h * 2 ** (parts.pair + parts.bit) + p * 2**parts.bit + b for h, p, b in rebuilt] == codes
    assert set(high) == set(_every_code(parts.high))  # all of the signed type, and no more
    assert set(pair) == set(range(2**parts.pair))
    assert set(bit) == set(range(2**parts.bit))


@pytest.mark.parametrize("columns", [1, 7, 8, 33])
def test_rows_with_bits_of_their_own_are_the_portable_packing_of_each(columns: int) -> None:
    """One after another, without gaps, after a row of ones."""
    rows = [*WIDTHS, 2, 8, 3]
    codes = [_some_codes(columns, bits) for bits in rows]
    stream, at = (1 << columns) - 1, columns
    for bits, row in zip(rows, codes, strict=True):
        stream += int.from_bytes(_reference(row, bits), "little") << at
        at += bits * columns
    packed = pack_rows(np.array(codes, np.int8), rows)
    assert packed.tobytes() == stream.to_bytes(row_bytes(rows, columns), "little")


def test_a_row_of_one_bit_is_its_signs() -> None:
    packed = pack_rows(np.array([[1, -1, -1, 1], [0, -2, 1, -1]], np.int8), (1, 2))
    # from the lowest bit: ones; the signs; bit 0 of the other row, and bit 1
    assert packed.tolist() == [0b0110_1111, 0b1010_1100]
    with pytest.raises(ValueError, match="neither -1 nor 1"):
        pack_rows(np.array([[1, 0]], np.int8), (1,))


def test_a_code_that_its_row_has_no_bits_for_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit 2 signed bits"):
        pack_rows(np.array([[3], [2]], np.int8), (3, 2))
