"""The processors that a file is made for, as far as the numbers depend on them.

On x86 without VNNI, onnxruntime multiplies unsigned activations by signed weights with vpmaddubsw, which adds two
products in 16 bits and saturates there: 255 * 127 * 2 does not fit, 255 * 64 * 2 does.  Weights within 7 bits never
saturate.
"""

from collections.abc import Mapping, Sequence

from hawqfx.errors import HawqfxError
from hawqfx.maths.pricing import FLOAT_BITS

# the widest weights whose sums are exact there; "any" has VNNI, is an ARM processor or a GPU
WIDEST: Mapping[str, int] = {"any": 8, "x86-avx2": 7}


def exact_widths(target: str, widths: Sequence[int]) -> tuple[int, ...]:
    """Those of the widths of weights that compute exactly on the target.  Raises HawqfxError if there are none."""
    if target not in WIDEST:
        raise HawqfxError(f"target={target!r}: must be one of {', '.join(WIDEST)}")
    kept = tuple(bits for bits in widths if bits <= WIDEST[target] or bits == FLOAT_BITS)
    if not kept:
        raise HawqfxError(
            f"target={target!r} takes weights of at most {WIDEST[target]} bits, and there are only {tuple(widths)}"
        )
    return kept
