"""What bit operations cost: BOPs, as HAWQ-V3 and the papers before it count them."""

FLOAT_BITS = 32


def bops(macs: int, weight_bits: int, activation_bits: int) -> int:
    """Bit operations of `macs` multiplications: MACs x weight bits x activation bits."""
    return macs * weight_bits * activation_bits
