"""The processors that a file is made for, as far as the results depend on them.

On x86 without VNNI, onnxruntime multiplies unsigned activations by signed weights with vpmaddubsw, which adds two
products in 16 bits and saturates there: 255 * 127 * 2 does not fit, 255 * 64 * 2 does.  Weights within 7 bits never
saturate.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from hawqfx.errors import UsageError
from hawqfx.maths.formats import FLOAT_BITS

# target -> bits of the widest weights whose sums are exact there; "any": with VNNI, an ARM processor, or a GPU
WIDEST: Mapping[str, int] = {"any": 8, "x86-avx2": 7}

_INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")  # of integer kernels
_PROCESSOR = Path("/proc/cpuinfo")


def instructions() -> tuple[str, ...] | None:
    """The instructions of this processor that onnxruntime's integer kernels use, as Linux names them; None on other
    systems, which do not tell."""
    if not _PROCESSOR.is_file():
        return None
    lines = _PROCESSOR.read_text().splitlines()
    known = next(
        (line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "features"))), []
    )
    return tuple(name for name in _INSTRUCTIONS if name in known)


def has_vnni() -> bool:
    """Whether this is known to be a processor with VNNI."""
    return any("vnni" in name for name in instructions() or ())


def exact_widths(target: str, widths: Sequence[int]) -> tuple[int, ...]:
    """The bits of weights that compute exactly on a target.

    Args:
        target: a key of WIDEST.
        widths: bits that weights may have, 32 being float.

    Returns:
        The members of `widths` that are exact, in the same order.

    Raises:
        UsageError: if there is no such target, or if no member is exact.
    """
    if target not in WIDEST:
        raise UsageError(f"target={target!r}: must be one of {', '.join(WIDEST)}")
    kept = tuple(bits for bits in widths if bits <= WIDEST[target] or bits == FLOAT_BITS)
    if not kept:
        raise UsageError(
            f"target={target!r} takes weights of at most {WIDEST[target]} bits, and there are only {tuple(widths)}"
        )
    return kept
