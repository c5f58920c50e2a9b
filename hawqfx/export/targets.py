"""The processors that a file is made for, as far as the results depend on them.

On x86 without VNNI, onnxruntime multiplies unsigned activations by signed codes with vpmaddubsw, which adds two
products in 16 bits and saturates there: 255 * 127 * 2 does not fit, 255 * 64 * 2 does.  Weights within 7 bits never
saturate, and products of two activations do not where both are unsigned.
"""

from collections.abc import Mapping, Sequence

from hawqfx.errors import UsageError
from hawqfx.maths.formats import FLOAT_BITS

ANY, WITHOUT_VNNI = "any", "x86-avx2"
# target -> bits of the widest weights whose sums are exact there; ANY: with VNNI, an ARM processor, or a GPU
WIDEST: Mapping[str, int] = {ANY: 8, WITHOUT_VNNI: 7}


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
