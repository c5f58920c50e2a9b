"""The metrics, each against an oracle of its own: dense Hessians, Jacobians, derivatives along a line, plain losses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from hawqfx.errors import LossError
from hawqfx.frontend.capture import capture
from hawqfx.frontend.context import Context
from hawqfx.frontend.criteria import Bernoulli, Categorical, Criterion, SquaredError
from hawqfx.frontend.data import Batch
from hawqfx.frontend.losses import cross_entropy, squared_error
from hawqfx.frontend.several import Part, Several
from hawqfx.ir.facts import LossIncrease, QuantizationError, RoundedWeights, Sensitivity
from hawqfx.ir.program import Program
from hawqfx.ir.quantizers import activation_at, errors_at, weight_at
from hawqfx.ir.sites import ActivationSite, Site
from hawqfx.maths.formats import FLOAT, Format
from hawqfx.pass_manager.manager import run
from hawqfx.passes import gauss_newton
from hawqfx.passes.at_plan import AtPlan, Moves
from hawqfx.passes.fisher import Fisher
from hawqfx.passes.gauss_newton import GaussNewton
from hawqfx.passes.hawq_v1 import HawqV1
from hawqfx.passes.hawq_v2 import HawqV2
from hawqfx.passes.measured import Measured
from hawqfx.passes.mse import Mse
from hawqfx.passes.taylor import Taylor
from hawqfx.sensitivity.double_backward import Operators
from hawqfx.sensitivity.forward import Forward, forward
from hawqfx.sensitivity.metrics import SensitivityMetric
from hawqfx.sensitivity.quantity import Estimate, Quantity
from tests.nets import Attention, EndingMlp, Mlp, Plain, SharedLayer, TiedWeights, build, images
from tests.tools import after, context, measuring, tensor_at


@cache
def double_context() -> Context:
    return context([(x.double(), y) for x, y in images(count=2, batch=6)])


@cache
def double_program(make: Callable[[], nn.Module]) -> Program:
    program = capture(build(make).double(), double_context().batches[0])
    return run(measuring()[1:-1], program, double_context())  # nothing to fold; all but the metric


def dense_trace(program: Program, work: Context, site: str) -> float:
    """Mean trace of the Hessian of the mean loss: column by column in float64, no probes and no sharing."""
    total = 0.0
    for batch in work.batches:
        share = batch.size / work.samples
        if any(site == activation.key for activation in program.activations):

            def loss_of_shift(shift: Tensor, batch: Batch = batch) -> Tensor:
                output = program.run(batch.args, {}, lambda _, value: value + shift, at=[site])
                return F.cross_entropy(output, batch.target)

            hessian = torch.autograd.functional.hessian(
                loss_of_shift, torch.zeros_like(tensor_at(program, batch, site))
            )
            # the Hessian of the mean over N samples, so its trace is the mean of the samples' traces
        else:

            def loss_of_weight(weight: Tensor, batch: Batch = batch) -> Tensor:
                return F.cross_entropy(program.run(batch.args, {}, tensors={site: weight}), batch.target)

            hessian = torch.autograd.functional.hessian(loss_of_weight, program.tensor(site).detach())
        n = round(hessian.numel() ** 0.5)
        total += share * float(hessian.reshape(n, n).trace())
    return total


def counted_gradients(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A list that grows with every backward pass from now on: whether it made a graph."""
    calls: list[bool] = []
    original = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs.get("create_graph", False))
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    return calls


@pytest.mark.parametrize("make", [Mlp, TiedWeights])
def test_converges_to_the_dense_traces_at_the_rate_of_hutchinson(make: Callable[[], nn.Module]) -> None:
    """Every site at once, from shared probes: within 5 standard errors (22 estimates: chance of one outside, 1e-5),
    and a 16 times larger number of probes gives a 4 times smaller standard error."""
    program, work = double_program(make), double_context()
    few = run([HawqV2(40, tolerance=0)], program, work)
    many = run([HawqV2(640, tolerance=0)], program, work)
    for site in program.sites:
        exact = dense_trace(program, work, site.key) / site.numel
        for measured in (few, many):
            fact = measured.facts.get(site.key, Sensitivity)
            assert abs(fact.curvature - exact) <= 5 * fact.stderr, site.key
        # the standard deviation of 40 samples is itself known to about 11%, and heavy tails double that: 4 +- 40%
        assert 2.4 < few.facts.get(site.key, Sensitivity).stderr / many.facts.get(site.key, Sensitivity).stderr < 5.6, (
            site.key
        )


