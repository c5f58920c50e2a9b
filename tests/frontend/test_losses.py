"""Losses of data without targets: expectations over labels in place of labels, and losses sample by sample."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hawqfx.errors import DataError, LossError
from hawqfx.frontend.context import Context
from hawqfx.frontend.data import Batch, gather
from hawqfx.frontend.losses import (
    DrawnTargets,
    ExpectedLabels,
    cross_entropy,
    default_loss,
    sample_labels,
    squared_error,
    token_cross_entropy,
)

SAMPLES, CLASSES = 6, 5


def logits(seed: int, *rest: int) -> Tensor:
    return torch.randn(SAMPLES, CLASSES, *rest, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unlabelled(**options: object) -> Context:
    return Context(gather([torch.zeros(SAMPLES, 2)]), **{"loss": cross_entropy, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("rest", [(), (3,), (2, 2)])
def test_the_expectation_is_the_divergence_and_the_entropy(rest: tuple[int, ...]) -> None:
    """E[-log q_y] = KL(p || q) + H(p), against torch's own KL."""
    context, p, q = unlabelled(), logits(0, *rest), logits(1, *rest)
    target = context.target_of(p, context.batches[0], 0)
    assert isinstance(target, ExpectedLabels)
    kl = F.kl_div(q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="none").sum(1).mean()
    entropy = -(p.softmax(1) * p.log_softmax(1)).sum(1).mean()
    assert float(context.loss_at(q, target, 0)) == pytest.approx(float(kl + entropy), rel=1e-12)
    assert float(context.loss_of(p, context.batches[0], 0)) == pytest.approx(float(entropy), rel=1e-12)


def test_drawn_labels_have_that_expectation() -> None:
    """The mean over 4,000 draws of a batch, within 4 of its standard errors."""
    context, p, q = unlabelled(), logits(0), logits(1)
    expected = float(context.loss_at(q, context.target_of(p, context.batches[0], 0), 0))
    random = torch.Generator().manual_seed(0)
    drawn = torch.stack([cross_entropy(q, sample_labels(p, random)) for _ in range(4000)])
    assert abs(float(drawn.mean()) - expected) <= 4 * float(drawn.std()) / 4000**0.5


def test_the_expectation_has_no_gradient_at_the_float_network() -> None:
    p = logits(0).requires_grad_()
    context = unlabelled()
    (gradient,) = torch.autograd.grad(context.loss_of(p, context.batches[0], 0), p)
    assert float(gradient.abs().max()) < 1e-15  # float64 softmax twice, the same one


def test_other_losses_share_their_draws() -> None:
    """The same targets for every network that is compared on a batch."""
    context = unlabelled(loss=lambda output, target: F.nll_loss(output.log_softmax(1), target))
    first, again = (context.target_of(logits(0), context.batches[0], 0) for _ in range(2))
    assert isinstance(first, DrawnTargets)
    assert len(first.targets) == 8
    assert all(torch.equal(one, other) for one, other in zip(first.targets, again.targets, strict=True))
    whole = context.loss_at(logits(1), first, 0)
    apart = torch.stack([context.loss(logits(1), target) for target in first.targets])
    assert float(whole) == pytest.approx(float(apart.mean()), rel=1e-12)


@pytest.mark.parametrize("case", ["expected", "labels", "ignored", "own", "drawn"])
def test_losses_of_samples_have_the_mean_of_the_batch(case: str) -> None:
    context, p, q = unlabelled(), logits(0, 3), logits(1, 3)
    target: object = context.target_of(p, context.batches[0], 0)
    if case in ("labels", "ignored"):
        target = p.argmax(1)
        if case == "ignored":
            target[0, :2] = -100
    if case in ("own", "drawn"):
        context = unlabelled(loss=lambda output, target: F.nll_loss(output.log_softmax(1), target))
        target = p.argmax(1) if case == "own" else context.target_of(p, context.batches[0], 0)
    losses = context.sample_losses(q, target, 0)
    assert losses.shape == (SAMPLES,)
    assert float(losses.mean()) == pytest.approx(float(context.loss_at(q, target, 0)), rel=1e-9)
    if case == "expected":  # each sample's own
        alone = context.loss_at(q[2:3], ExpectedLabels(p.softmax(1)[2:3]), 0)
        assert float(losses[2]) == pytest.approx(float(alone), rel=1e-9)


