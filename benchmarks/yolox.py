"""YOLOX-Nano (Ge et al. 2021, "YOLOX: Exceeding YOLO Series in 2021") in torch, and how detections are scored.

The network is the one that its authors exported to ONNX, batch-norm folded into the convolutions, and takes its
weights from that file.  Images (N, 3, 416, 416), BGR from 0 to 255, go to (N, 3549, 85): per anchor point the offset of
the centre and the logarithm of the size, in strides, the probability of an object, and of each of COCO's 80 classes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from divergence import binary_cross_entropy
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

SIDE, STRIDES = 416, (8, 16, 32)
OVERLAPS = tuple(0.5 + 0.05 * step for step in range(10))  # of COCO's mAP
Boxes = NDArray[np.float64]  # (n, 4): left, top, right, bottom, in pixels


class Conv(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.conv(x))


def separable(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        Conv(channels_in, channels_in, 3, stride, groups=channels_in), Conv(channels_in, channels_out, 1)
    )


class Bottleneck(nn.Module):
    def __init__(self, channels: int, shortcut: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(Conv(channels, channels, 1), separable(channels, channels))
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + x if self.shortcut else self.layers(x)


class CrossStage(nn.Module):
    """Half of the channels through `depth` bottlenecks, the other half past them."""

    def __init__(self, channels_in: int, channels_out: int, depth: int = 1, shortcut: bool = False) -> None:
        super().__init__()
        half = channels_out // 2
        self.through, self.past = Conv(channels_in, half, 1), Conv(channels_in, half, 1)
        self.bottlenecks = nn.Sequential(*(Bottleneck(half, shortcut) for _ in range(depth)))
        self.join = Conv(channels_out, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        through, past = self.through(x), self.past(x)
        return self.join(torch.cat([self.bottlenecks(through), past], 1))


class Focus(nn.Module):
    """Every second pixel of every second row: a quarter of the positions, four times the channels."""

    def __init__(self, channels_out: int) -> None:
        super().__init__()
        self.conv = Conv(12, channels_out, 3)

    def forward(self, x: Tensor) -> Tensor:
        even, odd = x[..., ::2, :], x[..., 1::2, :]
        return self.conv(torch.cat([even[..., ::2], odd[..., ::2], even[..., 1::2], odd[..., 1::2]], 1))


class PyramidPooling(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.before, self.after = Conv(channels, channels // 2, 1), Conv(channels * 2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.after(torch.cat([x, *(F.max_pool2d(x, size, 1, size // 2) for size in (5, 9, 13))], 1))


class Head(nn.Module):
    """What one level of the pyramid sees: (N, 85, height, width)."""

    def __init__(self, channels_in: int) -> None:
        super().__init__()
        self.stem = Conv(channels_in, 64, 1)
        self.class_tower = nn.Sequential(separable(64, 64), separable(64, 64))
        self.classes = nn.Conv2d(64, 80, 1)
        self.box_tower = nn.Sequential(separable(64, 64), separable(64, 64))
        self.box, self.object = nn.Conv2d(64, 4, 1), nn.Conv2d(64, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        box = self.box_tower(x)
        classes = self.classes(self.class_tower(x))
        return torch.cat([self.box(box), self.object(box).sigmoid(), classes.sigmoid()], 1)


class YoloxNano(nn.Module):
    """The layers are declared in the order in which they run, which is their order in the ONNX file."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Focus(16)
        self.dark2 = nn.Sequential(separable(16, 32, 2), CrossStage(32, 32, 1, True))
        self.dark3 = nn.Sequential(separable(32, 64, 2), CrossStage(64, 64, 3, True))
        self.dark4 = nn.Sequential(separable(64, 128, 2), CrossStage(128, 128, 3, True))
        self.dark5 = nn.Sequential(separable(128, 256, 2), PyramidPooling(256), CrossStage(256, 256))
        self.lateral5, self.merge4 = Conv(256, 128, 1), CrossStage(256, 128)
        self.lateral4, self.merge3 = Conv(128, 64, 1), CrossStage(128, 64)
        self.down3, self.join4 = separable(64, 64, 2), CrossStage(128, 128)
        self.down4, self.join5 = separable(128, 128, 2), CrossStage(256, 256)
        self.heads = nn.ModuleList(map(Head, (64, 128, 256)))

    def forward(self, images: Tensor) -> Tensor:
        c3 = self.dark3(self.dark2(self.stem(images)))
        c4 = self.dark4(c3)
        lateral5 = self.lateral5(self.dark5(c4))
        lateral4 = self.lateral4(self.merge4(torch.cat([_twice(lateral5), c4], 1)))
        p3 = self.merge3(torch.cat([_twice(lateral4), c3], 1))
        p4 = self.join4(torch.cat([self.down3(p3), lateral4], 1))
        p5 = self.join5(torch.cat([self.down4(p4), lateral5], 1))
        levels = [head(level).flatten(2) for head, level in zip(self.heads, (p3, p4, p5), strict=True)]
        return torch.cat(levels, 2).permute(0, 2, 1)


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def load(path: Path) -> YoloxNano:
    """The network with the weights of the ONNX file, in eval mode.  Their names there are numbers; the order tells."""
    import onnx  # noqa: TID251  (reads weights; what hawqfx writes is the business of hawqfx/export/exporter.py)

    graph = onnx.load(str(path)).graph
    tensors = {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    model = YoloxNano()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    nodes = [node for node in graph.node if node.op_type == "Conv"]
    for layer, node in zip(layers, nodes, strict=True):
        layer.load_state_dict({"weight": tensors[node.input[1]], "bias": tensors[node.input[2]]})
    return model.eval()


def distillation(output: Tensor, target: Tensor) -> Tensor:
    """How far detections are from those of the float network, `target`; the mean over images of `distillations`."""
    return distillations(output, target).mean()


def distillations(output: Tensor, target: Tensor) -> Tensor:
    """How far each image's detections are from those of the float network, `target`; (N,), sums over anchor points.

    Cross-entropy of the object and class probabilities with the float network's as soft labels, and squared error of
    the box; class and box count as much as the float network is sure of an object there.  The gradient is zero at the
    float network, so the Hessian is its Gauss-Newton part, which is never negative.
    """
    sure = target[..., 4]
    classes = binary_cross_entropy(output[..., 5:], target[..., 5:]).sum(-1)
    box = (output[..., :4] - target[..., :4]).square().sum(-1)
    return (binary_cross_entropy(output[..., 4], sure) + sure * (classes + box)).sum(1)


def divergence(output: Tensor, float_output: Tensor) -> Tensor:
    """The distillation loss of each image less the least that it can be, which the float output has; (N,) float64.

    That is a KL divergence in nats: of Bernoulli objects, and where there is one, of classes and Gaussian boxes.
    """
    output, float_output = output.double(), float_output.double()
    return distillations(output, float_output) - distillations(float_output, float_output)


def drawn(output: Tensor, random: torch.Generator) -> Tensor:
    """A target from the distribution of which `distillation` is the negative logarithm: Bernoulli for the object, and
    where there is one, for each class; Gaussian with variance 1/2 for the box."""
    output = output.detach()
    box = output[..., :4] + 0.5**0.5 * torch.randn(output[..., :4].shape, generator=random)
    return torch.cat([box, torch.bernoulli(output[..., 4:], generator=random)], -1)


def _anchors() -> tuple[Boxes, NDArray[np.float64]]:
    """The corner of each anchor point's cell in pixels (3549, 2), and its stride (3549, 1)."""
    corners, strides = [], []
    for stride in STRIDES:
        rows, columns = np.mgrid[: SIDE // stride, : SIDE // stride]
        corners.append(np.stack([columns, rows], -1).reshape(-1, 2) * stride)
        strides.append(np.full((len(corners[-1]), 1), stride))
    return np.concatenate(corners).astype(np.float64), np.concatenate(strides).astype(np.float64)


def detections(
    output: NDArray[np.float32], threshold: float = 0.01, overlap: float = 0.65
) -> tuple[Boxes, NDArray[np.int64], NDArray[np.float64]]:
    """Boxes, classes and scores of one image (3549, 85), best first, by class-wise non-maximum suppression.

    The two limits are those of YOLOX's own evaluation.
    """
    values = output.astype(np.float64)
    classes = values[:, 5:].argmax(1)
    scores = values[:, 4] * values[:, 5:].max(1)
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] > threshold]
    corners, strides = _anchors()
    centre, size = values[:, :2] * strides + corners, np.exp(np.minimum(values[:, 2:4], 10)) * strides
    boxes = np.concatenate([centre - size / 2, centre + size / 2], 1)
    kept: list[int] = []
    for each in order:
        same = [other for other in kept if classes[other] == classes[each]]
        if not same or iou(boxes[[each]], boxes[same]).max() <= overlap:
            kept.append(int(each))
    return boxes[kept], classes[kept], scores[kept]