def test_the_error_itself_falls_like_one_over_the_root_of_probes() -> None:
    """rms of (estimate - dense) over 8 seeds and all sites, each in units of its own standard deviation, at 4 and at
    64 probes: ratio 4.  Of 8 x 8 errors the rms is known to about 1/sqrt(2 * 64) = 9%; 4 +- 45%."""
    program, work = double_program(Mlp), double_context()
    exact = {site.key: dense_trace(program, work, site.key) / site.numel for site in program.sites}
    long = run([HawqV2(256, tolerance=0)], program, work)
    deviation = {key: 16 * long.facts.get(key, Sensitivity).stderr for key in exact}

    def rms(probes: int) -> float:
        errors = []
        for seed in range(8):
            measured = run([HawqV2(probes, tolerance=0)], program, replace(work, seed=seed))
            found = {key: measured.facts.get(key, Sensitivity).curvature for key in exact}
            errors += [(found[key] - exact[key]) / deviation[key] for key in exact]
        return float(torch.tensor(errors).square().mean().sqrt())

    assert 2.2 < rms(4) / rms(64) < 5.8


def test_one_backward_per_probe_serves_every_site(monkeypatch: pytest.MonkeyPatch) -> None:
    program, work = double_program(Mlp), double_context()
    calls = counted_gradients(monkeypatch)
    run([HawqV2(3, tolerance=0)], program, work)
    # before these, every operator is tried on its own
    assert calls[-8:] == [True, False, False, False] * len(work.batches)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others() -> None:
    program = double_program(Mlp)

    def traces(seed: int) -> list[float]:
        measured = run([HawqV2(4, tolerance=0)], program, replace(double_context(), seed=seed))
        return [measured.facts.get(site.key, Sensitivity).curvature for site in program.sites]

    assert traces(0) == traces(0)
    assert traces(0) != traces(1)


def test_batchnorm_is_in_eval_mode_so_that_samples_are_independent() -> None:
    """Traces over two batches of one size are the mean of those over each."""
    program, data = after("cost", Plain), images(count=2, batch=8)

    def exact(batches: list[tuple[Tensor, Tensor]]) -> float:
        return dense_trace(program, context(batches), "head.weight")

    joined = [(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))]
    assert exact(joined) == pytest.approx(exact(data), rel=1e-4)  # float32 Hessian entries


def test_attention_is_measured_by_its_mathematical_kernel() -> None:
    measured = after("hawq_v2", Attention)
    assert all(measured.facts.get(site.key, Sensitivity).curvature != 0 for site in measured.weights)


def test_labels_are_sampled_where_none_are_given() -> None:
    """With labels from the model's own distribution the expected Hessian of the head is the Fisher block, p(1-p) x^2:
    positive, and the same for the same seed."""
    program = double_program(Mlp)
    unlabelled = context([x.double() for x, _ in images(count=2, batch=6)])
    measured = run([HawqV2(64, tolerance=0)], program, unlabelled)
    batch = unlabelled.batches
    total = 0.0
    for one in batch:
        inputs = tensor_at(program, one, "tanh_1")
        p = program.run(one.args, {}).detach().softmax(1)
        total += float((p * (1 - p)).sum(1) @ inputs.square().sum(1)) / unlabelled.samples
    fact = measured.facts.get("head.weight", Sensitivity)
    # the loss is convex in the last layer and its Hessian there does not depend on the labels at all
    assert abs(fact.curvature - total / 12) <= 5 * fact.stderr


def test_a_loss_that_ignores_a_site_gives_it_zero_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    program = double_program(Mlp)
    estimates = {Quantity(site.key): Estimate(1.0, 0.1, 2) for site in program.sites}
    zero = HawqV2(2).conclude(program, estimates | {Quantity("first.weight"): Estimate(0.0, 0.0, 2)})
    assert zero.facts.get("first.weight", Sensitivity).curvature == 0
    assert "no curvature at 'first.weight'" in caplog.text


