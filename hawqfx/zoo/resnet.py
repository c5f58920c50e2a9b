"""ResNet-20 for 28x28 grey images.

He et al., "Deep Residual Learning for Image Recognition" (2016), section 4.2: a 3x3 stem and three stages of
three basic blocks with 16, 32 and 64 channels.  The network departs from the paper in two points: images have one
channel, and the two shortcuts that change the shape are 1x1 convolutions (option B of the paper).
"""

import torch
from torch import Tensor, nn


def _conv_bn(channels_in: int, channels_out: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them: (N, C, H, W) -> (N, C', H / stride, W / stride).

    Args:
        channels_in: C.
        channels_out: C'.
        stride: of the first convolution, and of the shortcut.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv_bn(channels_in, channels_out, 3, stride)
        self.conv2 = _conv_bn(channels_out, channels_out, 3, 1)
        same = stride == 1 and channels_in == channels_out
        self.shortcut = nn.Identity() if same else _conv_bn(channels_in, channels_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv1(x))
        return torch.relu(self.conv2(y) + self.shortcut(x))


class ResNet20(nn.Module):
    """Takes standardised images (N, 1, 28, 28), and returns logits (N, classes).

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = _conv_bn(1, 16, 3, 1)
        blocks: list[nn.Module] = []
        channels = 16
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            for block in range(3):
                blocks.append(BasicBlock(channels, width, stride if block == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.stem(x)))
        return self.classifier(x.mean((2, 3)))
