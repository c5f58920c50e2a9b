"""Networks of many kinds with random weights: for what compiles and exports, and whether the numbers agree.

What transformers can build from a configuration comes from there (the extra `bench`), small enough for a minute each;
the rest is written as its authors lay it out.  Each is seeded, in eval mode, with a batch of two of its inputs.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from resnet50 import resnet50
from torch import Tensor, nn
from torch.nn import functional as F

os.environ.setdefault("HF_HUB_OFFLINE", "1")
Built = tuple[nn.Module, list[Any]]  # a network, and batches as hawqfx takes them


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class Basic(nn.Module):
    """A block of ResNet-18 (He et al. 2016)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.one, self.two = _conv(inputs, width, 3, stride), _conv(width, width, 3)
        self.shortcut = _conv(inputs, width, 1, stride) if stride != 1 or inputs != width else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.two(torch.relu(self.one(x))) + self.shortcut(x))


def resnet18() -> nn.Module:
    widths = [(64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)]
    blocks, inputs = [], 64
    for width, stride in widths:
        blocks.append(Basic(inputs, width, stride))
        inputs = width
    stem = nn.Sequential(_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


class Inverted(nn.Module):
    """A block of MobileNet-V3 (Howard et al. 2019), and of V2 (Sandler et al. 2018) with ReLU6 and no gate."""

    def __init__(
        self, inputs: int, wide: int, outputs: int, kernel: int, stride: int, gate: bool, act: type[nn.Module]
    ) -> None:
        super().__init__()
        self.expand = nn.Sequential(_conv(inputs, wide, 1), act()) if wide != inputs else nn.Sequential()
        self.depthwise = nn.Sequential(_conv(wide, wide, kernel, stride, groups=wide), act())
        squeezed = max(8, wide // 4)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, squeezed, 1), nn.ReLU(), nn.Conv2d(squeezed, wide, 1),
            nn.Hardsigmoid(),
        ) if gate else None  # fmt: skip
        self.project, self.residual = _conv(wide, outputs, 1), stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        if self.gate is not None:
            y = y * self.gate(y)
        y = self.project(y)
        return x + y if self.residual else y


def mobilenet_v2() -> nn.Module:
    blocks, inputs = [], 32
    for expand, width, count, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for number in range(count):
            step = stride if number == 0 else 1
            blocks.append(Inverted(inputs, expand * inputs, width, 3, step, False, nn.ReLU6))
            inputs = width
    head = nn.Sequential(_conv(320, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2))
    return nn.Sequential(_conv(3, 32, 3, 2), nn.ReLU6(), *blocks, head, nn.Linear(1280, 1000))


def mobilenet_v3() -> nn.Module:
    """The small one."""
    blocks, inputs = [], 16
    for kernel, wide, outputs, gate, hard, stride in (
        (3, 16, 16, True, False, 2), (3, 72, 24, False, False, 2), (3, 88, 24, False, False, 1),
        (5, 96, 40, True, True, 2), (5, 240, 40, True, True, 1), (5, 240, 40, True, True, 1),
        (5, 120, 48, True, True, 1), (5, 144, 48, True, True, 1), (5, 288, 96, True, True, 2),
        (5, 576, 96, True, True, 1), (5, 576, 96, True, True, 1),
    ):  # fmt: skip
        blocks.append(Inverted(inputs, wide, outputs, kernel, stride, gate, nn.Hardswish if hard else nn.ReLU))
        inputs = outputs
    head = nn.Sequential(_conv(96, 576, 1), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    tail = nn.Sequential(nn.Linear(576, 1024), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(1024, 1000))
    return nn.Sequential(_conv(3, 16, 3, 2), nn.Hardswish(), *blocks, head, tail)


class Shuffled(nn.Module):
    """A block of ShuffleNet-V2 (Ma et al. 2018): half of the channels pass, then all are shuffled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            _conv(half, half, 1), nn.ReLU(), _conv(half, half, 3, groups=half), _conv(half, half, 1), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        passed, taken = x.chunk(2, 1)
        return F.channel_shuffle(torch.cat([passed, self.branch(taken)], 1), 2)


def shufflenet() -> nn.Module:
    down = [nn.Sequential(_conv(24, 48, 3, 2), nn.ReLU()), nn.Sequential(_conv(48, 96, 3, 2), nn.ReLU())]
    stem = nn.Sequential(_conv(3, 24, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    body = [stem, down[0], Shuffled(48), Shuffled(48), down[1], Shuffled(96), Shuffled(96)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 100))


class Dense(nn.Module):
    """A layer of DenseNet (Huang et al. 2017): batch-norm before the convolution, everything before concatenated."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, 4 * growth, 1, bias=False))
        self.grow = nn.Sequential(
            nn.BatchNorm2d(4 * growth), nn.ReLU(), nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.grow(self.squeeze(x))], 1)


def densenet() -> nn.Module:
    width, growth = 32, 16
    parts: list[nn.Module] = [_conv(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    for block in range(2):
        for _ in range(4):
            parts.append(Dense(width, growth))
            width += growth
        if block == 0:
            transition = nn.Conv2d(width, width // 2, 1, bias=False)
            parts += [nn.BatchNorm2d(width), nn.ReLU(), transition, nn.AvgPool2d(2)]
            width //= 2
    parts += [nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 100)]
    return nn.Sequential(*parts)


class UNet(nn.Module):
    """Ronneberger et al. 2015, two levels: transposed convolutions up, the skipped tensors concatenated."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()

        def twice(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(_conv(inputs, outputs, 3), nn.ReLU(), _conv(outputs, outputs, 3), nn.ReLU())

        self.one, self.two, self.three = twice(3, width), twice(width, 2 * width), twice(2 * width, 4 * width)
        self.up_two = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.up_one = nn.ConvTranspose2d(2 * width, width, 4, 2, 1)
        self.back_two, self.back_one = twice(4 * width, 2 * width), twice(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(F.max_pool2d(one, 2))
        three = self.three(F.max_pool2d(two, 2))
        two = self.back_two(torch.cat([self.up_two(three), two], 1))
        return self.head(self.back_one(torch.cat([self.up_one(two), one], 1)))


class Keywords(nn.Module):
    """A 1-d convolutional keyword spotter on 40 filter-bank features."""

    def __init__(self) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for inputs, width, stride in ((40, 64, 1), (64, 64, 2), (64, 96, 2), (96, 128, 2)):
            parts += [nn.Conv1d(inputs, width, 9, stride, 4), nn.BatchNorm1d(width), nn.ReLU()]
        self.body, self.head = nn.Sequential(*parts), nn.Linear(128, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool1d(self.body(x), 1).flatten(1))


def video() -> nn.Module:
    """3-d convolutions."""
    parts: list[nn.Module] = []
    for inputs, width in ((3, 16), (16, 32), (32, 64)):
        parts += [nn.Conv3d(inputs, width, 3, 1, 1), nn.BatchNorm3d(width), nn.ReLU(), nn.MaxPool3d(2)]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(64, 10))


class Recurrent(nn.Module):
    """An LSTM over 40 features, and a classifier of its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(40, 64, 2, batch_first=True), nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 10)
    )


class Answer(nn.Module):
    """A network of transformers, with the one answer that is compared."""

    def __init__(self, model: nn.Module, field: str) -> None:
        super().__init__()
        self.model, self.field = model, field

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.model(x), self.field)