@pytest.mark.parametrize("metric", [HawqV2(2, tolerance=0), Measured()])
def test_a_constant_loss_is_refused(metric: SensitivityMetric) -> None:
    """It would make every site free."""
    constant = replace(double_context(), loss=lambda output, target: 0 * output.sum())
    with pytest.raises(LossError, match=r"the loss .* so that no site matters.*give loss= for such a network"):
        run([metric], double_program(Mlp), constant)


def test_a_loss_that_is_no_scalar_or_not_finite_is_refused() -> None:
    program = double_program(Mlp)
    with pytest.raises(LossError, match="must be a scalar"):
        run([HawqV2(2, tolerance=0)], program, replace(double_context(), loss=lambda output, target: output))
    with pytest.raises(LossError, match="loss of batch 0 is nan"):
        run(
            [HawqV2(2, tolerance=0)],
            program,
            replace(double_context(), loss=lambda o, t: cross_entropy(o, t) * float("nan")),
        )


def test_a_gradient_that_is_not_finite_names_the_site() -> None:
    def infinite(output: Tensor, target: Tensor) -> Tensor:
        return (output - output.detach()).abs().sqrt().sum()  # slope 1/sqrt(0)

    with pytest.raises(LossError, match=r"gradient at 'first\.weight' is not finite on batch 0"):
        run([HawqV2(2, tolerance=0)], double_program(Mlp), replace(double_context(), loss=infinite))


def test_a_gradient_that_is_not_finite_names_an_activation_as_users_call_it() -> None:
    program, work = double_program(Mlp), double_context()
    site = next(site for site in program.activations if site.name == "tanh#2 output")
    once = forward(program, work.batches[0], {})
    with pytest.raises(LossError, match="gradient at 'tanh#2 output' is not finite on batch 1"):
        once.check_gradient(1, site.key, [torch.ones(2), torch.tensor([1, float("inf")])])


def test_a_loss_that_is_not_finite_names_the_first_tensor_that_is_not() -> None:
    program, work = double_program(Mlp), double_context()
    beyond = replace(work, batches=tuple(batch.map(lambda x: x * float("nan")) for batch in work.batches))
    with pytest.raises(LossError) as caught:
        run([HawqV2(2, tolerance=0)], program, replace(beyond, loss=lambda output, target: output.sum()))
    assert caught.value.__notes__[0] == "the first tensor that is not finite there is 'input x'"


def test_a_shared_layer_has_one_trace_over_all_its_uses() -> None:
    program = after("cost", SharedLayer)
    work = context()
    fact = run([HawqV2(128, tolerance=0)], program, work).facts.get("twice.weight", Sensitivity)
    exact = dense_trace(program, work, "twice.weight") / 144
    assert abs(fact.curvature - exact) <= 5 * fact.stderr
    assert isinstance(program.activations[0], ActivationSite)


def information_of_logits(logits: Tensor) -> Tensor:
    """diag(p) - p p^T."""
    p = logits.softmax(0)
    return p.diag() - torch.outer(p, p)


