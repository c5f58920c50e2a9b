"""Losses of data without targets: expectations over targets in place of draws, and losses sample by sample."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hawqfx.errors import DataError, LossError
from hawqfx.frontend.context import Context, DrawnTargets
from hawqfx.frontend.criteria import (
    IGNORED_LABEL,
    Bernoulli,
    Categorical,
    Criterion,
    ExpectedLabels,
    SquaredError,
    sample_labels,
)
from hawqfx.frontend.data import Batch, gather
from hawqfx.frontend.losses import (
    binary_cross_entropy,
    criterion_of,
    cross_entropy,
    squared_error,
    token_cross_entropy,
)
from hawqfx.frontend.several import Part, Several

SAMPLES, CLASSES = 6, 5
TWO = Several((Part("yes", Bernoulli(), 1.0), Part("size", SquaredError(), 0.3)), ("yes", "size", "number"))


def two(z: Tensor) -> dict[str, Any]:
    """Outputs of different sizes, and one that does not count."""
    return {"yes": z[:, :2].sigmoid(), "size": z[:, 2:], "number": 3}


# a criterion, and the output of a network with logits (SAMPLES, CLASSES)
CASES: dict[str, tuple[Criterion, Callable[[Tensor], Any]]] = {
    "logits": (Categorical(), lambda z: z),
    "probabilities": (Categorical(1, "probabilities"), lambda z: z.softmax(1)),
    "log-probabilities": (Categorical(1, "log-probabilities"), lambda z: z.log_softmax(1)),
    "tokens": (Categorical(-1), lambda z: z.reshape(2, 3, CLASSES)),
    "causal": (Categorical(-1, causal=True), lambda z: z.reshape(2, 3, CLASSES)),
    "sigmoids": (Bernoulli(), lambda z: z.sigmoid()),
    "squares": (SquaredError(), lambda z: z),
    "two": (TWO, two),
}


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
    drawn = torch.stack([cross_entropy(q, sample_labels(p.softmax(1), random)) for _ in range(4000)])
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


def test_tokens_have_the_loss_of_their_classes() -> None:
    """(N, L, classes) in torch's own layout, (N, classes, L)."""
    scores, labels = logits(0, 3), logits(1, 3).argmax(1)
    assert torch.equal(token_cross_entropy(scores.movedim(1, -1), labels), F.cross_entropy(scores, labels))
    context, p, q = unlabelled(loss=token_cross_entropy), logits(0, 3), logits(1, 3)
    target = context.target_of(p.movedim(1, -1), context.batches[0], 0)
    same = unlabelled().loss_at(q, ExpectedLabels(p.softmax(1)), 0)
    assert float(context.loss_at(q.movedim(1, -1), target, 0)) == pytest.approx(float(same), rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_draws_make_the_gauss_newton_matrix(case: str) -> None:
    """c E[g g^T] over draws, against the Hessian of the expected loss by the logits in float64, whose gradient is zero
    there, so that it is the Gauss-Newton matrix.  All 900 entries within 5 standard errors of 4,000 draws."""
    criterion, network = CASES[case]
    z, random = logits(0), torch.Generator().manual_seed(0)
    target = criterion.expectation(network(z))

    def expected(z: Tensor) -> Tensor:
        if case != "causal":
            return criterion.mean(network(z), target)
        output = network(z)[:, :-1]  # what is drawn for data with labels: the first two of three positions
        return Categorical(-1).mean(output, ExpectedLabels(target.probabilities[:, :, :-1]))

    hessian = torch.autograd.functional.hessian(expected, z).reshape(z.numel(), z.numel())
    products = []
    for _ in range(4000):
        at = z.clone().requires_grad_()
        output = network(at)
        drawn = criterion.draw(output, random)
        (gradient,) = torch.autograd.grad(criterion.mean(output, drawn), at)
        draws = criterion.draws(drawn)
        assert draws is not None
        products.append(draws * torch.outer(gradient.reshape(-1), gradient.reshape(-1)))
    stacked = torch.stack(products)
    error = stacked.std(0) / 4000**0.5
    assert bool(
        ((stacked.mean(0) - hessian).abs() <= 5 * error + 1e-12).all()
    )  # entries that are zero but for rounding
    assert float(hessian.trace()) > 0


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("causal", "squares", "two")])
def test_the_expectation_is_the_mean_over_draws(case: str) -> None:
    """Of another network, within 4 of the standard errors of 4,000 draws; the squared error lacks its variance, which
    is a constant."""
    criterion, network = CASES[case]
    p, q, random = logits(0), logits(1), torch.Generator().manual_seed(0)
    expected = float(criterion.mean(network(q), criterion.expectation(network(p))))
    drawn = torch.stack([criterion.mean(network(q), criterion.draw(network(p), random)) for _ in range(4000)])
    assert abs(float(drawn.mean()) - expected) <= 4 * float(drawn.std()) / 4000**0.5


