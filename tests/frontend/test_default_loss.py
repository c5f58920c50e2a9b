"""The default loss: by the last operators of the network and the shapes of its output and targets."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hawqfx
from hawqfx import pipeline
from hawqfx.errors import DataError, LossError
from hawqfx.frontend.capture import capture
from hawqfx.frontend.context import Context
from hawqfx.frontend.criteria import Bernoulli, Categorical, Criterion, SquaredError
from hawqfx.frontend.data import Batch, gather
from hawqfx.frontend.default_loss import criterion_for, default_criterion
from hawqfx.frontend.endings import run_with_endings
from hawqfx.frontend.several import Part, Several
from hawqfx.ir.facts import LossIncrease
from hawqfx.pass_manager.manager import run
from tests.nets import EndingMlp, build, images

CROSS_ENTROPY, TOKENS, SQUARED = Categorical(1), Categorical(-1), SquaredError()


class Function(nn.Module):
    """A network (N, 10) -> (N, 6) with a function of its own behind it."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.function = nn.Linear(10, 6), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer(x))


X = torch.randn(8, 10, generator=torch.Generator().manual_seed(1))


def default(function: Callable[[Tensor], Any], target: Any = None) -> tuple[Criterion, str]:
    batch = Batch((X,), {}, target)
    return default_criterion(capture(Function(function).eval(), batch), [batch])


@pytest.mark.parametrize(
    ("output", "target", "tokens", "criterion"),
    [
        ((6, 5), None, False, CROSS_ENTROPY),
        ((6, 5), (6,), False, CROSS_ENTROPY),
        ((6, 5, 4, 4), (6, 4, 4), False, CROSS_ENTROPY),  # segmentation
        ((6, 7, 5), (6, 7), False, TOKENS),
        ((6, 5, 5), (6, 5), False, TOKENS),  # as many tokens as classes
        ((6, 5, 7), (6, 7), False, CROSS_ENTROPY),
        ((6, 7, 5), None, True, TOKENS),
        ((6, 1), None, False, SQUARED),
        ((6,), None, False, SQUARED),
        ((6, 3, 8, 8), None, False, SQUARED),
        ((6, 5), (6, 5.0), False, SQUARED),
    ],
)
def test_without_an_ending_it_goes_by_the_shapes(
    output: tuple[int, ...], target: tuple[float, ...] | None, tokens: bool, criterion: Criterion
) -> None:
    """A target with a float among its sizes is of floats."""
    made = None
    if target is not None:
        kind = torch.float32 if any(isinstance(size, float) for size in target) else torch.long
        made = torch.zeros(*map(int, target), dtype=kind)
    inputs = torch.zeros(6, 7, dtype=torch.long if tokens else torch.float32)
    chosen, reason = criterion_for(torch.zeros(output), None, [made], [Batch((inputs,), {})])
    assert chosen == criterion
    assert "output (N" in reason


@pytest.mark.parametrize(
    ("function", "ending"),
    [
        (lambda z: z, None),
        (lambda z: z.softmax(1), "softmax"),
        (lambda z: torch.special.softmax(z, 1).unsqueeze(2).flatten(1), "softmax"),
        (lambda z: z.double().softmax(-1).float().transpose(0, 1).movedim(0, 1), "softmax"),
        (lambda z: z.log_softmax(1).contiguous(), "log_softmax"),
        (lambda z: z.sigmoid().view(-1, 2, 3).permute(0, 2, 1), "sigmoid"),
        (lambda z: z.sigmoid_()[:, :3].squeeze(), "sigmoid"),
        (lambda z: torch.special.expit(z).chunk(2, 1)[1], "sigmoid"),
        (lambda z: torch.cat([z[:, :2].sigmoid(), z[:, 2:].sigmoid()], 1), "sigmoid"),
        (lambda z: torch.cat([z[:, :2], z[:, 2:].sigmoid()], 1), None),
        (lambda z: z * z.sigmoid(), None),
        (lambda z: z.softmax(1) @ z.sigmoid().mT, None),
    ],
)
@pytest.mark.parametrize("decomposed", [False, True])
def test_endings_are_found_behind_operators_that_move_elements(
    function: Callable[[Tensor], Tensor], ending: str | None, decomposed: bool
) -> None:
    batch, model = Batch((X,), {}), Function(function).eval()
    if decomposed:
        given = torch.export.export(model, (X,)).run_decompositions()
        output, made = run_with_endings(capture(given, batch), batch)
    else:
        output, made = run_with_endings(capture(model, batch), batch)
    assert [found for tensor, found in made if tensor is output] == [ending]


