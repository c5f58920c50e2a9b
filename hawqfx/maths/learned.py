"""Quantizers whose numbers are learned by gradient: codes and scales of a weight, the scale of an activation.

Gradients pass straight through the rounding (Bengio et al. 2013), also to the scale of an activation, as in LSQ (Esser
et al. 2020, "Learned step size quantization", equation 3).  A weight's codes are rounded sums of the codes at the start
and an offset, which begins at zero: a code moves when the gradient has asked for it again and again, and until then
biases and scales take what they can.  Offsets that begin at what the start has too little, within half a code, flip
many codes in the first steps, and what they were compensated for is lost: 100 steps from uniform 2 bits of ResNet-20
leave .021 nats so and .014 from zero (n = 1,024).  Most of that is biases and scales: in 100 steps few codes move, and
300 steps, in which many do, leave .014 too.
"""

import math

import torch
from torch import Tensor, nn


def round_through(x: Tensor) -> Tensor:
    """`x` rounded, half to even; the gradient is that of `x`."""
    return x + (x.round() - x).detach()


def chosen(shape: torch.Size, part: float, random: torch.Generator) -> Tensor:
    """Elements chosen at random, bool in `shape`; the probability is `part`, rounded to a multiple of 1/256.

    A byte of random bits each: five times faster than a random number each.
    """
    elements, of_256 = shape.numel(), round(256 * part)
    if of_256 == 256:
        return torch.ones(shape, dtype=torch.bool, device=random.device)
    words = torch.empty(-(-elements // 8), dtype=torch.int64, device=random.device)
    octets = words.random_(-(1 << 63), None, generator=random).view(torch.uint8)
    return (octets[:elements] < of_256).reshape(shape)


class LearnedWeight(nn.Module):
    """A weight whose codes and scales are learned.

    Args:
        weight: (C, ...), in float.
        codes: in its shape, the codes at the start.
        scale: in a shape that broadcasts over the weight, of either sign, which stays.
        low: the lowest code, in a shape that broadcasts over the weight.
        high: the highest code, likewise.
    """

    offset: nn.Parameter
    log_scale: nn.Parameter

    def __init__(self, weight: Tensor, codes: Tensor, scale: Tensor, low: int | Tensor, high: int | Tensor) -> None:
        super().__init__()
        self.start, self.sign = codes.to(weight.dtype), scale.to(weight.dtype).sign()
        self.low, self.high = torch.as_tensor(low), torch.as_tensor(high)
        self.offset = nn.Parameter(torch.zeros_like(weight))
        self.log_scale = nn.Parameter(scale.to(weight.dtype).abs().log())

    @property
    def codes(self) -> Tensor:
        """Integer codes in the weight's type."""
        return round_through(self.start + self.offset).clamp(self.low, self.high)

    @property
    def scale(self) -> Tensor:
        return self.sign * self.log_scale.exp()

    def forward(self) -> Tensor:
        """The dequantized weight."""
        return self.codes * self.scale


class LearnedBias(nn.Module):
    """A bias that is learned.

    Args:
        bias: (C,), at the start.
        unit: (C,), of its steps.
    """

    offset: nn.Parameter

    def __init__(self, bias: Tensor, unit: Tensor) -> None:
        super().__init__()
        self.start, self.unit = bias.detach(), unit
        self.offset = nn.Parameter(torch.zeros_like(self.start))

    def forward(self) -> Tensor:
        return self.start + self.unit * self.offset


class LearnedActivation(nn.Module):
    """The quantizer of an activation whose scale is learned.

    Args:
        scale: at the start, positive.
        low: the lowest code less the zero-point.
        high: the highest code less the zero-point.
        ceiling: the highest value that the range may end at.
    """

    log_scale: nn.Parameter

    def __init__(self, scale: float, low: int, high: int, ceiling: float = math.inf) -> None:
        super().__init__()
        self.low, self.high, self.ceiling = low, high, ceiling
        self.log_scale = nn.Parameter(torch.tensor(scale).log())

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp().clamp_max(self.ceiling / max(1, self.high))

    def forward(self, x: Tensor) -> Tensor:
        """`x` through the quantizer and back."""
        return round_through(x / self.scale).clamp(self.low, self.high) * self.scale
