"""The surroundings of a measurement: batches, a loss, a device, a seed."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from hawqfx.errors import LossError
from hawqfx.frontend.data import Batch
from hawqfx.frontend.losses import (
    CLASS_AXIS,
    IGNORED_LABEL,
    KNOWN_LOSSES,
    Draw,
    DrawnTargets,
    ExpectedLabels,
    Loss,
    class_second,
    expected_cross_entropy,
    logits_of,
    sample_labels,
    squared_error,
    tensor_of,
)
from hawqfx.maths.seeding import generator

T = TypeVar("T")

DRAWS = 8  # of the targets of a loss whose expectation has no closed form
SAME_LOSS = 1e-3  # relative: a mean of float32 losses over samples, and the loss of the batch


class Progress(Protocol):
    """Told how far the work called `label` is, with a word on how well it goes."""

    def __call__(self, label: str, done: int, total: int, note: str = "") -> None: ...


def silent(label: str, done: int, total: int, note: str = "") -> None:
    """Progress that nobody wants to see."""


@dataclass(frozen=True)
class Context:
    """Batches on a device, a loss, and a seed.  Never stored in a Program.

    Args:
        batches: the calibration data.
        loss: a function of (output, target), the mean over a batch.
        loss_reason: the name of the loss and why it is taken, in words.
        seed: of every random draw.
        device: of the batches.
        progress: told how far the work is.
        draw: draws a target for an output from the distribution that the loss is the negative logarithm of.
        batch: the most samples to measure at once; None: as memory allows.
        cache: a folder for measurements.
    """

    batches: tuple[Batch, ...]
    loss: Loss
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress = silent
    draw: Draw | None = None
    batch: int | None = None
    cache: Path | None = None
    loss_reason: str = ""

    @property
    def samples(self) -> int:
        return sum(batch.size for batch in self.batches)

    def track(self, items: Iterable[T], label: str, total: int) -> Iterator[T]:
        """Go through `items` and tell `progress` how far we are."""
        self.progress(label, 0, total)
        for done, item in enumerate(items, 1):
            yield item
            self.progress(label, done, total)

    def target_of(self, output: Any, batch: Batch, index: int) -> Any:
        """The target that networks are compared by on a batch.

        Args:
            output: of the float network.
            batch: whose own target it is, if there is one; else the expected labels of cross-entropy, and for another
                loss, or where `draw` is given, several draws.
            index: number of the batch.
        """
        if batch.target is not None:
            return batch.target
        if self.draw is None and self.loss in CLASS_AXIS:
            return ExpectedLabels.of(output, CLASS_AXIS[self.loss])
        if self.draw is None and self.loss is squared_error:
            return tensor_of(output).detach()  # the mean of the targets that would be drawn
        if self.draw is None and not _has_logits(output):
            return None  # for a loss of one's own that needs no target
        randoms = (generator(self.seed, "labels", index, number, device=self.device) for number in range(DRAWS))
        return DrawnTargets(tuple(self.drawn(output, random) for random in randoms))

    def loss_of(self, output: Any, batch: Batch, index: int) -> Tensor:
        """The mean loss of the float network's output on a batch, a finite scalar."""
        return self.loss_at(output, self.target_of(output, batch, index), index)

    def drawn(self, output: Any, random: torch.Generator) -> Any:
        """A target drawn from the model's own output distribution: by `draw`, if it is given; else labels, or for the
        squared error the output with the normal noise of variance 1/2 that it is the negative logarithm of."""
        if self.draw is not None:
            return self.draw(output, random)
        if self.loss is squared_error:
            mean = tensor_of(output).detach()
            noise = torch.randn(mean.shape, generator=random, device=mean.device, dtype=mean.dtype)
            return mean + noise * 0.5**0.5
        return sample_labels(class_second(logits_of(output), CLASS_AXIS.get(self.loss, 1)), random)

    @property
    def knows_distribution(self) -> bool:
        """Whether targets can be drawn from the distribution that the loss is the negative logarithm of."""
        return self.draw is not None or self.loss in KNOWN_LOSSES

    def draws(self, target: Any, index: int) -> int:
        """The number of independent draws that the loss of a drawn target is a mean of: labels for cross-entropy,
        elements for the squared error, the samples of the batch for another loss."""
        if self.loss in KNOWN_LOSSES and isinstance(target, Tensor):
            return target.numel()
        return self.batches[index].size

    def loss_at(self, output: Any, target: Any, index: int) -> Tensor:
        """The mean loss of any network's output on batch `index`, a finite scalar.

        Raises:
            LossError: if the loss is no scalar, or not finite.
        """
        value = self._mean_loss(output, target)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise LossError(f"the loss must be a scalar, the mean over the batch; it returned {shape}")
        if not torch.isfinite(value):
            raise LossError(
                f"the loss of batch {index} is {value.item()}: check the data of that batch and the loss for overflow"
            )
        return value.reshape(())

    def _mean_loss(self, output: Any, target: Any) -> Any:
        if isinstance(target, ExpectedLabels):
            return expected_cross_entropy(output, target).mean()
        if isinstance(target, DrawnTargets):
            return sum(self.loss(output, drawn) for drawn in target.targets) / len(target.targets)
        return self.loss(output, target)

    @torch.no_grad()
    def sample_losses(self, output: Any, target: Any, index: int) -> Tensor:
        """The loss of every sample of batch `index`, (N,) float64, whose mean is the loss of the batch.

        A loss that is no mean over samples, such as one that compares them with each other, gives (1,): the batch.
        """
        whole = self.loss_at(output, target, index).double()
        if isinstance(target, ExpectedLabels):
            losses = expected_cross_entropy(output, target).double()
            return losses.reshape(len(losses), -1).mean(1)
        if self.loss in CLASS_AXIS and isinstance(target, Tensor):
            return _cross_entropies(class_second(logits_of(output), CLASS_AXIS[self.loss]), target)
        size = self.batches[index].size
        try:
            values = [
                self._mean_loss(_sample(output, number, size), _sample(target, number, size)) for number in range(size)
            ]
            losses = torch.stack([value.detach().double().reshape(()) for value in values])
        except Exception:  # the user's loss may raise anything on one sample: then only batches can be compared
            return whole.reshape(1)
        alike = bool(torch.isclose(losses.mean(), whole, rtol=SAME_LOSS, atol=0.0))
        return losses if alike else whole.reshape(1)


def _has_logits(output: Any) -> bool:
    try:
        return logits_of(output).shape[1] > 1
    except LossError:
        return False


def _cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,): the sum over each sample's labels, in units whose mean over samples is the mean over labels."""
    losses = F.cross_entropy(logits.double(), labels.long(), reduction="none").reshape(len(logits), -1).sum(1)
    return losses * len(logits) / (labels != IGNORED_LABEL).sum().clamp_min(1)


def _sample(value: Any, number: int, size: int) -> Any:
    """The part of an output or a target that belongs to one sample of a batch."""
    if isinstance(value, DrawnTargets):
        return DrawnTargets(tuple(_sample(target, number, size) for target in value.targets))

    def of(leaf: Any) -> Any:
        batched = isinstance(leaf, Tensor) and leaf.shape[:1] == (size,)
        return leaf[number : number + 1] if batched else leaf

    return pytree.tree_map(of, value)