def iou(one: Boxes, other: Boxes) -> NDArray[np.float64]:
    """Intersection over union of each box of (n, 4) with each of (m, 4)."""
    low, high = np.maximum(one[:, None, :2], other[None, :, :2]), np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (one, other)]
    return shared / np.maximum(areas[0][:, None] + areas[1][None, :] - shared, 1e-9)


def mean_average_precision(
    found: list[tuple[Boxes, NDArray[np.int64], NDArray[np.float64]]],
    truth: list[tuple[Boxes, NDArray[np.int64]]],
    overlaps: Sequence[float] = (0.5,),
) -> float:
    """COCO's mAP: mean over classes, and the IoU from which a box is right, of precision, interpolated at 101 values of
    recall.  By default mAP50."""
    present = sorted({int(label) for _, labels in truth for label in labels})
    each = [_average_precision(found, truth, label, overlap) for label in present for overlap in overlaps]
    return float(np.mean(each))


def _average_precision(
    found: list[tuple[Boxes, NDArray[np.int64], NDArray[np.float64]]],
    truth: list[tuple[Boxes, NDArray[np.int64]]],
    label: int,
    overlap: float,
) -> float:
    scores, right, objects = [], [], 0
    for (boxes, classes, confidence), (wanted, labels) in zip(found, truth, strict=True):
        free = wanted[labels == label]
        objects += len(free)
        for box, score in zip(boxes[classes == label], confidence[classes == label], strict=True):
            overlaps = iou(box[None], free)[0] if len(free) else np.zeros(1)
            hit = bool(overlaps.max() >= overlap)
            if hit:
                free = np.delete(free, overlaps.argmax(), 0)
            scores.append(score)
            right.append(hit)
    hits = np.array(right)[np.argsort(-np.array(scores), kind="stable")].cumsum() if right else np.zeros(0)
    precision = hits / np.arange(1, len(hits) + 1)
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(hits / objects, np.linspace(0, 1, 101))
    return float(np.append(best_from_here, 0)[at].mean())
