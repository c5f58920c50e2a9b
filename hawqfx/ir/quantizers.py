"""A site's tensor in a format: the very values that the lowered graph computes with."""

import torch
from torch import Tensor

from hawqfx.ir.custom_ops import dequantize
from hawqfx.ir.facts import Quantizers, QuantParams, RoundedWeights
from hawqfx.ir.program import Program
from hawqfx.maths import affine
from hawqfx.maths.formats import Format


def weight_at(program: Program, key: str, width: Format) -> Tensor:
    """The weight as its rounding left it, in its own type."""
    codes = program.facts.get(key, RoundedWeights).codes[width]
    quantizer = program.facts.get(key, Quantizers).by_format[width]
    return dequantize(codes, scale_of(quantizer).to(codes.device)).to(program.tensor(key).dtype)


def scale_of(quantizer: QuantParams) -> Tensor:
    """The scale of a static or blockwise quantizer, in the shape that hawqfx.maths.affine takes."""
    if not quantizer.per_channel:
        return torch.tensor(quantizer.scale[0])
    scale = torch.tensor(quantizer.scale)
    return scale.reshape(-1, quantizer.blocks) if quantizer.scheme == "weight-only" else scale


def activation_at(program: Program, key: str, width: Format, x: Tensor) -> Tensor:
    """`x` through the activation's quantizer."""
    quantizer = program.facts.get(key, Quantizers).by_format[width]
    if quantizer.scheme == "dynamic":
        return affine.fake_quantize_dynamic(x)
    scale = scale_of(quantizer).to(x.device)
    return affine.fake_quantize(x, scale, quantizer.zero_point, quantizer.low, quantizer.high)