@pytest.mark.parametrize("causal", [False, True])
def test_what_labels_leave_out_is_not_drawn(causal: bool) -> None:
    """As padding of texts; and a sample without any label, measured by itself, has no loss and no slope."""
    output, random = logits(0).reshape(2, 3, -1).requires_grad_(), torch.Generator().manual_seed(0)
    criterion = Categorical(-1, causal=causal)
    labels = torch.tensor([[0, 1, IGNORED_LABEL], [IGNORED_LABEL] * 3])
    drawn = criterion.draw(output, random, labels)
    kept = [[False, True, False], [False] * 3] if causal else [[True, True, False], [False] * 3]
    assert (drawn != IGNORED_LABEL).tolist() == kept
    assert criterion.draws(drawn) == sum(map(sum, kept))
    loss = criterion.mean(output[1:], drawn[1:])
    assert float(loss) == 0
    assert not torch.autograd.grad(loss, output)[0].any()


@pytest.mark.parametrize("causal", [False, True])
def test_the_expectation_leaves_out_what_labels_leave_out(causal: bool) -> None:
    """The mean over draws of the labels that are kept, within 4 standard errors of 4,000 draws."""
    p, q, random = logits(0).reshape(2, 3, -1), logits(1).reshape(2, 3, -1), torch.Generator().manual_seed(0)
    criterion = Categorical(-1, causal=causal)
    labels = torch.tensor([[0, 1, IGNORED_LABEL], [1, IGNORED_LABEL, IGNORED_LABEL]])
    expected = float(criterion.mean(q, criterion.expectation(p, labels)))
    values = criterion.values(q, criterion.expectation(p, labels), 2)
    losses = []
    for _ in range(4000):
        drawn = sample_labels(p.softmax(-1).movedim(-1, 1), random)
        if causal:
            drawn = torch.cat([drawn[:, :1], drawn[:, :-1]], 1)
        losses.append(criterion.mean(q, torch.where(labels == IGNORED_LABEL, labels, drawn)))
    found = torch.stack(losses)
    assert abs(float(found.mean()) - expected) <= 4 * float(found.std()) / 4000**0.5
    assert float(values.mean()) == pytest.approx(expected, rel=1e-12)


