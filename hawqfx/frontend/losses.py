"""Losses of (output, target), and the targets of data that have none.

A label y that is drawn from the float network's distribution p = softmax(z) is noise; its expectation is not.  For
logits q of any network, cross-entropy has the expectation

    E_(y ~ p)[-log softmax(q)_y] = KL(p || softmax(q)) + H(p),

which two networks are compared by.  At q = z its gradient is zero, and its Hessian is the Fisher information, which is
the Gauss-Newton matrix (Martens 2020, "New insights and perspectives on the natural gradient method", section 9).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hawqfx.errors import DataError, LossError

Loss = Callable[[Any, Any], Tensor]
Draw = Callable[[Any, torch.Generator], Any]

IGNORED_LABEL = -100  # torch's cross-entropy leaves these out of the mean


def cross_entropy(output: Any, target: Any) -> Tensor:
    """The default loss: cross-entropy of logits (N, classes, ...) and integer labels (N, ...)."""
    logits = logits_of(output)
    if not isinstance(target, Tensor) or target.dtype.is_floating_point:
        raise DataError("the default loss is cross-entropy and needs integer labels; give loss= for other targets")
    kept = target[target != IGNORED_LABEL]
    if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= logits.shape[1]):
        raise DataError(
            f"labels go from {int(kept.min())} to {int(kept.max())}, "
            f"but the model has {logits.shape[1]} classes, 0 to {logits.shape[1] - 1}"
        )
    return F.cross_entropy(logits, target.long())


@dataclass(frozen=True)
class ExpectedLabels:
    """The distribution of labels, in place of labels that are drawn from it.

    Args:
        probabilities: (N, classes, ...), the softmax of the float network's logits.
    """

    probabilities: Tensor

    @staticmethod
    def of(output: Any) -> "ExpectedLabels":
        """The distribution of an output's own logits."""
        return ExpectedLabels(logits_of(output).detach().softmax(1))


@dataclass(frozen=True)
class DrawnTargets:
    """Independent draws of a batch's targets, over which a loss is averaged; networks that are compared share them."""

    targets: tuple[Any, ...]


def expected_cross_entropy(output: Any, labels: ExpectedLabels) -> Tensor:
    """Cross-entropy of each label's distribution: (N, ...) for logits (N, classes, ...)."""
    return -(labels.probabilities * logits_of(output).log_softmax(1)).sum(1)


def sample_labels(logits: Tensor, random: torch.Generator) -> Tensor:
    """Labels (N, ...) drawn from the model's own output distribution, softmax over dimension 1 of the logits.

    The expected Hessian of cross-entropy under these labels is the Gauss-Newton matrix, which is the Fisher
    information (Martens 2020, "New insights and perspectives on the natural gradient method", section 9).
    """
    probabilities = logits.detach().softmax(1).movedim(1, -1)
    drawn = torch.multinomial(probabilities.reshape(-1, logits.shape[1]), 1, generator=random)
    return drawn.reshape(probabilities.shape[:-1])


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returns: a tensor, or the entry `logits` of a mapping or object.

    Raises:
        LossError: if there are none.
    """
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None:
        found = output
    if not isinstance(found, Tensor) or found.ndim < 2:
        raise LossError(
            f"the default loss needs logits (N, classes, ...), the model returned {type(output).__name__}: give loss="
        )
    return found
