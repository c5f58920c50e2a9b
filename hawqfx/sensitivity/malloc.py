"""Keeps freed memory in the process while measuring.

glibc hands every large block back to the system when a tensor goes, and faults it in again, page by page, for the next
one.  A Hessian-vector product of ResNet-50 makes and drops gigabytes, and spends more time on that than on arithmetic.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # as far as glibc goes; by itself it comes to this with time
_EVERYTHING = 2**31 - 1


@contextmanager
def kept() -> Iterator[None]:
    """Blocks below 32 MB stay with the process until the end; does nothing where there is no glibc."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        yield
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    mallopt(_TRIM_THRESHOLD, _EVERYTHING)
    try:
        yield
    finally:
        mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)  # what glibc sets beside such an mmap threshold
        trim(0)
