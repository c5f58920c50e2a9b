"""Bias correction: mean errors of what rectifiers let pass are less in the lowered network, and in its file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hawqfx
from hawqfx import Compiled, zoo
from hawqfx.errors import PassError
from hawqfx.ir.facts import ChosenFormat, Quantizers, RoundedWeights
from hawqfx.ir.program import Program
from hawqfx.learning.mean_error import shrunk_mean
from hawqfx.pass_manager.manager import run
from hawqfx.passes.bias_correction import BiasCorrection
from hawqfx.session.session import Session
from tests.nets import Depthwise, Plain, Residual, SharedLayer
from tests.tools import after, assert_file_has_the_codes, context, quick

CORRECTED = BiasCorrection()


@pytest.fixture(scope="module")
def trained() -> Session:
    """A trained ResNet-20 whose plans are cheap."""
    data = [zoo.calibration()[0][0][:64]]
    return hawqfx.compile(zoo.resnet20(), "weight_bits=3", data, sensitivity="mse", rounding="compensated").session


def outputs(program: Program, compiled: Compiled) -> dict[str, Tensor]:
    """What every layer makes of the calibration data, in float64."""
    names = [layer.node for layer in compiled.planned.layers]
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def look(name: str, value: Tensor) -> Tensor:
        seen[name].append(value.double())
        return value

    with torch.no_grad():
        for batch in compiled.session.context.batches:
            program.run(batch.args, batch.kwargs, look, at=names)
    return {name: torch.cat(values) for name, values in seen.items()}


def bias_of(compiled: Compiled, weight: str) -> Tensor:
    """The bias of a weight's layer in the lowered network."""
    layer = next(layer for layer in compiled.planned.layers if layer.weight == weight)
    assert layer.bias is not None
    return compiled.program.tensor(layer.bias).detach().double()


def rectified(compiled: Compiled, node: str) -> bool:
    found = next(each for each in compiled.planned.graph.graph.nodes if each.name == node)
    return all("relu" in str(user.target) for user in found.users)


@pytest.mark.parametrize("make", [Plain, Depthwise, Residual])
def test_biases_move_by_mean_errors_less_their_noise(make: type[torch.nn.Module]) -> None:
    """In the lowered network, layer by layer, by what passes a rectifier before or after the bias moved."""
    compiled = quick(make, "weight_bits=8", rounding="compensated").uniform(2)
    exact, found = (outputs(program, compiled) for program in (compiled.session.measured, compiled.program))
    moved = 0
    for layer in compiled.planned.layers:
        start = compiled.planned.tensor(layer.bias or "").detach().double()
        shift = bias_of(compiled, layer.weight) - start
        width = compiled.planned.formats()[layer.weight]
        if not rectified(compiled, layer.node):
            assert width not in compiled.planned.facts.get(layer.weight, RoundedWeights).biases
            continue
        axis = exact[layer.node].ndim - 1 if layer.operator == "linear" else 1
        wanted, got = (each[layer.node].movedim(axis, 1).flatten(2) for each in (exact, found))
        raw = got - shift[:, None]  # with the bias that it had
        counts = ((wanted > 0) | (raw > 0)).double()
        mean = ((wanted - raw) * counts).sum((0, 2)) / counts.sum((0, 2)).clamp_min(1)
        # leaving out each sample in turn, whose values hang together: the jackknife's error of a ratio
        every = [torch.arange(len(wanted)) != left for left in range(len(wanted))]
        others = torch.stack(
            [((wanted - raw) * counts)[kept].sum((0, 2)) / counts[kept].sum((0, 2)).clamp_min(1) for kept in every]
        )
        noise = (len(every) - 1) * (others - others.mean(0)).square().mean(0)
        shrunk = mean * (1 - noise / mean.square().clamp_min(1e-30)).clamp_min(0)
        scales = [compiled.planned.facts.get(key, Quantizers).by_format for key in (layer.input, layer.weight)]
        formats = compiled.planned.formats()
        step = scales[0][formats[layer.input]].scale[0] * max(map(abs, scales[1][width].scale))
        # half a step of the int32 bias, of this layer and of those before it, and values that it moves to another code;
        # the jackknife's error is the linear one to first order in 1/n
        assert float((shift - shrunk).abs().max()) <= 2 * step + 1e-3 * float(wanted.abs().max())
        assert bool((shift.abs() <= mean.abs() + step).all())
        moved += int((shift.abs() > step).sum())
    assert moved > 0


