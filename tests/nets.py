"""Tiny networks, each named for what it exercises, and batches for them.  All are seeded and in eval mode."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Plain(nn.Module):
    """Convolutions with batch-norm, ReLU, a head: the usual chain."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


class Residual(nn.Module):
    """An addition of two quantized tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.inner(x))
        return self.head(x.mean((2, 3)))


class SharedLayer(nn.Module):
    """One layer, with its batch-norm, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.twice, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for _ in range(2):
            x = torch.relu(self.norm(self.twice(x)))
        return self.head(x.mean((2, 3)))


class SharedWeightTwoNorms(nn.Module):
    """One weight under two batch-norms, which no single tensor can take in."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1, self.norm2 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.twice, self.head = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.norm1(self.twice(x)))
        x = torch.relu(self.norm2(self.twice(x)))
        return self.head(x.mean((2, 3)))


class TiedWeights(nn.Module):
    """Two modules that hold the same parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x.flatten(1)[:, :8]))
        return self.head(torch.tanh(self.second(x)))


class Concat(nn.Module):
    """Two branches that share a quantizer because they are concatenated; a max-pool carries values on."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(1, 3, 1)
        self.join, self.head = nn.Conv2d(6, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)
        x = torch.relu(self.join(F.max_pool2d(joined, 2)))
        return self.head(x.mean((2, 3)))


class ConcatInput(nn.Module):
    """A rectified branch concatenated with the input, so that its quantizer cannot start at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.join, self.head = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.join(torch.cat([x, torch.relu(self.branch(x))], 1)))
        return self.head(x.mean((2, 3)))


class Depthwise(nn.Module):
    """Grouped, dilated and strided convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depthwise = nn.Conv2d(1, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.grouped = nn.Conv2d(6, 4, 3, stride=2, padding=2, dilation=2, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.expand(x))))
        return self.head(torch.relu(self.grouped(x)).mean((2, 3)))


class Flattened(nn.Module):
    """A reshape between a convolution and a linear layer, dropout, and a layer without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop, self.head = nn.Conv2d(1, 2, 3, bias=False), nn.Dropout(0.5), nn.Linear(72, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.relu(self.conv(x)).flatten(1)))


class RectifiedLinear(nn.Module):
    """Linear layers, of rows and of matrices, that end in a rectifier which no integer kernel reads."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.matrices = nn.Linear(8, 6, bias=False), nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, 8, 8)
        matrices = torch.tanh(torch.relu(self.rows(x))).mean(1)
        return self.head(matrices + torch.tanh(torch.relu(self.matrices(x.mean(1)))))


class Mlp(nn.Module):
    """Smooth and small enough for a dense Hessian."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x.flatten(1)))
        return self.head(torch.tanh(self.second(x)))


class EndingMlp(Mlp):
    """The same with a function behind it, such as a softmax; the names of the sites stay."""

    def __init__(self, end: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.end = end

    def forward(self, x: Tensor) -> Any:
        return self.end(super().forward(x))


class KeywordInputs(nn.Module):
    """Two inputs, given by name, and a dict for an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 4), nn.Linear(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(torch.relu(self.left(first) + self.right(second)))}


class InPlace(nn.Module):
    """Operators that write over their input, which is read again later; batch-norm among them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.inner = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 3, padding=1),
        )
        self.rectify, self.head = nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        y = self.inner(self.rectify(x))
        y += x  # as rectified
        return self.head(self.rectify(y).mean((2, 3)))


class Attention(nn.Module):
    """Self-attention, whose fused kernel cannot be differentiated twice."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(1).reshape(-1, 1, 8, 8)).chunk(3, -1)
        x = self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return self.head(x.mean(1))


class Heads(nn.Module):
    """Attention of two heads, of so many words, with projections of their own."""

    def __init__(self, words: int = 128) -> None:
        super().__init__()
        self.words = words
        self.q, self.k, self.v, self.head = (nn.Linear(8, out) for out in (8, 8, 8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1).reshape(-1, 8, 8).repeat(1, self.words // 8, 1)
        x = x * torch.linspace(-1, 1, self.words)[:, None]
        q, k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


class UnreadAttention(nn.Module):
    """Attention whose result nobody reads; it has a place for dropout, which is a random draw."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mods = nn.Linear(8, 8), nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True)])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x.flatten(1).reshape(-1, 8, 8)))
        self.mods[0](x, x, x, need_weights=False)
        return self.head(x.mean(1))


class TinyRange(nn.Module):
    """A linear layer behind a tensor of tiny range, the mean of layer-normed values: its bias is all of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(64, 8), nn.LayerNorm(8, elementwise_affine=False)
        self.head = nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x.flatten(1))).mean(1, keepdim=True))


class LargeBias(nn.Module):
    """Linear layers and convolutions whose biases are a million times their products, in some channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 6), nn.Linear(6, 3)
        for layer in (self.conv, self.inner, self.head):
            assert layer.bias is not None
            layer.bias.data[0] *= 1e6

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).mean((2, 3))
        return self.head(torch.tanh(self.inner(torch.tanh(x))))


class Recurrent(nn.Module):
    """An LSTM, for which onnxruntime has no integer kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.reshape(-1, 8, 8))[0][:, -1])


class CeilPool(nn.Module):
    """Average pools whose last windows reach beyond the tensor, without padding and with it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.avg_pool2d(self.one(x), 3, 2, ceil_mode=True)
        x = nn.functional.avg_pool2d(self.two(x), 3, 2, padding=1, ceil_mode=True)
        return self.head(nn.functional.avg_pool2d(x, 64, ceil_mode=True).flatten(1))


class QuantizedOutput(nn.Module):
    """A sum that is an output, is quantized, and goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = nn.functional.hardswish(self.one(x))
        x = x + torch.relu(self.two(x))
        return x, self.head(x.mean((2, 3)))


class TokenMlp(nn.Module):
    """Linear layers of tokens, which are rows of all samples while they are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1).reshape(-1, 8, 8)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x.mean(1))


class SqueezedWide(nn.Module):
    """Squeezes of dimensions that are larger than 1, which torch passes over, beside some that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 1, 3), nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).squeeze((0, 1, 2)).unsqueeze(1).squeeze()
        return self.head(x.flatten(1).squeeze(1).squeeze(0))


class VolumeWithoutBias(nn.Module):
    """Convolutions of volumes, of which the first has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(1, 4, (1, 3, 3), (1, 2, 1), (0, 1, 1), bias=False), nn.Conv3d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.tanh(self.first(x.unsqueeze(2))))).mean((2, 3, 4)))


IMAGES: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "residual": Residual,
    "shared_layer": SharedLayer,
    "shared_weight_two_norms": SharedWeightTwoNorms,
    "tied_weights": TiedWeights,
    "concat": Concat,
    "concat_input": ConcatInput,
    "depthwise": Depthwise,
    "flattened": Flattened,
    "rectified_linear": RectifiedLinear,
    "mlp": Mlp,
    "in_place": InPlace,
    "attention": Attention,
    "token_mlp": TokenMlp,
    "squeezed_wide": SqueezedWide,
}


def build(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The network in eval mode, with batch-norm statistics that are not the initial zeros and ones."""
    torch.manual_seed(seed)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
    return model


def images(count: int = 2, batch: int = 16, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Batches of (N, 1, 8, 8) images and labels of three classes."""
    random = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(batch, 1, 8, 8, generator=random), torch.randint(0, 3, (batch,), generator=random))
        for _ in range(count)
    ]
