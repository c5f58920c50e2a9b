"""Codes that are made anew from quantized inputs: nearer to float on other data, and the same wherever they go."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hawqfx
from hawqfx import Compiled, zoo
from hawqfx.errors import PassError
from hawqfx.ir.facts import Quantizers, RoundedWeights
from hawqfx.learning import sequential
from hawqfx.pass_manager.manager import run
from hawqfx.passes.bias_correction import BiasCorrection
from hawqfx.passes.rounding import Rounding
from hawqfx.passes.sequential_rounding import SequentialRounding
from hawqfx.session.session import Session
from tests.nets import Attention, Depthwise, Mlp, Plain, Residual, SharedLayer, TinyRange, images
from tests.tools import after, assert_file_has_the_codes, context, quick


@pytest.fixture(scope="module")
def trained() -> Session:
    """A trained ResNet-20 whose plans are cheap."""
    data = [zoo.calibration()[0][0][:64]]
    return hawqfx.compile(zoo.resnet20(), "weight_bits=3", data, sensitivity="mse").session


def codes_of(compiled: Compiled) -> dict[str, torch.Tensor]:
    formats = compiled.planned.formats()
    known = {site.key: compiled.planned.facts.get(site.key, RoundedWeights) for site in compiled.planned.weights}
    return {key: each.codes[formats[key]] for key, each in known.items()}


def scales_of(compiled: Compiled) -> dict[str, tuple[float, ...]]:
    formats = compiled.planned.formats()
    known = {site.key: compiled.planned.facts.get(site.key, Quantizers) for site in compiled.planned.weights}
    return {key: each.by_format[formats[key]].scale for key, each in known.items()}


@pytest.mark.parametrize("bits", [3, 2])
def test_it_is_nearer_to_float_on_other_images(trained: Session, bits: int) -> None:
    """With 64 images; compensated codes with corrected biases lose three times as much or more."""
    sequential = trained.uniform(bits)
    compensated = replace(trained, finish=(BiasCorrection(),)).uniform(bits)
    held_out = zoo.calibration()[1][0][:128]

    @torch.no_grad()
    def divergence(compiled: Compiled) -> float:
        p, q = zoo.resnet20()(held_out).log_softmax(1), compiled.model(held_out).log_softmax(1)
        return float((p.exp() * (p - q)).sum(1).mean())

    assert divergence(sequential) < 0.6 * divergence(compensated)
    assert sequential.plan.bits == compensated.plan.bits
    assert sequential.weight_bytes == compensated.weight_bytes


def test_every_part_of_it_gains(trained: Session) -> None:
    """Codes with the biases left alone, with the scales left alone, and with both."""
    held_out = zoo.calibration()[1][0][:128]
    found = []
    for step in (
        SequentialRounding(biases=False, scales=False),
        SequentialRounding(scales=False),
        SequentialRounding(),
    ):
        compiled = replace(trained, finish=(step,)).uniform(2)
        with torch.no_grad():
            p, q = zoo.resnet20()(held_out).log_softmax(1), compiled.model(held_out).log_softmax(1)
        found.append(float((p.exp() * (p - q)).sum(1).mean()))
    assert found[0] > found[1] > found[2]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["sequential_rounding"]),
        ({"rounding": "sequential"}, ["sequential_rounding"]),
        ({"rounding": Rounding(block=1024)}, ["sequential_rounding"]),
        ({"rounding": "compensated"}, ["bias_correction"]),
        ({"rounding": "nearest"}, []),
        ({"bias_correction": False}, ["sequential_rounding"]),
    ],
)
def test_where_it_runs(options: dict[str, Any], expected: list[str]) -> None:
    steps = [step.name for step in quick(Plain, **options).planned.history]
    assert [name for name in steps if name in ("sequential_rounding", "bias_correction")] == expected


def test_biases_stay_where_they_are_told_to() -> None:
    compiled = quick(Plain, bias_correction=False)
    facts = [compiled.planned.facts.get(site.key, RoundedWeights) for site in compiled.planned.weights]
    assert not any(each.biases for each in facts)


@pytest.mark.parametrize("make", [Plain, Depthwise, Residual, Attention, Mlp])
def test_a_plan_that_is_followed_has_the_same_codes_and_scales(make: type[torch.nn.Module]) -> None:
    compiled = quick(make, "weight_bits=3.5")
    again = quick(make, None, plan=compiled.plan)
    assert scales_of(again) == scales_of(compiled)
    codes = codes_of(again)
    assert all(torch.equal(codes[key], each) for key, each in codes_of(compiled).items())
    assert again.plan.pins == compiled.plan.pins


@pytest.mark.parametrize("make", [Plain, Depthwise, Residual, Attention])
def test_the_file_has_these_codes(make: type[torch.nn.Module], tmp_path: Path) -> None:
    compiled = quick(make, "weight_bits=3")
    assert_file_has_the_codes(compiled, tmp_path)


def test_weights_of_several_readers_and_in_blocks_of_columns_keep_their_codes() -> None:
    for make, options, kept in (
        (SharedLayer, {}, {"twice.weight"}),
        (Plain, {"rounding": Rounding(block=16)}, {"conv2.weight"}),  # of 36 columns; the others have 9 and 6
    ):
        before = quick(make, "weight_bits=3", **options)
        plain = replace(before.session, finish=()).uniform(3)
        anew = before.session.uniform(3)
        one, two = codes_of(plain), codes_of(anew)
        assert all(torch.equal(one[key], two[key]) for key in kept)
        assert any(not torch.equal(one[key], two[key]) for key in one.keys() - kept)


def test_weights_of_very_many_columns_keep_their_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequential, "MOST_COLUMNS", 9)
    compiled = quick(Plain, "weight_bits=3")
    how = {site.key: compiled.planned.facts.get(site.key, RoundedWeights) for site in compiled.planned.weights}
    anew = {key for key, each in how.items() if each.compensation is not None and each.compensation.sequential}
    assert anew == {"conv1.weight", "head.weight"}  # of 9 and 6 columns; conv2 has 36


@pytest.mark.parametrize(("make", "bits"), [(Mlp, 4), (TinyRange, 2)])
def test_scales_of_blocks_are_numbers_of_the_file(make: type[torch.nn.Module], bits: int) -> None:
    """Also those of rows that are one block: a file has scales of bfloat16."""
    compiled = quick(make, f"weight_bits={bits}", schemes=("weight-only",))
    plain = replace(compiled.session, finish=(SequentialRounding(scales=False),)).lowered(
        compiled.session.planner.given(compiled.planned.formats()), compiled.budget
    )
    before, after = scales_of(plain), scales_of(compiled)
    assert before.keys() == after.keys()
    assert before != after
    for each in after.values():
        assert torch.equal(torch.tensor(each).bfloat16().float(), torch.tensor(each))


def test_a_single_sample_is_enough() -> None:
    compiled = quick(Plain, "weight_bits=3", data=[images(1, 1)[0]])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in compiled.program.constants().values())


def test_it_needs_a_plan() -> None:
    with pytest.raises(PassError, match="sequential_rounding needs ChosenFormat"):
        run([SequentialRounding()], after("cost", Plain), context())
