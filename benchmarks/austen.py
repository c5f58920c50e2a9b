"""Jane Austen's novels, out of the database of an R package (the extra `bench`).

R keeps a package's data as compressed objects, one after another in a file, and where each lies in another.
"""

import bz2
import gzip
import lzma
import zlib
from pathlib import Path
from typing import Any

import rdata

_LZMA2 = [{"id": lzma.FILTER_LZMA2, "preset": 6}]


def novel(database: Path, name: str) -> str:
    """The text of one novel.

    Args:
        database: `Rdata.rdb`, beside which lies the index `Rdata.rdx`.
        name: such as "emma".
    """
    index = _object(gzip.decompress(database.with_suffix(".rdx").read_bytes()))
    start, length = map(int, index["variables"][name])
    lines = _object(_decompressed(database.read_bytes()[start : start + length]))
    return "\n".join(map(str, lines))


def _object(serialized: bytes) -> Any:
    return rdata.conversion.convert(rdata.parser.parse_data(serialized))


def _decompressed(chunk: bytes) -> bytes:
    """An object's bytes: its size, a letter for the compression where that is not zlib, and what is compressed."""
    match chunk[4:5]:
        case b"2":
            return bz2.decompress(chunk[5:])
        case b"Z":
            return lzma.decompress(chunk[5:], format=lzma.FORMAT_RAW, filters=_LZMA2)
        case _:
            return zlib.decompress(chunk[4:])