def dense_fisher(
    program: Program,
    work: Context,
    site: str,
    information: Callable[[Tensor], Tensor] = information_of_logits,
    error: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """Tr(J^T I J), mean over samples: the Gauss-Newton matrix by its definition, from Jacobians J of the outputs and
    the information I (outputs, outputs) that a sample's distribution has of them; d^T J^T I J d where `error` gives d
    by the tensor of the site."""
    total = 0.0
    for batch in work.batches:
        for k in range(batch.size):
            one = Batch((batch.args[0][k : k + 1],), {})

            def flat(**changes: Any) -> Tensor:
                outputs = pytree.tree_leaves(program.run(one.args, {}, **changes))  # noqa: B023
                return torch.cat([output.reshape(-1) for output in outputs])

            def of_shift(shift: Tensor) -> Tensor:
                return flat(hook=lambda _, value: value + shift, at=[site])

            def of_weight(weight: Tensor) -> Tensor:
                return flat(tensors={site: weight})

            if any(site == activation.key for activation in program.activations):
                tensor = tensor_at(program, one, site)
                jacobian = torch.autograd.functional.jacobian(of_shift, torch.zeros_like(tensor))
            else:
                tensor = program.tensor(site).detach()
                jacobian = torch.autograd.functional.jacobian(of_weight, tensor)
            j = jacobian.reshape(3, -1)
            if error is not None:
                j = j @ error(tensor).detach().reshape(-1, 1)
            total += float((information(flat().detach()) @ j * j).sum()) / work.samples
    return total


def assert_fisher_is_dense(
    program: Program, work: Context, information: Callable[[Tensor], Tensor] = information_of_logits
) -> None:
    """400 probes of at most 10 sites: within 5 standard errors."""
    measured = run([Fisher(400, tolerance=0)], program, work)
    for site in program.sites:
        fact = measured.facts.get(site.key, Sensitivity)
        exact = dense_fisher(program, work, site.key, information)
        assert fact.stderr > 0
        assert abs(fact.curvature * site.numel - exact) <= 5 * fact.stderr * site.numel


@pytest.mark.parametrize("make", [Mlp, TiedWeights])
def test_fisher_is_the_trace_of_the_gauss_newton_matrix(make: Callable[[], nn.Module]) -> None:
    assert_fisher_is_dense(double_program(make), double_context())


@pytest.mark.parametrize("make", [Mlp, TiedWeights])
def test_gauss_newton_is_half_the_form_of_the_quantizers_own_error(make: Callable[[], nn.Module]) -> None:
    """200 passes for each of 12 samples: their squares have a standard error of sqrt(2 / 200) = 10% of a sample's form,
    and at most that of the whole, where one sample has it all.  Within 5 standard errors."""
    program, work = double_program(make), double_context()
    measured = run([GaussNewton(2400)], program, work)
    for site in program.sites:
        known = measured.facts.get(site.key, LossIncrease)
        for width, increase in known.by_format.items():

            def error(tensor: Tensor, site: Site = site, width: Format = width) -> Tensor:
                return errors_at(program, site, width, [tensor])[0]

            exact = 0.5 * dense_fisher(program, work, site.key, error=error) * optimism(program, site.key, width)
            assert abs(increase - exact) <= 0.5 * exact + 1e-12, (site.key, width)
            assert known.stderr[width] > 0 or exact < 1e-12


@pytest.mark.parametrize("make", [Mlp, TiedWeights])
def test_gauss_newton_measures_the_trace_beside(make: Callable[[], nn.Module]) -> None:
    program, work = double_program(make), double_context()
    measured = run([GaussNewton(2400)], program, work)
    for site in program.sites:
        fact = measured.facts.get(site.key, Sensitivity)
        # the sum of many forms, closer than a single one: see above
        assert fact.curvature * site.numel == pytest.approx(dense_fisher(program, work, site.key), rel=0.3)


def test_gauss_newton_shares_its_passes_out_over_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 samples: 12 forward passes of one sample each, and ceil(30 / 12) backward passes of each."""
    program, work = double_program(Mlp), double_context()
    opened: list[int] = []
    drawn: list[int] = []
    sample = gauss_newton._Slopes.sample

    def counted_forward(program: Program, batch: Batch, operators: Operators) -> Forward:
        opened.append(batch.size)
        return forward(program, batch, operators)

    def counted_sample(self: Any, probe: int, wanted: Sequence[Quantity]) -> Mapping[Quantity, float]:
        drawn.append(self.index)
        return sample(self, probe, wanted)

    monkeypatch.setattr(gauss_newton, "forward", counted_forward)
    monkeypatch.setattr(gauss_newton._Slopes, "sample", counted_sample)
    run([GaussNewton(30)], program, work)
    assert opened == [1] * 12
    assert sorted(drawn) == sorted([*range(12)] * 3)


def test_errors_that_would_take_too_much_memory_are_computed_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    program, work = double_program(Mlp), double_context()
    computed: list[object] = []

    def counted(*given: Any) -> list[Tensor]:
        computed.append(given)
        return errors_at(*given)

    monkeypatch.setattr(gauss_newton, "errors_at", counted)
    facts, counts = [], []
    for most in (1 << 30, 0):
        monkeypatch.setattr(gauss_newton, "_MOST_KEPT", most)
        facts.append(run([GaussNewton(30)], program, work).facts)
        counts.append(len(computed))
    assert counts[1] - counts[0] > 2 * counts[0]
    for site in program.sites:
        one, other = (fact.get(site.key, LossIncrease) for fact in facts)
        assert one == other


def test_gauss_newton_refuses_a_loss_whose_distribution_it_does_not_know() -> None:
    work = replace(double_context(), loss=lambda output, target: output.square().mean())
    with pytest.raises(LossError, match="gauss_newton draws targets"):
        run([GaussNewton()], double_program(Mlp), work)


def linear_network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Linear(6, 4))


def test_at_a_plan_the_change_of_a_quadratic_loss_is_exact() -> None:
    """The squared error of a linear network is quadratic in each weight, so that the expansion leaves nothing out.

    The form is the mean of 200 squares of normal variables for each of 12 samples, nearly: it has a relative standard
    error of 3% where all samples have equal parts, and 10% where one has it all.  Within 5 standard errors of 6%.
    """
    data = [x.double() for x, _ in images(count=2, batch=6)]
    work = context(data, squared_error)
    program = run(measuring()[1:-1], capture(build(linear_network).double(), work.batches[0]), work)
    plan = {site.key: FLOAT for site in program.activations} | {site.key: Format(4) for site in program.weights}
    others = tuple(Format(bits) for bits in (2, 3, 5, 8))
    moves = {key: Moves(width, () if width.is_float else others) for key, width in plan.items()}
    # what its codes fit on the calibration samples is no part of the loss on them
    program = program.learn(
        {site.key: replace(known, optimism=dict.fromkeys(known.codes, 1.0)) for site in program.weights
         for known in [program.facts.get(site.key, RoundedWeights)]}
    )  # fmt: skip
    estimates: dict[Quantity, float] = {}

    class Seen(AtPlan):
        def conclude(self, program: Program, found: Mapping[Quantity, Estimate]) -> Program:
            estimates.update({quantity: estimate.mean for quantity, estimate in found.items()})
            return super().conclude(program, found)

    learned = run([Seen(tuple(moves.items()), probes=2400)], program, work)

    def loss(formats: Mapping[str, Format]) -> float:
        weights = {key: weight_at(program, key, width) for key, width in formats.items() if not width.is_float}
        values = []
        for batch in work.batches:
            answer, wanted = program.run(batch.args, {}, tensors=weights), program.run(batch.args, {})
            values.append(float(squared_error(answer, wanted).detach()))
        return sum(values) / len(values)

    for site in program.weights:
        for other in others:
            exact = loss({**plan, site.key: other}) - loss(plan)
            form = abs(exact) + 2 * loss(plan)  # an upper bound of d^T G d / 2, by the square of a sum
            assert abs(estimates[Quantity(site.key, other)] - exact) <= 0.3 * form, (site.key, other)
        known = learned.facts.get(site.key, LossIncrease).by_format
        ordered = [known[width] for width in sorted(known)]
        assert set(known) == {Format(4), *others}
        assert ordered == sorted(ordered, reverse=True)
        assert min(ordered) == 0.0


def test_at_a_plan_the_optimism_of_codes_enters_by_their_own_forms() -> None:
    """Without slope, since the plan is the float network but for the weight: the change grows with the optimism of the
    other format, by the form of its error."""
    program, work = double_program(Mlp), double_context()
    key, other = program.weights[0].key, Format(2)
    moves = {site.key: Moves(FLOAT, (other,) if site.key == key else ()) for site in program.sites}
    known = program.facts.get(key, RoundedWeights)
    found = []
    for factor in (1.0, 3.0):
        learned = program.learn({key: replace(known, optimism=dict.fromkeys(known.codes, factor))})
        fact = run([AtPlan(tuple(moves.items()), probes=24)], learned, unlabelled(work)).facts.get(key, LossIncrease)
        found.append(fact.by_format[other])
    # by the same draws; the slope of the expected loss at the float network is zero but for rounding
    assert found[1] == pytest.approx(3 * found[0], rel=1e-6)


def unlabelled(work: Context) -> Context:
    return replace(work, batches=tuple(replace(batch, target=None) for batch in work.batches))


SCALE = 0.7  # of the squared error among two outputs


def sigmoid_and_score(z: Tensor) -> tuple[Tensor, Tensor]:
    return z[:, :2].sigmoid(), z[:, 2:]


# the end of a network of three outputs, its criterion, and the information of the outputs: the second derivative of
# -log q(t) by the outputs, expected over t ~ q
ENDS: dict[str, tuple[Callable[[Tensor], Any], Criterion, Callable[[Tensor], Tensor]]] = {
    "softmax": (nn.Softmax(1), Categorical(1, "probabilities"), lambda p: (1 / p).diag()),
    "sigmoids": (nn.Sigmoid(), Bernoulli(), lambda p: (1 / (p * (1 - p))).diag() / 3),
    "squares": (nn.Identity(), SquaredError(), lambda z: 2 * torch.eye(3, dtype=z.dtype) / 3),
    "two": (
        sigmoid_and_score,
        Several((Part(0, Bernoulli()), Part(1, SquaredError(), SCALE)), (0, 1)),
        lambda o: torch.cat([1 / (o[:2] * (1 - o[:2])) / 2, o.new_tensor([2 * SCALE])]).diag(),
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_fisher_is_the_gauss_newton_matrix_of_every_criterion(end: str) -> None:
    function, criterion, information = ENDS[end]
    program = double_program(lambda: EndingMlp(function))
    assert_fisher_is_dense(program, replace(unlabelled(double_context()), loss=criterion), information)


@pytest.mark.parametrize("end", ENDS)
def test_the_expected_hessian_of_the_last_layer_is_its_gauss_newton_matrix(end: str) -> None:
    """Without targets, where every criterion is convex in the logits, HAWQ-V2 measures the same as Fisher: the matrix
    is exact in the last layer.  640 probes: within 5 standard errors."""
    function, criterion, information = ENDS[end]
    program = double_program(lambda: EndingMlp(function))
    work = replace(unlabelled(double_context()), loss=criterion)
    fact = run([HawqV2(640, tolerance=0)], program, work).facts.get("head.weight", Sensitivity)
    assert fact.stderr > 0
    assert abs(fact.curvature * 12 - dense_fisher(program, work, "head.weight", information)) <= 5 * fact.stderr * 12


def test_fisher_needs_one_ordinary_backward_per_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    program, work = double_program(Mlp), double_context()
    calls = counted_gradients(monkeypatch)
    run([Fisher(3, tolerance=0)], program, work)
    assert calls == [False] * 3 * len(work.batches)


def test_fisher_draws_from_the_distribution_that_the_user_gives() -> None:
    """Half the squared error is a Gaussian's -log p: the Gauss-Newton matrix is J^T J."""

    def half_squares(output: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (output - target).square().sum(1).mean()

    def gaussian(output: Tensor, random: torch.Generator) -> Tensor:
        return output.detach() + torch.randn(output.shape, generator=random, dtype=output.dtype)

    program = double_program(Mlp)
    work = replace(double_context(), loss=half_squares, draw=gaussian)
    fact = run([Fisher(400, tolerance=0)], program, work).facts.get("head.weight", Sensitivity)
    squares = [tensor_at(program, batch, "tanh_1").square().sum() for batch in work.batches]
    expected = 3 * float(torch.stack(squares).sum()) / work.samples  # J of the last layer is its input, three times
    assert abs(fact.curvature * 12 - expected) <= 5 * fact.stderr * 12


def test_fisher_refuses_a_loss_whose_distribution_it_does_not_know() -> None:
    work = replace(double_context(), loss=lambda output, target: output.square().mean())
    with pytest.raises(LossError, match=r'give draw=.*or use sensitivity="hawq-v2"'):
        run([Fisher(2)], double_program(Mlp), work)


def optimism(program: Program, site: str, width: Format) -> float:
    """How much too small an increase is that is measured on the samples which a weight's codes are fitted to."""
    return program.facts.get(site, RoundedWeights).optimism[width] if program.facts.has(site, RoundedWeights) else 1.0


def second_order_loss(program: Program, work: Context, site: str, width: Format) -> float:
    """g.d + 1/2 d^T H d along the quantizer's error, by autograd's own derivatives along a line."""
    total = 0.0
    for batch in work.batches:

        def along(t: Tensor, batch: Batch = batch) -> Tensor:
            if any(site == activation.key for activation in program.activations):

                def moved(_: str, x: Tensor) -> Tensor:
                    return x + t * (activation_at(program, site, width, x.detach()) - x.detach())

                return F.cross_entropy(program.run(batch.args, {}, moved, at=[site]), batch.target)
            weight = program.tensor(site).detach()
            changed = weight + t * (weight_at(program, site, width) - weight)
            return F.cross_entropy(program.run(batch.args, {}, tensors={site: changed}), batch.target)

        zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(along(zero), zero, create_graph=True)
        (curved,) = torch.autograd.grad(slope, zero)
        total += batch.size / work.samples * float(slope + 0.5 * curved)
    return total


@pytest.mark.parametrize("make", [Mlp, TiedWeights])
def test_taylor_is_the_expansion_along_the_quantization_error(make: Callable[[], nn.Module]) -> None:
    """A loss of which no distribution is known keeps the labels, at which the slope is not zero."""
    program, work = double_program(make), replace(double_context(), loss=F.cross_entropy)
    measured = run([Taylor(100, tolerance=0)], program, work)
    for site in program.sites:
        fact = measured.facts.get(site.key, LossIncrease)
        for width, increase in fact.by_format.items():
            exact = second_order_loss(program, work, site.key, width) * optimism(program, site.key, width)
            # 100 probes, about 50 estimates: 5 standard errors, and float32 scales beside float64 weights
            assert abs(increase - exact) <= 5 * fact.stderr[width] + 1e-6 * abs(exact), (site.key, width)


@pytest.mark.parametrize("labels", [False, True])
def test_measured_is_the_loss_with_one_site_quantized(labels: bool) -> None:
    """By the expected labels of the float network, or by given ones for a loss of which no distribution is known."""
    program, work = double_program(Mlp), double_context()
    if labels:
        work = replace(work, loss=F.cross_entropy)
    fact = run([Measured()], program, work).facts
    for key, width in (("second.weight", Format(3)), ("tanh", Format(4))):
        total = 0.0
        for batch in work.batches:
            x, *_ = batch.args
            names = ("first", "second", "head")
            weights = {name: program.tensor(f"{name}.weight") for name in names}
            if key == "second.weight":
                weights["second"] = weight_at(program, key, width)
            hidden = torch.tanh(F.linear(x.flatten(1), weights["first"], program.tensor("first.bias")))
            before = hidden if key == "second.weight" else activation_at(program, key, width, hidden)
            out = torch.tanh(F.linear(before, weights["second"], program.tensor("second.bias")))
            answer, float_answer = (
                F.linear(out, weights["head"], program.tensor("head.bias")),
                program.run(batch.args, {}),
            )
            target = batch.target if labels else float_answer.softmax(1)
            loss = F.cross_entropy(answer, target) - F.cross_entropy(float_answer, target)
            total += float(loss) * batch.size / work.samples
        found = fact.get(key, LossIncrease)
        expected = total * optimism(program, key, width)
        assert found.by_format[width] == pytest.approx(expected, rel=1e-9)  # the same float64 operations
        assert found.stderr[width] == 0.0


def test_mse_is_the_squared_error_alone() -> None:
    program = double_program(Mlp)
    facts = run([Mse()], program, double_context()).facts
    for site in program.sites:
        assert facts.get(site.key, LossIncrease).by_format == facts.get(site.key, QuantizationError).squared_error


def test_hawq_v1_is_the_top_eigenvalue_of_every_block() -> None:
    program = double_program(Mlp)
    work = replace(double_context(), batches=double_context().batches[:1])
    facts = run([HawqV1(iterations=2000, precision=1e-10)], program, work).facts
    batch = work.batches[0]

    def of_head(weight: Tensor) -> Tensor:
        return F.cross_entropy(program.run(batch.args, {}, tensors={"head.weight": weight}), batch.target)

    def of_shift(shift: Tensor) -> Tensor:
        output = program.run(batch.args, {}, lambda _, value: value + shift, at=["tanh"])
        return F.cross_entropy(output, batch.target)

    dense = torch.autograd.functional.hessian(of_head, program.tensor("head.weight").detach()).reshape(12, 12)
    # the error of a Rayleigh quotient is quadratic in that of the vector
    assert facts.get("head.weight", Sensitivity).curvature == pytest.approx(_largest(dense), rel=1e-6)
    samples = torch.autograd.functional.hessian(of_shift, torch.zeros_like(tensor_at(program, batch, "tanh")))
    blocks = [_largest(samples[k, :, k]) for k in range(batch.size)]
    assert facts.get("tanh", Sensitivity).curvature == pytest.approx(sum(blocks), rel=1e-6)


def _largest(matrix: Tensor) -> float:
    eigenvalues = torch.linalg.eigvalsh(matrix)
    return float(eigenvalues[eigenvalues.abs().argmax()])
