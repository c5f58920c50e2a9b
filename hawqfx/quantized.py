"""What a site's tensor becomes at a width: the very values that the lowered graph computes with."""

import torch
from torch import Tensor

from hawqfx.facts import Quantizers, Rounding
from hawqfx.maths import affine
from hawqfx.ops import dequantize
from hawqfx.program import Program


def weight_at(program: Program, key: str, bits: int) -> Tensor:
    """The weight as its rounding left it, in its own type."""
    codes = program.facts.get(key, Rounding).codes[bits]
    quantizer = program.facts.get(key, Quantizers).by_bits[bits]
    return dequantize(codes, torch.tensor(quantizer.scale, device=codes.device)).to(program.tensor(key).dtype)


def activation_at(program: Program, key: str, bits: int, x: Tensor) -> Tensor:
    """`x` through the activation's quantizer."""
    quantizer = program.facts.get(key, Quantizers).by_bits[bits]
    scale = torch.tensor(quantizer.scale[0], device=x.device)
    return affine.fake_quantize(x, scale, quantizer.zero_point, quantizer.low, quantizer.high)