def test_the_expectation_of_sigmoids_is_their_divergence_and_entropy() -> None:
    p, q = logits(0).sigmoid(), logits(1).sigmoid()
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    entropy = -p * p.log() - (1 - p) * (1 - p).log()
    expected = Bernoulli().mean(q, Bernoulli().expectation(p))
    assert float(expected) == pytest.approx(float((kl + entropy).mean()), rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_each_sample_and_have_the_mean_of_the_batch(case: str) -> None:
    """With expected and with drawn targets; each value is the loss of its sample alone."""
    criterion, network = CASES[case]
    p, q = logits(0), logits(1)
    target = criterion.expectation(network(p))
    samples = 2 if case in ("tokens", "causal") else SAMPLES
    values = criterion.values(network(q), target, samples)
    assert values.shape == (samples,)
    assert float(values.mean()) == pytest.approx(float(criterion.mean(network(q), target)), rel=1e-12)
    rows = slice(SAMPLES // samples)
    if samples == SAMPLES:
        alone = criterion.mean(network(q[rows]), criterion.expectation(network(p[rows])))
        assert float(values[0]) == pytest.approx(float(alone), rel=1e-12)
    if case != "two":  # whose draws are weighed for gradients
        drawn = criterion.draw(network(p), torch.Generator().manual_seed(0))
        values = criterion.values(network(q), drawn, samples)
        assert float(values.mean()) == pytest.approx(float(criterion.mean(network(q), drawn)), rel=1e-12)


def test_boxes_that_are_no_samples_are_gathered_by_sample() -> None:
    """An output (N k, 4): a value per sample, not per box; and one for the batch where the boxes do not part."""
    boxes = torch.arange(24, dtype=torch.float64).reshape(6, 4)
    values = SquaredError().values(boxes, torch.zeros(6, 4), 3)
    assert values.tolist() == [float(boxes[2 * k : 2 * k + 2].square().mean()) for k in range(3)]
    assert SquaredError().values(boxes, torch.zeros(6, 4), 4).tolist() == [float(boxes.square().mean())]


def test_saturated_outputs_have_finite_losses_and_slopes() -> None:
    """In float32 a sigmoid of 20 is 1, where 1 - p below 2^-24 is lost; the softmax of a class far behind is 0, where
    what is below 2^-126 is."""
    z = torch.tensor([[200.0, -200.0]], requires_grad=True)
    wrong = Bernoulli().mean(z.sigmoid(), torch.tensor([[0.0, 1.0]]))
    assert wrong.item() == pytest.approx(24 * math.log(2), rel=1e-6)  # in float32, as below
    assert 0 <= Bernoulli().mean(z.sigmoid(), torch.tensor([[1.0, 0.0]])).item() < 1e-7
    far = Categorical(1, "probabilities").mean(z.softmax(1), torch.tensor([1]))
    assert far.item() == pytest.approx(126 * math.log(2), rel=1e-6)
    for loss in (wrong, far):
        assert bool(torch.autograd.grad(loss, z, retain_graph=True)[0].isfinite().all())


def test_plain_functions_are_known_criteria() -> None:
    assert criterion_of(cross_entropy) == Categorical(1)
    assert criterion_of(token_cross_entropy) == Categorical(-1)
    assert criterion_of(binary_cross_entropy) == Bernoulli()
    assert criterion_of(squared_error) == SquaredError()
    p, t = logits(0).sigmoid(), (logits(1) > 0).double()
    assert float(binary_cross_entropy(p, t)) == pytest.approx(float(F.binary_cross_entropy(p, t)), rel=1e-12)
    assert not criterion_of(lambda output, target: output.sum()).knows_distribution
    assert criterion_of(lambda output, target: output.sum(), lambda output, random: None).knows_distribution
    with pytest.raises(LossError, match="several outputs: draw= needs loss= beside it"):
        criterion_of(TWO, lambda output, random: None)


def test_one_missing_target_of_two_is_expected() -> None:
    z = logits(0)
    sizes = torch.zeros(SAMPLES, 3, dtype=torch.float64)
    batch = Batch((z,), {}, {"yes": None, "size": sizes})
    assert batch.lacks_targets
    work = Context((batch,), TWO)
    target = work.target_of(two(z), batch, 0)
    assert torch.equal(target["yes"], z[:, :2].sigmoid())
    assert target["size"] is sizes
    expected = Bernoulli().mean(target["yes"], target["yes"]) + 0.3 * z[:, 2:].square().mean()
    assert float(work.loss_at(two(z), target, 0)) == pytest.approx(float(expected), rel=1e-12)
    left_out = work.target_of(two(z), Batch((z,), {}, {"size": sizes}), 0)
    assert torch.equal(left_out["yes"], target["yes"])


@pytest.mark.parametrize(
    ("criterion", "target", "message"),
    [
        (Bernoulli(), torch.zeros(6, 4), r"in the shape of the output, \(N, 5\), not \(N, 4\)"),
        (Bernoulli(), torch.full((6, 5), 3.0), "from 0 to 1; these go from 3 to 3"),
        (Bernoulli(), "yes", "not str"),
        (Categorical(), torch.zeros(6, 5).long(), r"output \(N, 5\) needs labels \(N\), .* not \(N, 5\)"),
        (Categorical(), torch.zeros(6), "needs integer labels"),
        (SquaredError(), torch.zeros(6), r"\(N, 5\), not \(N\)"),
        (TWO, torch.zeros(6), r"outputs yes, size, number, of which yes, size .* one tensor \(N\): give targets in"),
        (TWO, (torch.zeros(6),), "the targets are a tuple of 0: give targets in the same structure, with None"),
        (TWO, {"wrong": torch.zeros(6)}, "a dict of wrong"),
        (TWO, {"number": torch.zeros(6)}, "a dict of number"),
    ],
)
def test_targets_that_do_not_fit_are_refused(criterion: Criterion, target: object, message: str) -> None:
    z = logits(0)
    with pytest.raises(DataError, match=message):
        criterion.mean(two(z) if criterion is TWO else z.sigmoid(), target)
