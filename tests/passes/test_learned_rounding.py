"""Learned rounding: closer to float on data that it never saw, never worse where it judges, the same in the file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

import hawqfx
from hawqfx import Compiled, zoo
from hawqfx.errors import HawqfxError
from hawqfx.export.cleanup import site_of
from hawqfx.frontend.capture import capture
from hawqfx.ir.facts import Quantizers, RoundedWeights
from hawqfx.learning.walk import Walk
from hawqfx.maths.formats import Format
from hawqfx.passes.learned_rounding import LearnedRounding
from hawqfx.runtime import ort
from hawqfx.sensitivity import batching
from hawqfx.session.session import Session
from tests.nets import Residual, SharedLayer, build, images
from tests.tools import damaged, quick

FEW = LearnedRounding(steps=8, batch=16, rate=0.05)


def digits(number: int) -> Tensor:
    return zoo.calibration()[number][0][:128]


@pytest.fixture(scope="module")
def trained() -> Session:
    """A trained ResNet-20 whose plans are cheap, and whose codes are compensated: sequential ones of 128 images leave
    little to learn."""
    return hawqfx.compile(
        zoo.resnet20(), "weight_bits=3", [digits(0)], sensitivity="mse", rounding="compensated", bias_correction=False
    ).session


@torch.no_grad()
def divergence(compiled: Compiled, images: Tensor) -> float:
    """The mean Kullback-Leibler divergence of the network from the float network, in nats."""
    p, q = zoo.resnet20()(images).log_softmax(1), compiled.model(images).log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


@pytest.fixture(scope="module")
def learned(trained: Session) -> Compiled:
    return replace(trained, learning=LearnedRounding(steps=20)).uniform(2)


def test_learned_codes_are_closer_to_float_on_other_images(trained: Session, learned: Compiled) -> None:
    before = trained.uniform(2)
    assert divergence(learned, digits(1)) < 0.5 * divergence(before, digits(1))  # measured: .32 times
    assert learned.plan.bits == before.plan.bits
    assert learned.weight_bytes == before.weight_bytes


def test_the_same_seed_gives_the_same_codes(trained: Session) -> None:
    one, other = (replace(trained, learning=FEW).uniform(3) for _ in range(2))
    assert one.plan == other.plan
    for site in one.planned.weights:
        codes = [each.planned.facts.get(site.key, RoundedWeights).codes for each in (one, other)]
        for width in codes[0]:
            assert torch.equal(codes[0][width], codes[1][width])


def test_what_is_learned_badly_is_not_taken(trained: Session) -> None:
    """Rates by which every step overshoots: all blocks keep the codes and scales that they had."""
    before = trained.uniform(4)
    wild = replace(trained, learning=replace(FEW, rate=50.0, scale_rate=5.0)).uniform(4)
    assert wild.plan == before.plan
    for site in before.planned.sites:
        one, other = (each.planned.facts.get(site.key, Quantizers).by_format for each in (before, wild))
        assert one == other


def test_learned_codes_and_biases_are_those_of_the_file(learned: Compiled, tmp_path: Path) -> None:
    """What onnxruntime unpacks is code times scale, bit for bit, and answers are those of the graph."""
    path = tmp_path / "model.onnx"
    learned.export(path)
    model = onnx.load(path)
    calls = [node for node in model.graph.node if node.domain == "hawqfx"]
    for node in calls:
        model.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None))
    images = digits(1)[:8]
    answer, *weights = ort.run(ort.session(model.SerializeToString(), optimize=False), [images.numpy()])
    assert len(weights) == len(learned.planned.weights)
    for node, weight in zip(calls, weights, strict=True):
        key = site_of(node.name)
        codes = learned.planned.facts.get(key, RoundedWeights).codes[Format(2)]
        quantizer = learned.plan.quantizers[key]
        assert quantizer is not None
        scale = torch.tensor(quantizer.scale).reshape(-1, *[1] * (codes.ndim - 1))
        wanted = (codes * scale).reshape(weight.shape)
        assert np.array_equal(weight, wanted.numpy())
    with torch.no_grad():
        graph = learned.model(images)
    # sums in another order may round an activation to the next of 255 codes
    assert float((torch.from_numpy(answer) - graph).abs().max()) <= 0.05 * float(graph.abs().max())


def test_a_fixed_batch_is_learned_batch_by_batch() -> None:
    data = [x for x, _ in images(count=4, batch=8)]
    exported = torch.export.export(build(Residual), (data[0],))
    assert not capture(exported, hawqfx.frontend.data.gather(data)[0]).dynamic_batch
    compiled = hawqfx.compile(exported, "weight_bits=3", data, rounding=FEW, sensitivity="mse")
    assert compiled.model(data[0]).shape == (8, 3)


def test_a_single_sample_judges_and_teaches_nothing() -> None:
    data = [images()[0][0][:1]]
    learned = quick(Residual, "weight_bits=3", data=data, rounding=FEW)
    assert learned.plan == quick(Residual, "weight_bits=3", data=data).plan


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(HawqfxError, match="steps and batch are 1 or more"):
        LearnedRounding(steps=0)
    with pytest.raises(
        HawqfxError, match="rounding='best': must be 'learned', 'sequential', 'compensated' or 'nearest'"
    ):
        quick(Residual, rounding="best")


class Bounded(torch.nn.Module):
    """Rectifiers that end at six, with values far beyond."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 4, 3, padding=1)
        self.head = torch.nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.relu6(20 * self.stem(x))
        return self.head(torch.nn.functional.relu6(20 * self.inner(x)).mean((2, 3)))


