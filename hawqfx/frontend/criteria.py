"""Criteria: losses whose distribution of targets is known, so that data need none.

A target t that is drawn from the float network's distribution p is noise; the expectation of the loss over such targets
is not.  For the distribution q of any network, a negative log likelihood has the expectation

    E_(t ~ p)[-log q(t)] = KL(p || q) + H(p),

which two networks are compared by.  At q = p its gradient is zero, and its Hessian is the Fisher information, which is
the Gauss-Newton matrix (Martens 2020, "New insights and perspectives on the natural gradient method", section 9).

| criterion | -log q(t), up to a constant | p, by the float output z | expected target |
| --- | --- | --- | --- |
| Categorical | -log q_t | softmax z, or z where it is one | the probabilities |
| Bernoulli | -t log q - (1 - t) log (1 - q) of each element | z, a sigmoid | z |
| SquaredError | (z - t)^2 of each element | normal, of mean z and variance 1/2 | z |
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hawqfx.errors import DataError
from hawqfx.frontend.outputs import logits_of, tensor_of, written

Loss = Callable[[Any, Any], Tensor]
Draw = Callable[[Any, torch.Generator], Any]

Form = Literal["logits", "probabilities", "log-probabilities"]  # what an output has of each class

# relative error of a sum of probabilities, in half precision too; by chance no other dimension adds up to one
SUMS_TO_ONE = 1e-2

IGNORED_LABEL = -100  # torch's cross-entropy leaves these out of the mean


class Criterion(ABC):
    """A loss of (output, target), the mean over a batch, and what is known of its targets."""

    def __call__(self, output: Any, target: Any) -> Tensor:
        return self.mean(output, target)

    @abstractmethod
    def mean(self, output: Any, target: Any) -> Tensor:
        """The mean loss of a batch, a scalar."""

    @abstractmethod
    def values(self, output: Any, target: Any, samples: int) -> Tensor:
        """The loss of every sample, (samples,) float64, whose mean is the loss of the batch; (1,) where the output or
        the loss does not part by samples."""

    @abstractmethod
    def expectation(self, output: Any, target: Any = None) -> Any:
        """The expected target of the float network's output, that `mean` and `values` take in place of a target; None
        if targets can only be drawn.  What a given target leaves out, such as labels of padding, is left out too."""

    @abstractmethod
    def draw(self, output: Any, random: torch.Generator, target: Any = None) -> Any:
        """A target drawn from the distribution of the output; None if there is no such distribution.  What a given
        target leaves out is left out, as in `expectation`."""

    @abstractmethod
    def draws(self, target: Any) -> int | None:
        """The number c of independent draws in a drawn target: c E[g g^T], with g the gradient of `mean`, is the
        Gauss-Newton matrix of the loss.  None: each sample is one draw."""

    @property
    def knows_distribution(self) -> bool:
        """Whether the loss is the negative logarithm of the distribution that `draw` draws from."""
        return True

    @property
    def identity(self) -> object:
        """What distinguishes it from other criteria, as hawqfx.sensitivity.cache.digest takes it."""
        return repr(self)

    def complete(self, output: Any, target: Any) -> Any:
        """The target of data, with the expectation of the float network's output where it is missing; None if that can
        only be drawn."""
        return self.expectation(output) if target is None else target


@dataclass(frozen=True)
class ExpectedLabels:
    """The distribution of labels, in place of labels that are drawn from it.

    Args:
        probabilities: (N, classes, ...), those of the float network; zero where labels are left out, and more by their
            part in the others.
    """

    probabilities: Tensor


@dataclass(frozen=True)
class Categorical(Criterion):
    """Cross-entropy of integer labels, or of distributions over classes in the shape of the output, one-hot or soft.

    Args:
        axis: dimension of the classes in the output.
        form: what the output has of each class; probabilities and their logarithms are taken as they are.
        causal: whether the labels of tokens (N, L) are the tokens themselves, so that position i of the output predicts
            label i + 1, as in the models of transformers.
    """

    axis: int = 1
    form: Form = "logits"
    causal: bool = False

    def mean(self, output: Any, target: Any) -> Tensor:
        target = self._labels(output, target)
        if isinstance(target, ExpectedLabels):
            return self._expected(output, target).mean()
        predicted, labels = self._predictions(output, target)
        # no label at all, as in a sample that is measured by itself, is no loss
        return F.nll_loss(predicted, labels, ignore_index=IGNORED_LABEL, reduction="sum") / max(1, _kept(labels))

    def values(self, output: Any, target: Any, samples: int) -> Tensor:
        target = self._labels(output, target)
        if isinstance(target, ExpectedLabels):
            return _by_sample(self._expected(output, target), samples)
        predicted, labels = self._predictions(output, target)
        losses = F.nll_loss(predicted.double(), labels, reduction="none", ignore_index=IGNORED_LABEL)
        # in units whose mean over samples is the mean over labels
        return _by_sample(losses * losses.numel() / max(1, _kept(labels)), samples)

    def expectation(self, output: Any, target: Any = None) -> ExpectedLabels:
        probabilities = self._probabilities(output)
        if not self._has_labels(output, target):
            return ExpectedLabels(probabilities)
        kept = target != IGNORED_LABEL
        if self.causal:
            kept = torch.cat([kept[:, 1:], torch.zeros_like(kept[:, :1])], 1)
        # in units whose mean over all labels is the mean over those that are kept
        weights = kept.to(probabilities.dtype) * (kept.numel() / max(1, int(kept.sum())))
        return ExpectedLabels(probabilities * weights.unsqueeze(1))

    def draw(self, output: Any, random: torch.Generator, target: Any = None) -> Tensor:
        labels = sample_labels(self._probabilities(output), random)
        if self.causal:
            labels = torch.cat([torch.full_like(labels[:, :1], IGNORED_LABEL), labels[:, :-1]], 1)
        if self._has_labels(output, target):
            _require_labels(output, target, labels.shape)
            labels = labels.masked_fill(target == IGNORED_LABEL, IGNORED_LABEL)
        return labels

    def draws(self, target: Any) -> int:
        return _kept(target)

    def _has_labels(self, output: Any, target: Any) -> bool:
        """Whether a target is given and has integer labels, some of which may be left out."""
        return target is not None and not isinstance(self._labels(output, target), ExpectedLabels)

    def _labels(self, output: Any, target: Any) -> Any:
        """The target, as distributions over classes if it has the shape of the output and is made of them."""
        scores = logits_of(output)
        if not isinstance(target, Tensor) or target.shape != scores.shape or not are_distributions(target, self.axis):
            return target
        return ExpectedLabels(target.movedim(self.axis, 1).to(scores.dtype))

    def _expected(self, output: Any, labels: ExpectedLabels) -> Tensor:
        """Cross-entropy of each label's distribution, (N, ...)."""
        return -(labels.probabilities * self._log_probabilities(output)).sum(1)

    def _predictions(self, output: Any, labels: Any) -> tuple[Tensor, Tensor]:
        """Log-probabilities (N, classes, ...) and the labels (N, ...) that they predict."""
        predicted = self._log_probabilities(output)
        _require_labels(output, labels, predicted.shape[:1] + predicted.shape[2:])
        classes, kept = predicted.shape[1], labels[labels != IGNORED_LABEL]
        if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= classes):
            raise DataError(
                f"labels go from {int(kept.min())} to {int(kept.max())}, "
                f"but the model has {classes} classes, 0 to {classes - 1}"
            )
        if self.causal:
            predicted, labels = predicted[:, :, :-1], labels[:, 1:]
        return predicted, labels.long()

    def _log_probabilities(self, output: Any) -> Tensor:
        """(N, classes, ...), with a slope."""
        scores = logits_of(output).movedim(self.axis, 1)
        if self.form == "logits":
            return scores.log_softmax(1)
        # the softmax of a class far behind rounds to zero; its true logarithm is below that of the least normal float
        return scores.clamp_min(_tiny(scores)).log() if self.form == "probabilities" else scores

    def _probabilities(self, output: Any) -> Tensor:
        """(N, classes, ...), without a slope."""
        scores = logits_of(output).detach().movedim(self.axis, 1)
        if self.form == "logits":
            return scores.softmax(1)
        return scores if self.form == "probabilities" else scores.exp()


