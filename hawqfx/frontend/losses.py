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
    """Cross-entropy of logits (N, classes, ...) and integer labels (N, ...)."""
    logits = logits_of(output)
    if not isinstance(target, Tensor) or target.dtype.is_floating_point:
        raise DataError("cross-entropy needs integer labels; give loss= for other targets")
    kept = target[target != IGNORED_LABEL]
    if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= logits.shape[1]):
        raise DataError(
            f"labels go from {int(kept.min())} to {int(kept.max())}, "
            f"but the model has {logits.shape[1]} classes, 0 to {logits.shape[1] - 1}"
        )
    return F.cross_entropy(logits, target.long())


def token_cross_entropy(output: Any, target: Any) -> Tensor:
    """Cross-entropy of logits (N, ..., classes), such as those of tokens (N, L, classes), and labels (N, ...)."""
    return cross_entropy(class_second(logits_of(output), -1), target)


def squared_error(output: Any, target: Any) -> Tensor:
    """The mean squared error of an output and a target of the same shape.

    Raises:
        DataError: if the shapes differ.
    """
    scores = tensor_of(output)
    if not isinstance(target, Tensor) or scores.shape != target.shape:
        given = _written(target) if isinstance(target, Tensor) else type(target).__name__
        raise DataError(f"the squared error needs targets in the shape of the output, {_written(scores)}, not {given}")
    return (scores - target).square().mean()


# the dimension of the classes in the logits that a cross-entropy takes
CLASS_AXIS: Mapping[Loss, int] = {cross_entropy: 1, token_cross_entropy: -1}


# the losses of which the distribution of targets is known
KNOWN_LOSSES: frozenset[Loss] = frozenset((*CLASS_AXIS, squared_error))


def class_second(logits: Tensor, axis: int) -> Tensor:
    """Logits with the classes in dimension 1."""
    return logits.movedim(axis, 1)


def default_loss(output: Any, target: Any, tokens: bool) -> tuple[Loss, str]:
    """The loss that the shapes of an output and its target ask for, and the reason in words.

    Args:
        output: of the float network on a batch.
        target: of the batch; None if the data have none.
        tokens: whether an input of the network has integers, one for each position of (N, L, ...).

    Raises:
        LossError: if the network returns several tensors, none of which is named logits.
        DataError: if the target's shape fits no loss; the message has both shapes.
    """
    scores = tensor_of(output)
    shape, known = tuple(scores.shape), f"output {_written(scores)}"
    if isinstance(target, Tensor):
        known += f" and targets {_written(target)}"
        if target.dtype.is_floating_point and target.shape == scores.shape:
            return squared_error, f"squared error, for {known}"
        labels = not target.dtype.is_floating_point
        if labels and len(shape) == 3 and tuple(target.shape) == shape[:-1]:
            return token_cross_entropy, f"cross-entropy over the last dimension, for {known}"
        if labels and len(shape) > 1 and tuple(target.shape) == (shape[0], *shape[2:]):
            return cross_entropy, f"cross-entropy over dimension 1, for {known}"
        raise DataError(
            f"no default loss fits {known}: labels are integers, one for each distribution over classes; targets of "
            "a squared error are floats in the shape of the output; give loss= for others"
        )
    if target is not None:
        raise DataError(f"no default loss fits targets that are a {type(target).__name__}: give loss=")
    if len(shape) == 2 and shape[1] > 1:
        return cross_entropy, f"cross-entropy over dimension 1, for {known} without targets"
    if len(shape) == 3 and tokens:
        return token_cross_entropy, f"cross-entropy over the last dimension, for {known} of tokens without targets"
    return squared_error, f"squared error to the float output, for {known} without targets"


def _written(tensor: Tensor) -> str:
    return f"({', '.join(['N', *map(str, tensor.shape[1:])])})"


@dataclass(frozen=True)
class ExpectedLabels:
    """The distribution of labels, in place of labels that are drawn from it.

    Args:
        probabilities: (N, classes, ...), the softmax of the float network's logits.
        axis: dimension of the classes in logits.
    """

    probabilities: Tensor
    axis: int = 1

    @staticmethod
    def of(output: Any, axis: int = 1) -> "ExpectedLabels":
        """The distribution of an output's own logits."""
        return ExpectedLabels(class_second(logits_of(output), axis).detach().softmax(1), axis)


@dataclass(frozen=True)
class DrawnTargets:
    """Independent draws of a batch's targets, over which a loss is averaged; networks that are compared share them."""

    targets: tuple[Any, ...]


def expected_cross_entropy(output: Any, labels: ExpectedLabels) -> Tensor:
    """Cross-entropy of each label's distribution, (N, ...)."""
    return -(labels.probabilities * class_second(logits_of(output), labels.axis).log_softmax(1)).sum(1)


def sample_labels(logits: Tensor, random: torch.Generator) -> Tensor:
    """Labels (N, ...) drawn from the model's own output distribution, softmax over dimension 1 of the logits.

    The expected Hessian of cross-entropy under these labels is the Gauss-Newton matrix, which is the Fisher
    information (Martens 2020, "New insights and perspectives on the natural gradient method", section 9).
    """
    probabilities = logits.detach().softmax(1).movedim(1, -1)
    drawn = torch.multinomial(probabilities.reshape(-1, logits.shape[1]), 1, generator=random)
    return drawn.reshape(probabilities.shape[:-1])


def logits_of(output: Any) -> Tensor:
    """The logits in an output: a tensor of two dimensions or more, or the entry `logits` of a mapping or object.

    Raises:
        LossError: if there are none.
    """
    tensor = tensor_of(output)
    if tensor.ndim < 2:
        raise LossError(
            f"cross-entropy needs logits (N, classes, ...), the model returned {_written(tensor)}: give loss="
        )
    return tensor


def tensor_of(output: Any) -> Tensor:
    """The tensor that a default loss looks at: the output, or the entry `logits` of a mapping or object.

    Raises:
        LossError: if there is none.
    """
    named = getattr(output, "logits", None)
    if named is None and isinstance(output, Mapping):
        named = output.get("logits")
    tensor = output if named is None else named
    if not isinstance(tensor, Tensor) or tensor.ndim < 1:
        raise LossError(
            f"the default losses need a tensor, or one named logits; the model returned {type(output).__name__}: "
            "give loss="
        )
    return tensor
