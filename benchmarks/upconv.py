"""upconv_7 of waifu2x (Nagadomi 2015-2018), trained on photographs: seven convolutions that double a picture's side.

It has neither batch-norm nor residuals.  A picture (N, 3, side, side), RGB from 0 to 1, goes to (N, 3, 2 side - 28,
2 side - 28), for the convolutions have no padding: 14 pixels at each edge of the doubled picture are missing.  The
weights, of 16 bits, are in a file of ncnn.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

CHANNELS = (3, 16, 32, 64, 128, 128, 256)
SLOPE = 0.1  # of the leaky ReLU
HALF_PRECISION = 0x01306B47  # says in ncnn's files that weights of 16 bits follow
EDGE = 14  # pixels of the doubled picture


def build() -> nn.Sequential:
    """The network, its weights random."""
    layers: list[nn.Module] = []
    for channels_in, channels_out in pairwise(CHANNELS):
        layers += [nn.Conv2d(channels_in, channels_out, 3), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(CHANNELS[-1], 3, 4, 2, 3))


def load(path: Path) -> nn.Sequential:
    """The trained network in eval mode."""
    model, content = build(), path.read_bytes()
    at = 0

    def take(count: int, dtype: type[np.generic]) -> np.ndarray:
        nonlocal at
        values = np.frombuffer(content, dtype, count, at)
        at += -(-values.nbytes // 4) * 4  # each part starts at a multiple of four bytes
        return values

    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            if int(take(1, np.uint32)[0]) != HALF_PRECISION:
                raise RuntimeError(f"{path} has no weights of 16 bits at {at - 4}")
            swapped = isinstance(layer, nn.ConvTranspose2d)  # there, channels out come first in these too
            shape = layer.weight.transpose(0, 1).shape if swapped else layer.weight.shape
            weight = _tensor(take(layer.weight.numel(), np.float16)).reshape(shape)
            bias = _tensor(take(layer.out_channels, np.float32))
            layer.load_state_dict({"weight": weight.transpose(0, 1) if swapped else weight, "bias": bias})
    if at != len(content):
        raise RuntimeError(f"{path} has {len(content)} bytes, and the network {at}")
    return model.eval()


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))