class _Elementwise(Criterion):
    """The mean of a loss over all elements, each a draw of its own, whose expected target is the float output."""

    def mean(self, output: Any, target: Any) -> Tensor:
        return self._elements(output, target).mean()

    def values(self, output: Any, target: Any, samples: int) -> Tensor:
        return _by_sample(self._elements(output, target), samples)

    def expectation(self, output: Any, target: Any = None) -> Tensor:
        return tensor_of(output).detach()

    def draws(self, target: Any) -> int:
        return int(target.numel())

    @abstractmethod
    def _elements(self, output: Any, target: Any) -> Tensor:
        """The loss of every element, in the shape of the output."""


@dataclass(frozen=True)
class Bernoulli(_Elementwise):
    """Binary cross-entropy of sigmoids, the mean over all elements; targets are from 0 to 1, in the shape of the output
    but for dimensions of size one."""

    def draw(self, output: Any, random: torch.Generator, target: Any = None) -> Tensor:
        return torch.bernoulli(tensor_of(output).detach(), generator=random)

    def _elements(self, output: Any, target: Any) -> Tensor:
        p = tensor_of(output)
        if not isinstance(target, Tensor) or not same_but_for_ones(p, target):
            given = written(target) if isinstance(target, Tensor) else type(target).__name__
            raise DataError(
                f"binary cross-entropy needs targets from 0 to 1 in the shape of the output, {written(p)}, not {given}"
            )
        if not lies_in_unit_interval(target):
            raise DataError(
                f"the targets of a binary cross-entropy are from 0 to 1; these go from {float(target.min()):g} to "
                f"{float(target.max()):g}"
            )
        t = target.reshape(p.shape).to(p.dtype)
        # 1 - p of a float is no finer than this, or zero; p is taken as no finer, so that a zero, such as one of a
        # quantized output, costs what a one does
        least = torch.finfo(p.dtype).eps / 2
        yes, no = p.clamp_min(least).log(), (1 - p).clamp_min(least).log()
        return -(t * yes + (1 - t) * no)


