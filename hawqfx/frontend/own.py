"""The criteria of functions that the user gives."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hawqfx.errors import LossError
from hawqfx.frontend.criteria import Criterion, Draw, Loss, sample_labels
from hawqfx.frontend.outputs import logits_of

SAME_LOSS = 1e-3  # relative: a mean of float32 losses over samples, and the loss of the batch


@dataclass(frozen=True)
class Own(Criterion):
    """A function that the user gives; without targets it gets labels that are drawn by the softmax of the logits, or
    None where the output has none."""

    loss: Loss

    def mean(self, output: Any, target: Any) -> Tensor:
        return self.loss(output, target)

    def values(self, output: Any, target: Any, samples: int) -> Tensor:
        whole = self.loss(output, target).double().reshape(1)
        try:
            parts = [self.loss(_sample(output, k, samples), _sample(target, k, samples)) for k in range(samples)]
            losses = torch.stack([part.detach().double().reshape(()) for part in parts])
        except Exception:  # it may raise anything on one sample: then only batches can be compared
            return whole
        alike = bool(torch.isclose(losses.mean(), whole, rtol=SAME_LOSS, atol=0.0))
        return losses if alike else whole  # such as one that compares samples with each other

    def expectation(self, output: Any, target: Any = None) -> None:
        return None

    def draw(self, output: Any, random: torch.Generator, target: Any = None) -> Tensor | None:
        try:
            logits = logits_of(output)
        except LossError:
            return None
        return sample_labels(logits.detach().softmax(1), random) if logits.shape[1] > 1 else None

    def draws(self, target: Any) -> None:
        return None

    @property
    def knows_distribution(self) -> bool:
        return False

    @property
    def identity(self) -> object:
        return self.loss


@dataclass(frozen=True)
class Redrawn(Criterion):
    """A criterion with targets that the user's function draws."""

    criterion: Criterion
    function: Draw

    def mean(self, output: Any, target: Any) -> Tensor:
        return self.criterion.mean(output, target)

    def values(self, output: Any, target: Any, samples: int) -> Tensor:
        return self.criterion.values(output, target, samples)

    def expectation(self, output: Any, target: Any = None) -> None:
        return None

    def draw(self, output: Any, random: torch.Generator, target: Any = None) -> Any:
        return self.function(output, random)

    def draws(self, target: Any) -> int | None:
        return self.criterion.draws(target)

    @property
    def identity(self) -> object:
        return [self.criterion.identity, self.function]


def _sample(value: Any, number: int, samples: int) -> Any:
    """The part of an output or a target that belongs to one sample of a batch."""

    def of(leaf: Any) -> Any:
        batched = isinstance(leaf, Tensor) and leaf.shape[:1] == (samples,)
        return leaf[number : number + 1] if batched else leaf

    return pytree.tree_map(of, value)
