"""A saved network is the same network again, and nothing else is taken for it."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.export import Dim

import hawqfx
from hawqfx.errors import HawqfxError, PlanError
from hawqfx.maths.digest import digest
from hawqfx.passes.learned_rounding import LearnedRounding
from hawqfx.session import saved
from tests.nets import Attention, Depthwise, KeywordInputs, Plain, Residual, build, images
from tests.tools import quick


def bytes_of(compiled: hawqfx.Compiled, path: Path) -> bytes:
    compiled.export(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[hawqfx.Compiled, Path]:
    compiled, path = quick(Plain, "size=10kB"), tmp_path_factory.mktemp("saved") / "net.hawqfx"
    compiled.save(path)
    return compiled, path


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Residual, {"fix": {"inner.weight": 32, "relu": 32}}),
        (Depthwise, {"keep_float": ["head*"], "rounding": "nearest"}),
        (Attention, {"schemes": ("static", "dynamic", "weight-only"), "budget": "weight_memory=30%"}),
        (Plain, {"rounding": LearnedRounding(steps=3), "budget": "size=10kB"}),
    ],
    ids=["float", "kept", "schemes", "learned"],
)
def test_a_saved_network_is_the_same_again(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    compiled = quick(make, options.pop("budget", "weight_bits=31"), **options)
    compiled.save(tmp_path / "net.hawqfx")
    again = hawqfx.load(tmp_path / "net.hawqfx", build(make))
    x = images()[0][0]
    assert torch.equal(again.model(x), compiled.model(x))
    assert again.plan == compiled.plan
    assert again.summary() == compiled.summary()
    assert again.file_bytes == compiled.file_bytes
    assert bytes_of(again, tmp_path / "again.onnx") == bytes_of(compiled, tmp_path / "first.onnx")
    again.save(tmp_path / "again.hawqfx")
    assert (tmp_path / "again.hawqfx").read_bytes() == (tmp_path / "net.hawqfx").read_bytes()
    with pytest.raises(HawqfxError, match="follows a plan"):
        again.at("weight_bits=5")


def test_keyword_inputs_are_kept(tmp_path: Path) -> None:
    data = [{"first": torch.randn(4, 5), "second": torch.randn(4, 6), "labels": torch.tensor([0, 1, 2, 0])}] * 2
    compiled = quick(KeywordInputs, "weight_bits=6", data=data)
    compiled.save(tmp_path / "net.hawqfx")
    again = hawqfx.load(tmp_path / "net.hawqfx", build(KeywordInputs))
    assert bytes_of(again, tmp_path / "again.onnx") == bytes_of(compiled, tmp_path / "first.onnx")


def test_networks_in_16_bits_and_of_any_size_are_loaded_as_they_were_compiled(tmp_path: Path) -> None:
    model, sizes = build(Plain).bfloat16(), ({0: Dim.DYNAMIC, 2: Dim("height", min=8), 3: Dim("width", min=8)},)
    compiled = hawqfx.compile(model, "weight_bits=6", images(), sensitivity="mse", dynamic_shapes=sizes)
    compiled.save(tmp_path / "net.hawqfx")
    again = hawqfx.load(tmp_path / "net.hawqfx", model, sizes)
    assert again.model(torch.ones(3, 1, 16, 12)).shape == (3, 3)
    assert bytes_of(again, tmp_path / "again.onnx") == bytes_of(compiled, tmp_path / "first.onnx")
    with pytest.raises(PlanError, match="another graph of this model"):
        hawqfx.load(tmp_path / "net.hawqfx", model)


def test_a_plan_of_other_weights_is_refused_or_rounded_anew(file: tuple[hawqfx.Compiled, Path]) -> None:
    """Another checkpoint, six times as large: with the old scales its error would be that of clipping."""
    compiled, path = file
    other = build(Plain, seed=1)
    with torch.no_grad():
        other.get_parameter("head.weight").mul_(6)
    with pytest.raises(PlanError, match=r"made for other weights of this network; .* give reround=True"):
        hawqfx.load(path, other)
    with pytest.raises(PlanError, match="made for other weights"):
        hawqfx.compile(other, None, images(), plan=compiled.plan)
    with pytest.raises(PlanError, match="for another model"):
        hawqfx.load(path, build(Residual))
    anew = hawqfx.compile(other, None, images(), plan=path, reround=True)
    assert anew.plan.bits == compiled.plan.bits
    assert "these bits were given, not chosen" in anew.plan.explain()
    x = images()[0][0]
    exact, found = other(x), anew.model(x)
    # 8 bits leave half a percent; the old scales of the head would clip five sixths of it away
    assert (found - exact).norm() < 0.02 * exact.norm()
    with pytest.raises(HawqfxError, match="reround=True takes the bits of a plan"):
        hawqfx.compile(other, "weight_bits=4", images(), reround=True)


def test_a_plan_on_other_data_or_with_another_rounding_is_refused(file: tuple[hawqfx.Compiled, Path]) -> None:
    compiled, path = file
    for plan in (compiled.plan, path):
        with pytest.raises(PlanError, match=r"made with other data.*take hawqfx.load\(\)"):
            hawqfx.compile(build(Plain), None, images(seed=7), plan=plan)
        with pytest.raises(PlanError, match="codes were learned, or rounded in another way"):
            hawqfx.compile(build(Plain), None, images(), plan=plan, rounding="nearest")
        same = hawqfx.compile(build(Plain), None, images(), plan=plan)
        assert torch.equal(same.model(images()[0][0]), compiled.model(images()[0][0]))


def test_plans_of_older_versions_give_their_bits_alone(file: tuple[hawqfx.Compiled, Path], tmp_path: Path) -> None:
    tree = json.loads(file[0].plan.to_json())
    del tree["pins"]
    (tmp_path / "old.json").write_text(json.dumps(tree | {"hawqfx_plan": 3}))
    with pytest.raises(PlanError, match=r"does not say which weights and data it was made with; .* reround=True"):
        hawqfx.compile(build(Plain), None, images(), plan=tmp_path / "old.json")
    anew = hawqfx.compile(build(Plain), None, images(), plan=tmp_path / "old.json", reround=True)
    assert anew.plan.bits == file[0].plan.bits


def test_plans_without_names_are_read_and_call_activations_by_their_keys(file: tuple[hawqfx.Compiled, Path]) -> None:
    plan = file[0].plan
    tree = json.loads(plan.to_json())
    for entry in tree["sites"].values():
        entry.pop("name", None)
    old = hawqfx.Plan.from_json(json.dumps(tree | {"hawqfx_plan": 4}))
    assert old.names == {}
    key, name = next(iter(plan.names.items()))
    assert plan.explain(key).replace(name, key) == old.explain(key)
    anew = hawqfx.compile(build(Plain), None, images(), plan=old)
    assert anew.plan.names == plan.names


def test_a_damaged_file_is_refused(file: tuple[hawqfx.Compiled, Path], tmp_path: Path) -> None:
    """Any byte flipped, any length, and headers that promise more than there is: one clear error, in no time."""
    content, path, chance = file[1].read_bytes(), tmp_path / "bad.hawqfx", random.Random(0)
    bad = [content[: chance.randrange(len(content))] for _ in range(40)]
    for _ in range(120):
        at = chance.randrange(len(content))
        bad.append(content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :])
    bad += [b"", b"{}", content + b"\0", struct.pack("<Q", 1 << 62) + content[8:]]
    huge = json.dumps({"codes/x": {"dtype": "I8", "shape": [1 << 40], "data_offsets": [0, 1 << 40]}}).encode()
    bad.append(struct.pack("<Q", len(huge)) + huge + bytes(8))
    for part in bad:
        path.write_bytes(part)
        with pytest.raises(PlanError, match=r"bad\.hawqfx"):
            saved.read(path)
    with pytest.raises(PlanError, match="cannot be read"):
        saved.read(tmp_path / "missing")
    path.write_bytes(b"\x08\xd0")  # as an ONNX file begins
    with pytest.raises(PlanError, match=r"bad\.hawqfx cannot be read: it is neither JSON nor a file of Compiled\.save"):
        saved.read_plan(path)


def test_a_file_that_was_made_to_deceive_is_refused(file: tuple[hawqfx.Compiled, Path], tmp_path: Path) -> None:
    """With a right checksum: codes out of range, numbers that are huge, names that are paths."""
    whole, tensors = saved._parts(file[1])
    content = saved.read(file[1])

    def written(change: Any) -> Path:
        tree, parts = json.loads(whole[saved.DIGITS :]), {name: tensor.clone() for name, tensor in tensors.items()}
        change(tree, parts)
        text = json.dumps(tree)
        save_file(parts, tmp_path / "evil", {saved.KEY: digest(text, sorted(parts.items())) + text})
        return tmp_path / "evil"

    def moved(tree: Any, _: Any) -> None:
        tree["plan"]["sites"] = {f"../../{key}": entry for key, entry in tree["plan"]["sites"].items()}

    def loud(_: Any, parts: Any) -> None:
        parts["codes/head.weight"].fill_(127)

    def other(_: Any, parts: Any) -> None:
        parts["codes/head.weight"] = parts["codes/head.weight"][:1].clone()

    def endless(tree: Any, _: Any) -> None:
        tree["plan"]["sites"]["head.weight"]["bits"] = 10**400

    def later(tree: Any, _: Any) -> None:
        tree["format"] = 99

    def elsewhere(tree: Any, _: Any) -> None:
        tree["network"] = "0" * 64

    assert hawqfx.load(written(lambda *_: None), build(Plain)).plan == content.plan
    for change in (moved, loud, other, endless, later, elsewhere):
        with pytest.raises(PlanError):
            hawqfx.load(written(change), build(Plain))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil"]