@dataclass(frozen=True)
class SquaredError(_Elementwise):
    """The squared error, the mean over all elements of an output and a target of its shape."""

    def draw(self, output: Any, random: torch.Generator, target: Any = None) -> Tensor:
        mean = tensor_of(output).detach()
        noise = torch.randn(mean.shape, generator=random, device=mean.device, dtype=mean.dtype)
        return mean + noise * 0.5**0.5

    def _elements(self, output: Any, target: Any) -> Tensor:
        scores = tensor_of(output)
        if not isinstance(target, Tensor) or scores.shape != target.shape:
            given = written(target) if isinstance(target, Tensor) else type(target).__name__
            raise DataError(
                f"the squared error needs targets in the shape of the output, {written(scores)}, not {given}"
            )
        return (scores - target).square()


def _require_labels(output: Any, labels: Any, shape: torch.Size) -> None:
    """Raises DataError for labels of another kind or shape than an output needs."""
    if not isinstance(labels, Tensor) or labels.dtype.is_floating_point:
        raise DataError("cross-entropy needs integer labels; give loss= for other targets")
    if labels.shape != shape:
        needed = written(torch.empty(shape, device="meta"))
        raise DataError(
            f"cross-entropy of output {written(tensor_of(output))} needs labels {needed}, one for each distribution "
            f"over classes, not {written(labels)}"
        )


def sample_labels(probabilities: Tensor, random: torch.Generator) -> Tensor:
    """Labels (N, ...) drawn by probabilities (N, classes, ...)."""
    last = probabilities.movedim(1, -1)
    return torch.multinomial(last.reshape(-1, last.shape[-1]), 1, generator=random).reshape(last.shape[:-1])


def same_but_for_ones(output: Tensor, target: Tensor) -> bool:
    """Whether two shapes differ in dimensions of size one only, beyond the batch, as in (N, 1) and (N)."""
    one, other = ([tensor.shape[:1], *(size for size in tensor.shape[1:] if size != 1)] for tensor in (output, target))
    return one == other


def are_distributions(target: Tensor, axis: int) -> bool:
    """Whether the elements along a dimension are probabilities that add up to one."""
    return lies_in_unit_interval(target) and bool(((target.double().sum(axis) - 1).abs() < SUMS_TO_ONE).all())


def lies_in_unit_interval(target: Tensor) -> bool:
    return bool(((target >= 0) & (target <= 1)).all())


def _tiny(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).tiny


def _kept(labels: Tensor) -> int:
    return int((labels != IGNORED_LABEL).sum())


def _by_sample(values: Tensor, samples: int) -> Tensor:
    """Means (samples,) float64 of values (n, ...), where n may be a multiple of the samples, as of their boxes."""
    groups = samples if len(values) % samples == 0 else 1
    return values.double().reshape(groups, -1).mean(1)
