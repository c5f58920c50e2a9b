"""Losses as plain functions of (output, target), and the criterion of a loss."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hawqfx.errors import LossError
from hawqfx.frontend.criteria import Bernoulli, Categorical, Criterion, Draw, Loss, SquaredError
from hawqfx.frontend.own import Own, Redrawn
from hawqfx.frontend.several import Several


def cross_entropy(output: Any, target: Any) -> Tensor:
    """Cross-entropy of logits (N, classes, ...) and integer labels (N, ...).

    Raises:
        DataError: if the labels do not fit the logits.
    """
    return KNOWN[cross_entropy].mean(output, target)


def token_cross_entropy(output: Any, target: Any) -> Tensor:
    """Cross-entropy of logits (N, ..., classes), such as those of tokens (N, L, classes), and labels (N, ...).

    Raises:
        DataError: if the labels do not fit the logits.
    """
    return KNOWN[token_cross_entropy].mean(output, target)


def binary_cross_entropy(output: Any, target: Any) -> Tensor:
    """Binary cross-entropy of probabilities (N, ...), as of sigmoids, and targets from 0 to 1, the mean over elements.

    Raises:
        DataError: if the targets have another shape, or lie beyond 0 or 1.
    """
    return KNOWN[binary_cross_entropy].mean(output, target)


def squared_error(output: Any, target: Any) -> Tensor:
    """The mean squared error of an output and a target of the same shape.

    Raises:
        DataError: if the shapes differ.
    """
    return KNOWN[squared_error].mean(output, target)


# the losses of which the distribution of targets is known
KNOWN: Mapping[Loss, Criterion] = {
    cross_entropy: Categorical(1),
    token_cross_entropy: Categorical(-1),
    binary_cross_entropy: Bernoulli(),
    squared_error: SquaredError(),
}


def criterion_of(loss: Loss, draw: Draw | None = None) -> Criterion:
    """The criterion of a loss.

    Args:
        loss: a criterion, a function of this module, or any function of (output, target).
        draw: draws a target for an output from the distribution that the loss is the negative logarithm of.

    Raises:
        LossError: if `draw` is to draw targets for the default loss of several outputs.
    """
    criterion = loss if isinstance(loss, Criterion) else KNOWN.get(loss) or Own(loss)
    if draw is None:
        return criterion
    if isinstance(criterion, Several):
        raise LossError("the model has several outputs: draw= needs loss= beside it, or leave draw= out")
    return Redrawn(criterion, draw)
