"""A compiled network: the reason for every bit, sites in float, what users see of it and what they call its sites."""

import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import hawqfx
from hawqfx import Budget, Plan
from hawqfx.errors import UsageError
from hawqfx.pass_manager.manager import run
from hawqfx.passes.allocation import Allocation
from hawqfx.runtime import ort, parity
from tests.nets import Plain, Residual, build, images
from tests.tools import quick


def test_a_plan_explains_itself_also_from_json() -> None:
    budget = "size=3100, bops=3%"
    compiled = quick(Residual, budget)
    session = compiled.session
    found = Plan.of(run([Allocation(Budget.parse(budget))], session.measured, session.context), budget)
    plan = Plan.from_json(found.to_json())
    assert plan == found
    text = plan.explain("stem.weight")
    assert re.search(r"stem\.weight: \d bits, predicted loss increase", text)
    assert re.search(r"takes [\d.]+% of the predicted loss, [\d.]+% of size, [\d.]+% of bops", text)
    assert re.search(r"\d bits instead: [+-][\d.e-]+ loss, [+-][\d,]+ bytes size, [+-][\d,]+ bit operations bops", text)
    assert re.search(
        r"size: [\d,]+ bytes of [\d,]+ bytes; (binds: one kB more would save|does not bind)", plan.explain()
    )
    assert "proven to be the least" in plan.explain()
    assert plan.explain("*.weight").count("predicted loss increase") == 3
    with pytest.raises(UsageError, match="the plan has no site 'nothing'"):
        plan.explain("nothing")
    assert compiled.plan.explain().splitlines()[0] in compiled.summary()


def test_sites_in_float_are_lowered_saved_and_exported(tmp_path: Path) -> None:
    compiled = quick(Residual, "bops=100%", fix={"inner.weight": 32, "relu": 32})
    assert {key for key, bits in compiled.plan.bits.items() if bits == 32} == {"inner.weight", "relu"}
    compiled.plan.write(tmp_path / "plan.json")
    again = hawqfx.compile(build(Residual), None, images(), plan=tmp_path / "plan.json")
    batch = images()[0][0]
    assert torch.equal(compiled.model(batch), again.model(batch))
    compiled.export(tmp_path / "model.onnx")
    found = parity.compare(compiled.program, tmp_path / "model.onnx", compiled.session.context.batches[0])
    assert found.flips <= found.codes // 1000  # only ties flip
    assert found.worst < 1e-5  # float32 sums in another order
    output = ort.run(ort.session(tmp_path / "model.onnx"), [batch.numpy()])[0]
    assert output.shape == (len(batch), 3)


def test_what_users_hold_shows_itself_in_a_line_and_in_a_notebook() -> None:
    compiled = quick(Plain, "weight_bits=5")
    frontier = compiled.session.frontier(3, "weight_bits", evaluate=1)
    assert repr(frontier).startswith("<Frontier of 3 plans: weight_bits=2 to weight_bits=8")
    assert repr(compiled).startswith("<Compiled weight_bits=5: 3 weights, 4 activations, ")
    assert repr(compiled.plan) == f"<Plan weight_bits=5: 7 sites, {compiled.plan.digest}>"
    for shown in (frontier, compiled, compiled.plan):
        assert "\n" not in repr(shown)
        assert shown._repr_html_().startswith("<table>")
    assert frontier._repr_html_().count("<tr>") == 4


def test_activations_are_named_by_the_module_that_makes_them() -> None:
    compiled = quick(Residual, "weight_bits=5")
    plan = Plan.from_json(compiled.plan.to_json())
    assert plan.names == {
        "x": "input x", "relu": "relu output", "conv2d_1": "inner output", "relu_1": "relu#2 output",
        "mean": "mean output",
    }  # fmt: skip
    for text in (compiled.summary(), plan.explain("*")):
        assert "inner output" in text
        assert "conv2d_1" not in text
    assert plan.explain("inner output") == plan.explain("conv2d_1")
    assert compiled.at("weight_bits=5", fix={"inner output": 4}).plan.bits["conv2d_1"] == 4


class Wrapped(nn.Module):
    """A network whose sites have long names."""

    def __init__(self) -> None:
        super().__init__()
        self.classification_model = nn.ModuleDict({"feature_extraction_encoder_layers": Residual()})

    def forward(self, x: Tensor) -> Tensor:
        return self.classification_model["feature_extraction_encoder_layers"](x)


@pytest.mark.parametrize(
    ("width", "left_out"),
    [(200, None), (120, "kind, +-, shape"), (80, "kind, +-, shape, mean trace"), (60, "kind, +-, shape, mean trace")],
)
def test_the_table_of_sites_has_whole_names_in_terminals_of_any_width(width: int, left_out: str | None) -> None:
    compiled = quick(Wrapped, "weight_bits=5")
    stream = io.StringIO()
    Console(file=stream, width=width).print(compiled.table())
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert (f"a wider terminal shows {left_out} too" in stream.getvalue()) == (left_out is not None)
    names = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    wanted = [site.name for site in compiled.planned.sites]
    assert "".join(names).replace(" ", "") == "".join(wanted).replace(" ", "")
    if width > 80:
        assert names == wanted  # a line for each
    elif width == 80:
        assert names.count("feature_extraction_encoder_layers.stem.") == 1  # parted between modules
