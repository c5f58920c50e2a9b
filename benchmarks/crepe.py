"""CREPE (Kim, Salamon, Li, Bello 2018, "CREPE: A Convolutional Representation for Pitch Estimation"), the tiny one.

A frame of 64 ms (N, 1024) at 16 kHz, with mean 0 and deviation 1, goes to the probabilities (N, 360) of pitches 20
cents apart.  It was trained with binary cross-entropy, a Bernoulli event for each pitch.
"""

from itertools import pairwise
from pathlib import Path

import torch
from divergence import binary_cross_entropy
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = (1, 128, 16, 16, 16, 32, 64)
PITCHES = 360


class CrepeTiny(nn.Module):
    """The layers have the names that they have in the file of weights."""

    def __init__(self) -> None:
        super().__init__()
        for number, (channels_in, channels_out) in enumerate(pairwise(CHANNELS), 1):
            kernel, stride = (512, 4) if number == 1 else (64, 1)
            conv = nn.Conv2d(channels_in, channels_out, (kernel, 1), (stride, 1))
            self.add_module(f"conv{number}", conv)
            self.add_module(f"conv{number}_BN", nn.BatchNorm2d(channels_out, eps=1e-3))
        self.classifier = nn.Linear(CHANNELS[-1] * 4, PITCHES)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames[:, None, :, None]
        for number in range(1, len(CHANNELS)):
            x = F.pad(x, (0, 0, 254, 254) if number == 1 else (0, 0, 31, 32))
            x = F.relu(self.get_submodule(f"conv{number}")(x))
            x = F.max_pool2d(self.get_submodule(f"conv{number}_BN")(x), (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).flatten(1)).sigmoid()


def load(path: Path) -> CrepeTiny:
    """The trained network in eval mode."""
    model = CrepeTiny()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy, summed over the pitches; mean over frames."""
    return binary_cross_entropy(output, target).sum(1).mean()


def drawn(output: Tensor, random: torch.Generator) -> Tensor:
    """A target from the distribution of which `loss` is the negative logarithm."""
    return torch.bernoulli(output.detach(), generator=random)