def test_a_mean_is_shrunk_by_the_noise_in_it() -> None:
    """Of n normal values with variance one: far better where there is nothing but noise, and at worst, where the mean
    is twice its error, half worse than the mean as it is, whose squared error is 1/n."""
    random = torch.Generator().manual_seed(0)
    n, channels = 16, 20_000
    for size, most in (
        (0.0, 0.45),
        (0.25, 0.95),
        (0.5, 1.55),
        (3.0, 1.1),
    ):  # the mean, and squared errors in units of 1/n
        values = size + torch.randn(n, channels, dtype=torch.float64, generator=random)
        found = shrunk_mean(values, torch.ones(n, channels, dtype=torch.float64))
        # the mean of 20,000 squares has an error of about 1%
        assert float((found - size).square().mean()) * n < most


def test_one_sample_has_no_noise_to_tell() -> None:
    totals, counts = torch.tensor([[6.0, 0.0]]).double(), torch.tensor([[3.0, 0.0]]).double()
    assert shrunk_mean(totals, counts).tolist() == [2.0, 0.0]


def test_it_is_nearer_to_float_on_other_images(trained: Session) -> None:
    """The mean over all values, in place of those that pass, makes this network worse: .013 -> .022 nats."""
    before, after = replace(trained, finish=()).uniform(3), trained.uniform(3)
    images = zoo.calibration()[1][0][:128]

    @torch.no_grad()
    def divergence(compiled: Compiled) -> float:
        p, q = zoo.resnet20()(images).log_softmax(1), compiled.model(images).log_softmax(1)
        return float((p.exp() * (p - q)).sum(1).mean())

    assert divergence(after) < 0.85 * divergence(before)
    assert all(not before.planned.facts.get(site.key, RoundedWeights).biases for site in before.planned.weights)
    assert after.plan.bits == before.plan.bits
    assert after.weight_bytes == before.weight_bytes


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"rounding": "compensated"}, True),
        ({"bias_correction": False}, False),
        ({"rounding": "nearest"}, False),  # the paper's recipe
        ({"rounding": "nearest", "bias_correction": True}, True),
    ],
)
def test_it_is_on_but_in_the_papers_recipe(options: dict[str, Any], expected: bool) -> None:
    compiled = quick(Plain, **options)
    layer = next(layer for layer in compiled.planned.layers if rectified(compiled, layer.node))
    assert layer.bias is not None
    start = compiled.planned.tensor(layer.bias).detach().double()
    assert torch.equal(bias_of(compiled, layer.weight), start) is not expected


def test_plans_are_compared_as_they_are_returned(trained: Session) -> None:
    """Uniform bits beside a plan, and a plan that is lowered again, are corrected once and no more."""
    compiled = trained.at("weight_bits=3")
    again = trained.lowered(compiled.planned, compiled.budget)
    assert [step.name for step in again.planned.history].count("bias_correction") == 1
    for site in compiled.planned.weights:
        one, two = (each.planned.facts.get(site.key, RoundedWeights).biases for each in (compiled, again))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[width], two[width]) for width in one)


@pytest.mark.parametrize("make", [Plain, Depthwise])
def test_the_file_has_the_codes_of_the_corrected_graph(make: type[torch.nn.Module], tmp_path: Path) -> None:
    compiled = quick(make, "weight_bits=4", rounding="compensated", bias_correction=True)
    assert_file_has_the_codes(compiled, tmp_path)


def test_biases_of_layers_that_share_a_weight_or_meet_no_rectifier_stay() -> None:
    compiled = quick(SharedLayer, rounding="compensated", bias_correction=True)
    facts = {site.key: compiled.planned.facts.get(site.key, RoundedWeights) for site in compiled.planned.weights}
    assert facts["twice.weight"].biases == {}
    assert facts["head.weight"].biases == {}
    assert facts["stem.weight"].biases


def test_learned_biases_are_where_it_begins() -> None:
    """A bias that the codes came with is corrected, not the float one: with nothing to correct, it stays."""
    before = quick(Residual, "weight_bits=3", rounding="compensated", bias_correction=False)
    once = run([CORRECTED], before.planned, before.session.context)
    twice = run([CORRECTED], once, before.session.context)
    moved = 0
    for layer in once.layers:
        if not rectified(before, layer.node):
            continue
        width = once.formats()[layer.weight]
        one, two = (each.facts.get(layer.weight, RoundedWeights).biases[width] for each in (once, twice))
        start = before.planned.tensor(layer.bias or "").detach()
        # values that the first correction brought over the rectifier's edge count in the second, and it shrinks anew
        assert float((two - one).abs().max()) < 0.5 * float((one - start).abs().max())
        moved += 1
    assert moved


def test_it_needs_a_plan() -> None:
    program = after("cost", Plain)
    assert not any(program.facts.has(site.key, ChosenFormat) for site in program.sites)
    with pytest.raises(PassError, match="bias_correction needs ChosenFormat"):
        run([CORRECTED], program, context())
