"""What measuring needs from outside the program: batches, a loss, a device, a seed."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from hawqfx.errors import LossError
from hawqfx.frontend.data import Batch
from hawqfx.frontend.losses import Draw, Loss, cross_entropy, logits_of, sample_labels
from hawqfx.maths.seeding import generator

T = TypeVar("T")


class Progress(Protocol):
    """Told how far the work called `label` is, with a word on how well it goes."""

    def __call__(self, label: str, done: int, total: int, note: str = "") -> None: ...


def silent(label: str, done: int, total: int, note: str = "") -> None:
    """Progress that nobody wants to see."""


@dataclass(frozen=True)
class Context:
    """Batches on a device, a scalar loss of (output, target), and a seed.  Never stored in a Program.

    draw: gives a target for an output, drawn from the distribution that the loss is the negative logarithm of.
    batch: the most samples to measure at once; None: as memory allows.  cache: a folder for what was measured.
    """

    batches: tuple[Batch, ...]
    loss: Loss
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress = silent
    draw: Draw | None = None
    batch: int | None = None
    cache: Path | None = None

    @property
    def samples(self) -> int:
        return sum(batch.size for batch in self.batches)

    def track(self, items: Iterable[T], label: str, total: int) -> Iterator[T]:
        """Go through `items` and tell `progress` how far we are."""
        self.progress(label, 0, total)
        for done, item in enumerate(items, 1):
            yield item
            self.progress(label, done, total)

    def loss_of(self, output: Any, batch: Batch, index: int) -> Tensor:
        """The mean loss of a batch, a finite scalar."""
        target = batch.target
        if target is None:
            target = self.drawn(output, generator(self.seed, "labels", index, device=self.device))
        return self.loss_at(output, target, index)

    def drawn(self, output: Any, random: torch.Generator) -> Any:
        """A target drawn from the model's own output distribution: labels of a classifier, unless `draw` is given."""
        return self.draw(output, random) if self.draw else sample_labels(logits_of(output), random)

    def draws(self, target: Any, index: int) -> int:
        """Over how many independent draws the loss of a drawn target is the mean: cross-entropy's over all labels,
        another loss's over the samples of the batch."""
        if self.loss is cross_entropy and isinstance(target, Tensor):
            return target.numel()
        return self.batches[index].size

    def loss_at(self, output: Any, target: Any, index: int) -> Tensor:
        """The loss of an output of batch `index`, a finite scalar."""
        value = self.loss(output, target)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise LossError(f"the loss must be a scalar, the mean over the batch; it returned {shape}")
        if not torch.isfinite(value):
            raise LossError(
                f"the loss of batch {index} is {value.item()}: check the data of that batch and the loss for overflow"
            )
        return value.reshape(())
