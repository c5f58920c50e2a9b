"""Keeps freed memory in the process during a measurement.

glibc gives a large block back to the system as soon as its tensor is freed, and the next large tensor takes the pages
again, one page fault for each.  A Hessian-vector product of ResNet-50 allocates and frees gigabytes, and these faults
take more time than its arithmetic.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt, from malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # bytes; the limit of glibc, which its own adaptation reaches with time
_NEVER_TRIM = 2**31 - 1


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Keeps blocks below 32 MB that are freed in the context in the process until its end, and gives those back that
    were freed before.  Without glibc it does nothing."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        yield
        return
    trim(0)  # what was freed before: rounding of a language model leaves gigabytes
    mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    mallopt(_TRIM_THRESHOLD, _NEVER_TRIM)
    try:
        yield
    finally:
        mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)  # glibc's own ratio to the mmap threshold
        trim(0)