LABELS, BITS = torch.arange(8) % 6, (X[:, :6] > 0).long()


@pytest.mark.parametrize(
    ("function", "target", "criterion", "reason"),
    [
        (
            lambda z: z.softmax(1), LABELS, Categorical(1, "probabilities"),
            "cross-entropy (nats) of probabilities over dimension 1, for output (N, 6) that ends in a softmax and "
            "targets (N)",
        ),
        (
            lambda z: z.log_softmax(1), None, Categorical(1, "log-probabilities"),
            "cross-entropy (nats) of log-probabilities over dimension 1, for output (N, 6) that ends in a log_softmax, "
            "without targets",
        ),
        (
            lambda z: z.reshape(-1, 3, 2).softmax(1), LABELS[:, None] % 3 + torch.zeros(2).long(),
            Categorical(1, "probabilities"), "for output (N, 3, 2) that ends in a softmax and targets (N, 2)",
        ),
        (lambda z: z.reshape(-1, 3, 2).softmax(2), None, Categorical(-1, "probabilities"), "over the last dimension"),
        (lambda z: z.reshape(-1, 3, 1, 2).softmax(1), None, Categorical(1, "probabilities"), "over dimension 1"),
        (lambda z: z.reshape(-1, 3, 2).softmax(2).flatten(1), None, SQUARED, "squared error to the float output"),
        (lambda z: z.softmax(1), X[:, :6], SQUARED, "squared error"),
        (
            lambda z: z.sigmoid(), None, Bernoulli(),
            "binary cross-entropy (nats) of the 6 sigmoids, for output (N, 6) that ends in a sigmoid, without targets",
        ),
        (lambda z: z.sigmoid(), BITS, Bernoulli(), "that ends in a sigmoid and targets (N, 6)"),
        (lambda z: z.sigmoid(), BITS.bool(), Bernoulli(), "binary"),
        (lambda z: z.sigmoid(), BITS.float(), Bernoulli(), "binary"),
        (lambda z: z[:, :1].sigmoid(), BITS[:, 0], Bernoulli(), "of the 1 sigmoids, for output (N, 1)"),
        (lambda z: z[:, :1].sigmoid(), BITS[:, :1], Bernoulli(), "and targets (N, 1)"),
        (lambda z: z[:, 0].sigmoid(), BITS[:, :1], Bernoulli(), "for output (N)"),
        (lambda z: z.reshape(-1, 1, 2, 3).sigmoid(), BITS.reshape(-1, 1, 2, 3) / 2, Bernoulli(), "(N, 1, 2, 3)"),
        (lambda z: z.reshape(-1, 1, 2, 3).sigmoid(), BITS.reshape(-1, 1, 2, 3) * 255.0, SQUARED, "beyond 0 and 1"),
    ],
)  # fmt: skip
def test_the_ending_decides(
    function: Callable[[Tensor], Tensor], target: Tensor | None, criterion: Criterion, reason: str
) -> None:
    chosen, words = default(function, target)
    assert chosen == criterion
    assert reason in words


