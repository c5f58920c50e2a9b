"""A size bounds the file: what a plan promises and what is written, on every kind of tiny network."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import hawqfx
from hawqfx.errors import ExportError, InfeasibleBudget
from hawqfx.ir.facts import Account
from tests.nets import IMAGES, Plain, Residual, build, images
from tests.tools import quick

NETS = sorted({*IMAGES} - {"shared_layer", "in_place", "concat_input"})
SLACK = 0.01  # of the promise: lengths are counted as those of the widest weights, a few bytes for each site


def written(compiled: hawqfx.Compiled, folder: Path, packing: Any = "portable") -> int:
    compiled.export(folder / "model.onnx", packing)
    return (folder / "model.onnx").stat().st_size


@pytest.mark.parametrize("name", NETS)
def test_the_file_keeps_the_budget_and_the_promise(tmp_path: Path, name: str) -> None:
    session = quick(IMAGES[name], "size=1MB").session
    least, *amounts = session.planner.range_of(session.allocation, "size", 4)
    for amount in amounts:
        compiled = session.at(f"size={int(amount) + 1}")
        promised, size = compiled.file_bytes, written(compiled, tmp_path)
        assert promised is not None
        assert (1 - SLACK) * promised <= size <= promised <= int(amount) + 1
    with pytest.raises(InfeasibleBudget, match=r"size=\S+ cannot be met: the least is"):
        session.at(f"size={least - 1:.0f}")


@pytest.mark.parametrize("name", NETS)
def test_uniform_files_grow_with_the_bits(tmp_path: Path, name: str) -> None:
    compiled = quick(IMAGES[name], "size=1MB")
    models = [compiled.uniform(bits) for bits in range(2, 9)]
    sizes = [written(model, tmp_path) for model in models]
    assert all(narrow < wide for narrow, wide in itertools.pairwise(sizes))
    assert all(
        (1 - SLACK) * (model.file_bytes or 0) <= size <= (model.file_bytes or 0)
        for model, size in zip(models, sizes, strict=True)
    )


def test_a_resnet_8_of_3_bits_is_smaller_than_one_of_4(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(inputs, outputs, 3, 1, 1), nn.Conv2d(outputs, outputs, 3, 1, 1)
            self.shortcut = nn.Conv2d(inputs, outputs, 1)

        def forward(self, x: Any) -> Any:
            return (self.shortcut(x) + self.second(self.first(x).relu())).relu()

    class ResNet8(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(1, 16, 3, 1, 1), nn.Linear(64, 3)
            self.blocks = nn.Sequential(Block(16, 16), Block(16, 32), Block(32, 64))

        def forward(self, x: Any) -> Any:
            return self.head(self.blocks(self.stem(x).relu()).mean((2, 3)))

    compiled = hawqfx.compile(build(ResNet8), "weight_bits=4", images(), sensitivity="mse", rounding="nearest")
    mixed, three, four = compiled.at("weight_bits=3"), compiled.uniform(3), compiled.uniform(4)
    sizes = [written(model, tmp_path) for model in (mixed, three, four)]
    assert max(sizes[:2]) < sizes[2]


def test_a_percentage_is_of_the_float_file(tmp_path: Path) -> None:
    compiled = quick(Residual, "size=300%")
    compiled.export_float(tmp_path / "float.onnx")
    use = compiled.planned.about(Account).limits["size"]
    assert use.reference == (tmp_path / "float.onnx").stat().st_size
    assert use.bound == 3 * use.reference
    text = " ".join(compiled.summary().split())
    assert f"file {compiled.file_bytes:,} bytes of {use.bound:,.0f} allowed" in text
    assert f"of the float32 file's {use.reference:,}" in text


def test_plans_of_other_formats_are_weighed(tmp_path: Path) -> None:
    """Narrow activations take a clip each, and weights in float no unpacking: the promise is the file's own size."""
    compiled = quick(Residual, "size=1MB", fix={"relu*": 4})
    assert written(compiled, tmp_path) == compiled.file_bytes
    bound = (compiled.file_bytes or 0) - 40
    tight = compiled.at(f"size={bound}", fix={"relu*": 4})
    assert written(tight, tmp_path) <= (tight.file_bytes or 0) <= bound
    assert tight.budget == str(hawqfx.Budget.parse(f"size={bound}"))
    floats = quick(Plain, "size=1MB", weight_bits=(4, 32))
    assert written(floats, tmp_path) == floats.file_bytes


def test_the_least_that_a_refusal_names_is_that_of_a_file_and_can_be_met(tmp_path: Path) -> None:
    session = quick(Residual, "size=1MB").session
    predicted, _ = session.planner.range_of(session.allocation, "size", 2)
    for budget in ("size=1%", f"size={predicted:.0f}"):  # refused at once, and when its file was weighed
        with pytest.raises(InfeasibleBudget, match=r"the least is \d+ bytes, [\d.]+% of float32$") as caught:
            session.at(budget, fix={"relu*": 4})
        least = caught.value.least
        assert least > predicted
        tight = session.at(f"size={least:.0f}", fix={"relu*": 4})
        assert written(tight, tmp_path) == tight.file_bytes == least


def test_a_native_file_promises_nothing_of_its_size(tmp_path: Path) -> None:
    compiled = quick(Plain, "size=1MB")
    least = compiled.session.planner.range_of(compiled.session.allocation, "size", 2)[0]
    assert written(compiled.at(f"size={least:.0f}"), tmp_path, "native") > 0


def test_a_plan_of_another_network_may_not_break_its_budget(tmp_path: Path) -> None:
    """A plan that is followed keeps its account, and its file is held to it."""
    compiled = quick(Plain, "size=1MB")
    text = compiled.plan.to_json().replace(f'"bound": {10**6}.0', '"bound": 1000.0')
    (tmp_path / "plan.json").write_text(text)
    followed = hawqfx.compile(build(Plain), None, images(), plan=tmp_path / "plan.json")
    with pytest.raises(ExportError, match=r"would have [\d,]+ bytes, and the plan's budget allows 1,000"):
        followed.export(tmp_path / "model.onnx")


def test_nothing_is_exported_without_a_limit_on_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("weighed")

    monkeypatch.setattr("hawqfx.pipeline.weighing", forbidden)
    assert quick(Plain, "weight_bits=4").file_bytes is None