def test_rectifiers_with_a_ceiling_keep_it() -> None:
    """However fast scales are learned, the lowered network lets nothing pass that the float network holds back."""
    compiled = quick(Bounded, "weight_bits=3", rounding=replace(FEW, scale_rate=0.5, steps=20))
    for site in compiled.planned.activations:
        if site.ceiling < float("inf"):
            quantizer = compiled.planned.facts.get(site.key, Quantizers).by_format[compiled.planned.formats()[site.key]]
            assert quantizer.scale[0] * quantizer.high <= site.ceiling * (1 + 1e-6)


def test_as_many_samples_as_fit_into_memory(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    sample = 6 * 4 * 4 * 64  # six tensors of 4 x 8 x 8 in float32
    monkeypatch.setattr(batching, "free_memory", lambda device: 2 * 9 * sample)
    quick(Residual, "weight_bits=3", rounding=FEW)
    assert "codes are learned from 9 of 32 samples, which fit into memory" in caplog.text


def test_learned_biases_are_those_of_the_lowered_network_alone() -> None:
    compiled = quick(Residual, "weight_bits=3", rounding=FEW)
    float_biases = {layer.bias: compiled.planned.tensor(layer.bias) for layer in compiled.planned.layers if layer.bias}
    network = build(Residual).state_dict()
    moved = 0
    for layer in compiled.planned.layers:
        assert layer.bias is not None
        assert torch.equal(float_biases[layer.bias], network[layer.bias])
        width = compiled.planned.formats()[layer.weight]
        learned = compiled.planned.facts.get(layer.weight, RoundedWeights).biases.get(width)
        if learned is not None:
            assert torch.equal(compiled.program.tensor(layer.bias), learned)
            moved += not torch.equal(learned, float_biases[layer.bias])
    assert moved > 0


def test_a_bias_that_two_layers_share_is_not_learned() -> None:
    compiled = quick(SharedLayer, "weight_bits=3", rounding=FEW)
    facts = {site.key: compiled.planned.facts.get(site.key, RoundedWeights) for site in compiled.planned.weights}
    assert facts["twice.weight"].biases == {}
    assert any(fact.biases for fact in facts.values())


def test_a_run_that_was_killed_goes_on_after_its_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run learns what is left, and the codes are those of a run in one piece."""
    whole = quick(Residual, "weight_bits=2", rounding=FEW)
    fitted: list[int] = []
    fit = LearnedRounding._fit

    def dying(self: LearnedRounding, walk: Walk, *rest: Any) -> None:
        fitted.append(walk.number)
        if len(fitted) == 2:
            raise KeyboardInterrupt
        fit(self, walk, *rest)

    monkeypatch.setattr(LearnedRounding, "_fit", dying)
    with pytest.raises(KeyboardInterrupt):
        quick(Residual, "weight_bits=2", rounding=FEW, cache=tmp_path)
    again = quick(Residual, "weight_bits=2", rounding=FEW, cache=tmp_path)
    assert fitted[0] not in fitted[1:]
    assert again.plan == whole.plan
    for site in whole.planned.weights:
        one, other = (each.planned.facts.get(site.key, RoundedWeights).codes[Format(2)] for each in (whole, again))
        assert torch.equal(one, other)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "a folder"])
def test_a_damaged_block_is_learned_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """A flipped bit in a tensor is a file that safetensors reads without a complaint."""
    whole = quick(Residual, "weight_bits=2", rounding=FEW, cache=tmp_path)
    (first, *_) = sorted(tmp_path.glob("learned-*/block-*"))
    damaged(first, damage)
    again = quick(Residual, "weight_bits=2", rounding=FEW, cache=tmp_path)
    assert f"{first.name} is damaged" in caplog.text
    assert again.plan == whole.plan