@pytest.mark.parametrize(
    ("function", "target", "message"),
    [
        (
            lambda z: z, torch.zeros(8, 4),
            r"no default loss fits output \(N, 6\) and targets \(N, 4\): labels are integers.*give loss= for others",
        ),
        (
            lambda z: z.sigmoid(), LABELS,
            r"output \(N, 6\) that ends in a sigmoid and targets \(N\): those of sigmoids are from 0 to 1 in the shape",
        ),
        (lambda z: z.sigmoid(), BITS * 2, r"targets \(N, 6\) beyond 0 and 1: those of sigmoids are from 0 to 1"),
        (lambda z: z.softmax(1), BITS, r"output \(N, 6\) that ends in a softmax and targets \(N, 6\): labels are"),
        (lambda z: z, ([1.0],), "targets that are a tuple: give loss="),
        (lambda z: (z, z), LABELS, r"outputs 0, 1, of which 0, 1 have a default loss, .* one tensor \(N\)"),
        (lambda z: (z, z), (LABELS,), "a tuple of 0: give targets in the same structure, with None"),
        (lambda z: {"a": z, "b": z}, {"c": LABELS}, "outputs a, b, .* a dict of c: give targets"),
    ],
)  # fmt: skip
def test_targets_that_fit_nothing_are_refused_with_both_shapes(
    function: Callable[[Tensor], Any], target: object, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        default(function, target)


def test_all_batches_decide_whether_targets_are_of_sigmoids() -> None:
    batches = gather([(X, BITS / 1.0), (X, BITS * 2.0)])
    program = capture(Function(torch.sigmoid).eval(), batches[0])
    assert default_criterion(program, batches)[0] == SQUARED


def test_logits_are_judged_alone_and_outputs_without_them_together() -> None:
    assert default(lambda z: {"logits": z, "hidden": z * 2})[0] == CROSS_ENTROPY
    chosen, reason = default(
        lambda z: {"boxes": z[:, :4].view(-1, 2, 2) * 3, "scores": z[:, 4:].sigmoid(), "hidden": (z, z)}
    )
    variance = (Function(lambda z: z)(X).detach()[:, :4] * 3).double().var(correction=0)
    assert isinstance(chosen, Several)
    squared, binary = chosen.parts
    assert binary == Part("scores", Bernoulli())
    assert squared.scale == pytest.approx(1 / float(variance), rel=1e-6)  # outputs in float32
    assert reason == (
        "the sum over 2 outputs; boxes: squared error to the float output, for output (N, 2, 2), without targets, "
        "over the output's variance; scores: binary cross-entropy (nats) of the 2 sigmoids, for output (N, 2) that "
        "ends in a sigmoid, without targets; without hidden"
    )


def test_a_single_tensor_in_a_tuple_takes_its_target_bare_or_not() -> None:
    for target in (LABELS, (LABELS, None)):
        chosen, _ = default(lambda z: (z, z.argmax(1)), target)
        assert chosen == Several((Part(0, CROSS_ENTROPY),), (0, 1))
    with pytest.raises(LossError, match="need a tensor of floats"):
        default(lambda z: (z.argmax(1), [z]))


def test_a_constant_output_is_not_divided_by_its_variance() -> None:
    chosen, _ = default(lambda z: (z[:, :1], torch.zeros_like(z[:, :1]) + 3))
    assert isinstance(chosen, Several)
    assert chosen.parts[1].scale == 1


class Sigmoids(nn.Module):
    """Twelve labels that do not exclude each other."""

    def __init__(self, head: Callable[[Tensor], Any] = torch.sigmoid) -> None:
        super().__init__()
        self.first, self.last, self.head = nn.Linear(10, 16), nn.Linear(16, 12), head

    def forward(self, x: Tensor) -> Any:
        return self.head(self.last(torch.relu(self.first(x))))


@pytest.mark.parametrize("targets", [False, True])
def test_compile_says_in_its_first_lines_what_it_minimises(targets: bool) -> None:
    data: Sequence[Any] = [(X, (X[:, :1] > torch.linspace(-1, 1, 12)).long())] if targets else [X]
    compiled = hawqfx.compile(build(Sigmoids), "weight_bits=5", data)
    what = " and targets (N, 12)" if targets else ", without targets"
    assert compiled.summary().splitlines()[:2] == [
        f"loss: binary cross-entropy (nats) of the 12 sigmoids, for output (N, 12) that ends in a sigmoid{what}",
        "calibrated on 8 samples",
    ]
    assert compiled.session.context.loss == Bernoulli()
    given = hawqfx.compile(build(Sigmoids), "weight_bits=5", [X], loss=lambda output, target: output.square().mean())
    assert given.summary().startswith("loss: <lambda>, as given by loss=\n")


@pytest.mark.parametrize("target", [None, (None, X[:, :6]), ((X[:, :6] > 0), None)])
def test_two_outputs_compile(target: Any) -> None:
    both = lambda z: (z[:, :6].sigmoid(), z[:, 6:])  # noqa: E731
    compiled = hawqfx.compile(build(lambda: Sigmoids(both)), "weight_bits=5", [(X, target)])
    what = "the sum over 2 outputs; 0: binary cross-entropy (nats) of the 6 sigmoids"
    assert compiled.summary().startswith(f"loss: {what}")
    before, after = compiled.calibration_loss()
    assert 0 < before != after
    if target is None:  # the expected loss is least at the float network
        assert before < after


@pytest.mark.parametrize("targets", [False, True])
@pytest.mark.parametrize("metric", ["measured", "fisher", "hawq-v2", "taylor"])
def test_a_softmax_at_the_end_changes_no_increase(targets: bool, metric: str) -> None:
    """In float64, where the softmax of the logits and that of the network differ by rounding alone, far below 1e-5."""
    data = [(x.double(), y) if targets else x.double() for x, y in images(count=2, batch=6)]
    found = []
    for end in (nn.Identity(), nn.Softmax(1), nn.LogSoftmax(1)):
        network = build(lambda end=end: EndingMlp(end)).double()  # type: ignore[misc]
        batches = gather(data)
        captured = capture(network, batches[0])
        work = Context(batches, default_criterion(captured, batches)[0])
        steps = pipeline.recipe(metric=pipeline.metric(metric))
        measured = run([*steps.prepare, *steps.measure], captured, work)
        increases = [measured.facts.get(site.key, LossIncrease).by_format for site in measured.sites]
        found.append([value for by_format in increases for value in by_format.values()])
    assert any(found[0])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("ignored", [False, True])
def test_causal_labels_have_the_loss_of_transformers(ignored: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=12, n_embd=16, n_layer=1, n_head=2, use_cache=False, attn_implementation="eager"
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(40, (4, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    if ignored:
        labels[:, :3] = -100
    batch = Batch((), {"input_ids": ids}, labels)
    program = capture(model, batch)
    chosen, reason = default_criterion(program, [batch])
    assert chosen == Categorical(-1, causal=True)
    assert "labels equal the inputs: each token predicts the next" in reason
    output = program.run((), {"input_ids": ids})
    expected = model(input_ids=ids, labels=labels).loss.item()
    assert chosen.mean(output, labels).item() == pytest.approx(expected, rel=1e-5)  # float32
    values = chosen.values(output, labels, 4)
    assert values.mean().item() == pytest.approx(expected, rel=1e-5)
    # labels that were shifted already, and tokens without labels
    shifted = torch.cat([ids[:, 1:], ids[:, :1]], 1)
    chosen, reason = default_criterion(program, [Batch((), {"input_ids": ids}, shifted)])
    assert chosen == TOKENS
    assert "labels are not shifted" in reason
    assert default_criterion(program, [Batch((), {"input_ids": ids})])[0] == TOKENS


def test_one_hot_and_soft_targets_are_distributions_over_classes() -> None:
    """As torch's cross-entropy takes them; the squared error stays for targets that are none."""
    random = torch.Generator().manual_seed(2)
    labels, soft = torch.randint(0, 6, (8,), generator=random), torch.rand(8, 6, generator=random).softmax(1)
    network = Function(lambda z: z).eval()
    z = network(X)
    for target in (soft, soft.double(), nn.functional.one_hot(labels, 6), nn.functional.one_hot(labels, 6).float()):
        criterion, reason = default(lambda z: z, target)
        assert criterion == CROSS_ENTROPY
        assert reason.endswith("for output (N, 6) and targets (N, 6) that are distributions")
        expected = nn.functional.cross_entropy(z, target.float())
        assert float(criterion.mean(z, target)) == pytest.approx(float(expected), rel=1e-6)
        assert float(criterion.values(z, target, 8).mean()) == pytest.approx(float(expected), rel=1e-6)
    assert default(lambda z: z, soft * 1.1)[0] == SQUARED
    tokens = lambda z: z.reshape(-1, 3, 2)  # noqa: E731
    assert default(tokens, torch.rand(8, 3, 2, generator=random).softmax(2))[0] == TOKENS
    for one_hot in (nn.functional.one_hot(labels, 6), soft):
        compiled = hawqfx.compile(network, "weight_bits=5", [(X, one_hot)])
        before, after = compiled.calibration_loss()
        assert before == pytest.approx(float(nn.functional.cross_entropy(z, one_hot.float())), rel=1e-5)
        assert after != before