def _transformer(kind: str, field: str = "logits", **options: Any) -> nn.Module:
    """A network of transformers by the stem of its class names, with small sizes."""
    import transformers

    configuration = getattr(transformers, kind).config_class(**options)
    return Answer(getattr(transformers, kind)(configuration), field)


def segformer() -> nn.Module:
    return _transformer(
        "SegformerForSemanticSegmentation", depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 64, 128], decoder_hidden_size=64
    )


def vit() -> nn.Module:
    return _transformer(
        "ViTForImageClassification", hidden_size=192, num_hidden_layers=3, num_attention_heads=3,
        intermediate_size=768, image_size=96,
    )  # fmt: skip


def swin() -> nn.Module:
    return _transformer(
        "SwinForImageClassification", image_size=64, patch_size=4, embed_dim=48, depths=[2, 2], num_heads=[2, 4],
        window_size=4,
    )  # fmt: skip


def convnext() -> nn.Module:
    return _transformer("ConvNextForImageClassification", hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 2, 1])


def bert() -> nn.Module:
    return _transformer(
        "BertForSequenceClassification", hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=512, vocab_size=1000,
    )  # fmt: skip


def detr() -> nn.Module:
    import transformers

    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    backbone = transformers.AutoConfig.for_model("resnet", **sizes, out_features=["stage4"])
    return _transformer(
        "DetrForObjectDetection", use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=backbone, d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=128,
        decoder_ffn_dim=128, encoder_attention_heads=2, decoder_attention_heads=2, num_queries=10,
    )  # fmt: skip


def gpt2() -> nn.Module:
    """A decoder of two blocks, the word embedding tied to the head."""
    return _transformer("GPT2LMHeadModel", n_embd=128, n_layer=2, n_head=2, vocab_size=1000, use_cache=False)


def _images(channels: int, *size: int) -> Callable[[torch.Generator], Tensor]:
    return lambda random: torch.randn(2, channels, *size, generator=random)


def _tokens(random: torch.Generator) -> Tensor:
    return torch.randint(0, 1000, (2, 32), generator=random)


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Tensor]]] = {
    "ResNet-18": (resnet18, _images(3, 96, 96)),
    "ResNet-50": (resnet50, _images(3, 96, 96)),
    "MobileNetV2": (mobilenet_v2, _images(3, 96, 96)),
    "MobileNetV3": (mobilenet_v3, _images(3, 96, 96)),
    "ShuffleNet": (shufflenet, _images(3, 96, 96)),
    "DenseNet": (densenet, _images(3, 96, 96)),
    "U-Net": (UNet, _images(3, 48, 48)),
    "SegFormer": (segformer, _images(3, 64, 64)),
    "ViT": (vit, _images(3, 96, 96)),
    "Swin": (swin, _images(3, 64, 64)),
    "ConvNeXt": (convnext, _images(3, 64, 64)),
    "BERT": (bert, _tokens),
    "GPT-2": (gpt2, _tokens),
    "DETR": (detr, _images(3, 96, 96)),
    "keyword spotter, 1-d": (Keywords, _images(40, 98)),
    "3-d convolutions": (video, _images(3, 8, 32, 32)),
    "LSTM classifier": (Recurrent, _images(40, 40)),
    "MLP": (mlp, _images(1, 28, 28)),
}


def build(name: str, batches: int = 2) -> Built:
    """A network of the table and batches of two, seeded.  Batch-norm has statistics that are not the initial ones."""
    make, draw = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    random = torch.Generator().manual_seed(1)
    return model, [draw(random) for _ in range(batches)]