def test_a_loss_that_compares_samples_is_a_loss_of_the_batch() -> None:
    context = unlabelled(loss=lambda output, target: output.std(0).mean() + 0 * target.sum())
    target = torch.zeros(SAMPLES, dtype=torch.long)
    assert context.sample_losses(logits(1), target, 0).tolist() == [float(context.loss_at(logits(1), target, 0))]


def test_targets_that_are_given_count() -> None:
    labels = torch.arange(SAMPLES) % CLASSES
    context = Context((Batch((torch.zeros(SAMPLES, 2),), {}, labels),), cross_entropy)
    assert context.target_of(logits(0), context.batches[0], 0) is labels


@pytest.mark.parametrize(
    ("output", "target", "tokens", "loss"),
    [
        ((6, 5), None, False, cross_entropy),
        ((6, 5), (6,), False, cross_entropy),
        ((6, 5, 4, 4), (6, 4, 4), False, cross_entropy),  # segmentation
        ((6, 7, 5), (6, 7), False, token_cross_entropy),
        ((6, 5, 5), (6, 5), False, token_cross_entropy),  # as many tokens as classes
        ((6, 5, 7), (6, 7), False, cross_entropy),
        ((6, 7, 5), None, True, token_cross_entropy),
        ((6, 1), None, False, squared_error),
        ((6,), None, False, squared_error),
        ((6, 3, 8, 8), None, False, squared_error),
        ((6, 5), (6, 5.0), False, squared_error),
    ],
)
def test_the_default_loss_goes_by_the_shapes(
    output: tuple[int, ...], target: tuple[float, ...] | None, tokens: bool, loss: object
) -> None:
    """A target with a float among its sizes is of floats."""
    made = None
    if target is not None:
        kind = torch.float32 if any(isinstance(size, float) for size in target) else torch.long
        made = torch.zeros(*map(int, target), dtype=kind)
    chosen, reason = default_loss(torch.zeros(output), made, tokens)
    assert chosen is loss
    assert "output (N" in reason


def test_targets_that_fit_no_default_loss_are_refused_with_both_shapes() -> None:
    with pytest.raises(DataError, match=r"output \(N, 5\) and targets \(N, 4\)"):
        default_loss(torch.zeros(6, 5), torch.zeros(6, 4), False)
    with pytest.raises(LossError, match="the model returned tuple: give loss="):
        default_loss((torch.zeros(6, 5), torch.zeros(6, 5)), None, False)


def test_tokens_have_the_loss_of_their_classes() -> None:
    """(N, L, classes) in torch's own layout, (N, classes, L)."""
    scores, labels = logits(0, 3), logits(1, 3).argmax(1)
    assert torch.equal(token_cross_entropy(scores.movedim(1, -1), labels), F.cross_entropy(scores, labels))
    context, p, q = unlabelled(loss=token_cross_entropy), logits(0, 3), logits(1, 3)
    target = context.target_of(p.movedim(1, -1), context.batches[0], 0)
    same = unlabelled().loss_at(q, ExpectedLabels.of(p), 0)
    assert float(context.loss_at(q.movedim(1, -1), target, 0)) == pytest.approx(float(same), rel=1e-12)


def test_drawn_targets_of_the_squared_error_make_its_hessian() -> None:
    """c E[g g^T] over draws is the Hessian, 2 / c times the identity, c elements: the mean of 4,000 squared gradients
    has a relative standard error of sqrt(2 / 4000) = 2.2%, of which five are allowed."""
    context, output = unlabelled(loss=squared_error), logits(0)
    random, total = torch.Generator().manual_seed(0), torch.zeros_like(output)
    for _ in range(4000):
        at = output.clone().requires_grad_()
        target = context.drawn(at, random)
        (gradient,) = torch.autograd.grad(squared_error(at, target), at)
        total += context.draws(target, 0) * gradient.square() / 4000
    hessian = 2 / output.numel()
    assert float(total.mean()) == pytest.approx(hessian, rel=5 * 0.022 / output.numel() ** 0.5)
    assert float((total / hessian - 1).abs().max()) < 5 * 0.022
