"""Bias correction: mean errors of what rectifiers let pass are gone from the lowered network, and from its file."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hawqfx
from hawqfx import Compiled, zoo
from hawqfx.errors import PassError
from hawqfx.ir.facts import ChosenFormat, Quantizers, RoundedWeights
from hawqfx.ir.program import Program
from hawqfx.pass_manager.manager import run
from hawqfx.passes.bias_correction import BiasCorrection
from hawqfx.runtime import parity
from hawqfx.session.session import Session
from tests.nets import Depthwise, Plain, Residual, SharedLayer
from tests.tools import after, context, quick

CORRECTED = BiasCorrection()


@pytest.fixture(scope="module")
def trained() -> Session:
    """A trained ResNet-20 whose plans are cheap."""
    data = [zoo.calibration()[0][0][:64]]
    return hawqfx.compile(zoo.resnet20(), "weight_bits=3", data, sensitivity="mse").session


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
def test_mean_errors_are_gone_on_the_data_that_measured_them(make: type[torch.nn.Module]) -> None:
    """In the lowered network, layer by layer, of the values that pass a rectifier before or after the bias moved."""
    before = quick(make, "weight_bits=3")
    compiled = replace(before.session, correction=CORRECTED).lowered(before.planned, "corrected")
    exact, found = (outputs(program, compiled) for program in (compiled.session.measured, compiled.program))
    moved = 0.0
    for layer in compiled.planned.layers:
        axis = exact[layer.node].ndim - 1 if layer.operator == "linear" else 1
        wanted, got = (each[layer.node].transpose(0, axis).flatten(1) for each in (exact, found))
        float_bias = compiled.planned.tensor(layer.bias or "").detach().double()
        raw = got - (bias_of(compiled, layer.weight) - float_bias)[:, None]  # with the bias that it had
        counts = (wanted > 0) | (raw > 0) if rectified(compiled, layer.node) else torch.ones_like(wanted).bool()
        left = ((wanted - got) * counts).sum(1) / counts.sum(1).clamp_min(1)
        was = ((wanted - raw) * counts).sum(1) / counts.sum(1).clamp_min(1)
        scales = [compiled.planned.facts.get(key, Quantizers).by_format for key in (layer.input, layer.weight)]
        formats = compiled.planned.formats()
        step = scales[0][formats[layer.input]].scale[0] * max(scales[1][formats[layer.weight]].scale)
        # half a step of the int32 bias, of this layer and of those before it, and values that it moves to another code
        assert float(left.abs().max()) <= 2 * step + 1e-3 * float(wanted.abs().max())
        moved = max(moved, float(was.abs().max() - left.abs().max()))
    assert moved > 1e-3


def test_it_is_nearer_to_float_on_other_images_and_off_unless_asked_for(trained: Session) -> None:
    """The mean over all values, in place of those that pass, makes this network worse: .013 -> .022 nats."""
    before, after = trained.uniform(3), replace(trained, correction=CORRECTED).uniform(3)
    images = zoo.calibration()[1][0][:128]

    @torch.no_grad()
    def divergence(compiled: Compiled) -> float:
        p, q = zoo.resnet20()(images).log_softmax(1), compiled.model(images).log_softmax(1)
        return float((p.exp() * (p - q)).sum(1).mean())

    assert divergence(after) < 0.85 * divergence(before)
    assert all(not before.planned.facts.get(site.key, RoundedWeights).biases for site in before.planned.weights)
    assert after.plan.bits == before.plan.bits
    assert after.weight_bytes == before.weight_bytes


def test_compile_takes_it_as_an_option() -> None:
    plain, corrected = quick(Plain), quick(Plain, bias_correction=True)
    for layer in plain.planned.layers:
        assert not torch.equal(bias_of(plain, layer.weight), bias_of(corrected, layer.weight))


@pytest.mark.parametrize("make", [Plain, Depthwise])
def test_the_file_has_the_codes_of_the_corrected_graph(make: type[torch.nn.Module], tmp_path: Path) -> None:
    compiled = quick(make, "weight_bits=4", bias_correction=True)
    path = tmp_path / "model.onnx"
    compiled.export(path)
    found = parity.compare(compiled.program, path, compiled.session.context.batches[0])
    assert found.codes > 0
    assert found.flips == 0
    assert found.worst < 1e-6  # float32 sums in another order


def test_biases_of_layers_that_share_a_weight_stay() -> None:
    compiled = quick(SharedLayer, bias_correction=True)
    facts = {site.key: compiled.planned.facts.get(site.key, RoundedWeights) for site in compiled.planned.weights}
    assert facts["twice.weight"].biases == {}
    assert facts["stem.weight"].biases
    assert facts["head.weight"].biases


def test_learned_biases_are_where_it_begins() -> None:
    """A bias that the codes came with is corrected, not the float one: with nothing to correct, it stays."""
    before = quick(Residual, "weight_bits=3")
    once = run([CORRECTED], before.planned, before.session.context)
    twice = run([CORRECTED], once, before.session.context)
    for site in once.weights:
        width = once.formats()[site.key]
        one, two = (each.facts.get(site.key, RoundedWeights).biases[width] for each in (once, twice))
        start = before.planned.tensor(next(x.bias for x in once.layers if x.weight == site.key) or "").detach()
        # values that the first correction brought over the rectifier's edge count in the second
        assert float((two - one).abs().max()) < 0.5 * float((one - start).abs().max())


def test_it_needs_a_plan() -> None:
    program = after("cost", Plain)
    assert not any(program.facts.has(site.key, ChosenFormat) for site in program.sites)
    with pytest.raises(PassError, match="bias_correction needs ChosenFormat"):
        run([CORRECTED], program, context())
