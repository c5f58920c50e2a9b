"""sensitivity: mean traces against the dense float64 Hessian, for weights and for activations, from shared probes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hawqfx.capture import capture
from hawqfx.errors import LossError
from hawqfx.facts import Sensitivity as Fact
from hawqfx.passes.find_sites import FindSites
from hawqfx.passes.sensitivity import Sensitivity
from hawqfx.program import ActivationSite, Program
from hawqfx.runner import run
from hawqfx.study import Batch, Study, cross_entropy
from tests.nets import Attention, Mlp, Plain, SharedLayer, TiedWeights, build, images
from tests.tools import after, study, tensor_at


def double_study() -> Study:
    return study([(x.double(), y) for x, y in images(count=2, batch=6)])


def double_program(make: type[nn.Module]) -> Program:
    program = capture(build(make).double(), double_study().batches[0])
    return run([FindSites()], program, double_study())


def dense_trace(program: Program, work: Study, site: str) -> float:
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


@pytest.mark.parametrize("make", [Mlp, TiedWeights])
def test_converges_to_the_dense_traces_at_the_rate_of_hutchinson(make: type[nn.Module]) -> None:
    """Every site at once, from shared probes: within 5 standard errors (22 estimates: chance of one outside, 1e-5),
    and a 16 times larger number of probes gives a 4 times smaller standard error."""
    program, work = double_program(make), double_study()
    few = run([Sensitivity(probes=40)], program, work)
    many = run([Sensitivity(probes=640)], program, work)
    for site in program.sites:
        exact = dense_trace(program, work, site.key) / site.numel
        for measured in (few, many):
            fact = measured.facts.get(site.key, Fact)
            assert abs(fact.mean_trace - exact) <= 5 * fact.stderr, site.key
        # the standard deviation of 40 samples is itself known to about 11%, and heavy tails double that: 4 +- 40%
        assert 2.4 < few.facts.get(site.key, Fact).stderr / many.facts.get(site.key, Fact).stderr < 5.6, site.key


def test_the_error_itself_falls_like_one_over_the_root_of_probes() -> None:
    """rms of (estimate - dense) / over 8 seeds and all sites, at 8 and at 128 probes: ratio 4.  With 8 x 7 errors per
    rms, each rms is known to about 1/sqrt(2 * 56) = 9%, more with ties between sites; 4 +- 45%."""
    program, work = double_program(Mlp), double_study()
    exact = {site.key: dense_trace(program, work, site.key) / site.numel for site in program.sites}

    def rms(probes: int) -> float:
        errors = []
        for seed in range(8):
            measured = run([Sensitivity(probes)], program, replace(work, seed=seed))
            scale = {key: abs(value) for key, value in exact.items()}
            errors += [(measured.facts.get(key, Fact).mean_trace - exact[key]) / scale[key] for key in exact]
        return float(torch.tensor(errors).square().mean().sqrt())

    assert 2.2 < rms(8) / rms(128) < 5.8


def test_one_backward_per_probe_serves_every_site(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs.get("create_graph", False))
        return original(*args, **kwargs)

    program, work = double_program(Mlp), double_study()
    monkeypatch.setattr(torch.autograd, "grad", counted)
    run([Sensitivity(probes=3)], program, work)
    assert calls == [True, False, False, False] * len(work.batches)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others() -> None:
    program = double_program(Mlp)

    def traces(seed: int) -> list[float]:
        measured = run([Sensitivity(4)], program, replace(double_study(), seed=seed))
        return [measured.facts.get(site.key, Fact).mean_trace for site in program.sites]

    assert traces(0) == traces(0)
    assert traces(0) != traces(1)


def test_batchnorm_is_in_eval_mode_so_that_samples_are_independent() -> None:
    """Traces over two batches of one size are the mean of those over each."""
    program, data = after("find_sites", Plain), images(count=2, batch=8)

    def exact(batches: list[tuple[Tensor, Tensor]]) -> float:
        return dense_trace(program, study(batches), "head.weight")

    joined = [(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))]
    assert exact(joined) == pytest.approx(exact(data), rel=1e-4)  # float32 Hessian entries


def test_attention_is_measured_by_its_mathematical_kernel() -> None:
    measured = after("sensitivity", Attention)
    assert all(measured.facts.get(site.key, Fact).mean_trace != 0 for site in measured.weights)


def test_labels_are_sampled_where_none_are_given() -> None:
    """With labels from the model's own distribution the expected Hessian of the head is the Fisher block, p(1-p) x^2:
    positive, and the same for the same seed."""
    program = double_program(Mlp)
    unlabelled = study([x.double() for x, _ in images(count=2, batch=6)])
    measured = run([Sensitivity(64)], program, unlabelled)
    batch = unlabelled.batches
    total = 0.0
    for one in batch:
        inputs = tensor_at(program, one, "tanh_1")
        p = program.run(one.args, {}).detach().softmax(1)
        total += float((p * (1 - p)).sum(1) @ inputs.square().sum(1)) / unlabelled.samples
    fact = measured.facts.get("head.weight", Fact)
    # the loss is convex in the last layer and its Hessian there does not depend on the labels at all
    assert abs(fact.mean_trace - total / 12) <= 5 * fact.stderr


def test_a_loss_that_ignores_a_site_gives_it_zero_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    program = double_program(Mlp)
    zero = run([Sensitivity(2)], program, replace(double_study(), loss=lambda output, target: 0 * output.sum()))
    assert all(zero.facts.get(site.key, Fact).mean_trace == 0 for site in program.sites)
    assert "no curvature at 'first.weight'" in caplog.text


def test_a_loss_that_is_no_scalar_or_not_finite_is_refused() -> None:
    program = double_program(Mlp)
    with pytest.raises(LossError, match="must be a scalar"):
        run([Sensitivity(2)], program, replace(double_study(), loss=lambda output, target: output))
    with pytest.raises(LossError, match="loss of batch 0 is nan"):
        run([Sensitivity(2)], program, replace(double_study(), loss=lambda o, t: cross_entropy(o, t) * float("nan")))


def test_a_gradient_that_is_not_finite_names_the_site() -> None:
    def infinite(output: Tensor, target: Tensor) -> Tensor:
        return (output - output.detach()).abs().sqrt().sum()  # slope 1/sqrt(0)

    with pytest.raises(LossError, match=r"gradient at 'first\.weight' is not finite on batch 0"):
        run([Sensitivity(2)], double_program(Mlp), replace(double_study(), loss=infinite))


def test_a_shared_layer_has_one_trace_over_all_its_uses() -> None:
    program = after("find_sites", SharedLayer)
    work = study()
    fact = run([Sensitivity(256)], program, work).facts.get("twice.weight", Fact)
    exact = dense_trace(program, work, "twice.weight") / 144
    assert abs(fact.mean_trace - exact) <= 5 * fact.stderr
    assert isinstance(program.activations[0], ActivationSite)
