"""The tensor of a site in a format: the same values that the lowered graph computes with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hawqfx.ir.custom_ops import dequantize
from hawqfx.ir.facts import Quantizers, QuantParams, RoundedWeights
from hawqfx.ir.program import Program
from hawqfx.ir.sites import Site, WeightSite
from hawqfx.maths import affine
from hawqfx.maths.formats import Format


def weight_at(program: Program, key: str, width: Format) -> Tensor:
    """A weight after rounding.

    Args:
        program: with the facts RoundedWeights and Quantizers.
        key: of the weight's site.
        width: a format other than float.

    Returns:
        The dequantized weight, in the shape and type of the parameter.

    Raises:
        PassError: if a fact is missing.
    """
    codes = program.facts.get(key, RoundedWeights).codes[width]
    quantizer = program.facts.get(key, Quantizers).by_format[width]
    return dequantize(codes, scale_of(quantizer).to(codes.device)).to(program.tensor(key).dtype)


def scale_of(quantizer: QuantParams) -> Tensor:
    """The scale of a static or weight-only quantizer, in a shape that hawqfx.maths.affine takes: (), (C,) or (C, B)."""
    if not quantizer.per_channel:
        return torch.tensor(quantizer.scale[0])
    scale = torch.tensor(quantizer.scale)
    return scale.reshape(-1, quantizer.blocks) if quantizer.scheme == "weight-only" else scale


def ends_of(quantizer: QuantParams) -> tuple[Tensor, Tensor]:
    """The lowest and the highest code of a static or weight-only quantizer: of all codes (), or of each row (C,).

    A row of one bit has the codes -1 and 1, and no 0; see `nearest_codes`.
    """
    if not quantizer.rows:
        return torch.tensor(quantizer.low), torch.tensor(quantizer.high)
    half = 1 << (torch.tensor(quantizer.rows) - 1)
    return -half, (half - 1).clamp_min(1)


def one_bit(quantizer: QuantParams) -> Tensor:
    """Whether codes have one bit: all of them (), or those of each row (C,)."""
    return torch.tensor(quantizer.rows) == 1 if quantizer.rows else torch.tensor(False)


def nearest_codes(values: Tensor, quantizer: QuantParams) -> Tensor:
    """The nearest codes to values in units of the scale, (C, ...), in their type."""
    low, high = (affine.along_channels(end.to(values.device), values) for end in ends_of(quantizer))
    codes, signs = values.round().clamp_(low, high), one_bit(quantizer)
    if not signs.any():
        return codes
    signs = affine.along_channels(signs.to(values.device), values)
    return torch.where(signs, torch.where(values < 0, -1, 1).to(codes), codes)


def numbers_of(scale: Tensor) -> tuple[float, ...]:
    """A scale as QuantParams has it, from the shape of `scale_of`.

    Of equal numbers one object is held: those of a language model's blocks, which are bfloat16, would take half a
    gigabyte.
    """
    numbers, places = scale.flatten().unique(return_inverse=True)
    return tuple(map(numbers.tolist().__getitem__, places.tolist()))


def activation_at(program: Program, key: str, width: Format, x: Tensor) -> Tensor:
    """An activation after fake quantization.

    Args:
        program: with the fact Quantizers.
        key: of the activation's site.
        width: a format other than float.
        x: values of one of the site's tensors.

    Returns:
        A new tensor in the shape of `x`.

    Raises:
        PassError: if the fact is missing.
    """
    quantizer = program.facts.get(key, Quantizers).by_format[width]
    if quantizer.scheme == "dynamic":
        return affine.fake_quantize_dynamic(x)
    scale = scale_of(quantizer).to(x.device)
    return affine.fake_quantize(x, scale, quantizer.zero_point, quantizer.low, quantizer.high)


@torch.no_grad()
def errors_at(program: Program, site: Site, width: Format, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Q(x) - x for every tensor of a site.

    Args:
        program: with the facts Quantizers, and RoundedWeights for a weight.
        site: the site.
        width: a format other than float.
        tensors: the weight, or the values of an activation's tensors.

    Raises:
        PassError: if a fact is missing.
    """
    if isinstance(site, WeightSite):
        return [weight_at(program, site.key, width) - tensor for tensor in tensors]
    return [activation_at(program, site.key, width, tensor) - tensor for tensor in tensors]
