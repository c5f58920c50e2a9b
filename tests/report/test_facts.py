"""The page's facts are those of the compiled network."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch

import hawqfx
from hawqfx.analysis.liveness import live
from hawqfx.errors import ExportError, HawqfxError
from hawqfx.ir.facts import Account, ByteCost, Sensitivity
from hawqfx.maths.latency_model import LatencyModel
from hawqfx.report.facts import Facts
from hawqfx.report.gather import noise_of
from tests.nets import Plain, Residual, build, images


@cache
def compiled() -> hawqfx.Compiled:
    return hawqfx.compile(build(Residual), "weight_bits=5", images(), sensitivity="gauss-newton")


@cache
def facts() -> Facts:
    return compiled()._facts(4)


def test_sites_are_those_of_the_plan() -> None:
    planned, plan = compiled().planned, compiled().plan
    rows = {row.key: row for row in facts().sites}
    assert {key: row.bits for key, row in rows.items()} == plan.bits
    for key, row in rows.items():
        sensitivity = planned.facts.get(key, Sensitivity)
        assert (row.curvature, row.stderr) == (sensitivity.curvature, sensitivity.stderr)
        assert row.bytes == planned.facts.get(key, ByteCost).bytes[plan.formats[key]]
        assert row.reason == plan.explain(key)
        assert row.increase == plan.chosen[key].increase
    assert [row.key for row in facts().sites if row.kind == "weight"] == ["stem.weight", "inner.weight", "head.weight"]
    assert facts().absent.keys() == {"latency"}


def test_the_headline_says_the_losses_and_bytes() -> None:
    figures = {figure.label: figure for figure in facts().headline}
    floating, loss = compiled().calibration_loss()
    assert figures["Measured loss"].value == f"{loss:.4g}"
    assert f"float32 {floating:.4g}" in figures["Measured loss"].note
    assert figures["Weights"].value == f"{compiled().weight_bytes:,} bytes"
    assert figures["Predicted loss increase"].value == f"{compiled().predicted_loss:.3g}"
    weights = {site.key: site.numel for site in compiled().planned.weights}
    mean = sum(compiled().plan.bits[key] * numel for key, numel in weights.items()) / sum(weights.values())
    assert figures["Bits of a weight"].value == f"{mean:.3g}"


def test_the_curve_has_this_network_and_uniform_bits_by_one_measure() -> None:
    curve = facts().curve
    assert curve is not None
    assert curve.limit == "weight_bits"
    kinds = [point.kind for point in curve.points]
    assert kinds.count("mixed precision") == 4
    uniform = {p.name: p.amount for p in curve.points if p.kind == "uniform bits"}
    assert uniform == pytest.approx({f"{bits} bits": float(bits) for bits in range(2, 9)})
    (own,) = (point for point in curve.points if point.kind == "this network")
    account = compiled().planned.about(Account)
    assert own.loss == pytest.approx(account.loss)
    assert own.amount == pytest.approx(account.limits["weight_bits"].amount)


def test_noise_of_tensors_is_that_of_both_networks() -> None:
    """By hand: the weights' own, and the last activation's from the outputs of the quantized graph."""
    planned, lowered = compiled().planned, compiled().program
    batch = compiled().session.context.batches[0]
    noise = noise_of(planned, lowered, batch)

    def ratio(exact: torch.Tensor, found: torch.Tensor) -> float:
        exact, found = exact.detach().double(), found.detach().double()
        return 10 * math.log10(float(exact.square().sum() / (found - exact).square().sum()))

    weight = "inner.weight"
    assert noise[weight] == pytest.approx(ratio(planned.tensor(weight), lowered.tensor(weight)))
    last = next(site for site in planned.activations if site.kind == "mean")
    exact: dict[str, torch.Tensor] = {}
    planned.run(batch.args, batch.kwargs, lambda name, value: exact.setdefault(name, value), at=last.nodes)
    node = next(node for node in lowered.graph.graph.nodes if node.name == last.key)
    (quantized,) = node.users
    found: dict[str, torch.Tensor] = {}
    lowered.run(batch.args, batch.kwargs, lambda name, value: found.setdefault(name, value), at=[quantized.name])
    assert noise[last.key] == pytest.approx(ratio(exact[last.key], found[quantized.name]))


def test_equal_tensors_have_no_noise_and_json_has_null() -> None:
    uniform = compiled().session.uniform(32, 32)
    noise = noise_of(uniform.planned, uniform.program, compiled().session.context.batches[0])
    assert set(noise.values()) == {math.inf}
    assert {row["noise"] for row in json.loads(uniform._facts(2).to_json())["sites"]} == {None}


def test_memory_has_the_peak_of_the_plan() -> None:
    planned = compiled().planned
    formats = planned.formats()
    assert max(row.bytes for row in facts().memory) == max(step.bytes(formats) for step in live(planned))
    assert max(row.floating for row in facts().memory) > max(row.bytes for row in facts().memory)
    assert len(facts().memory) > len(live(planned))


def test_the_graph_has_every_node_but_constants() -> None:
    names = {node.name for node in compiled().planned.graph.graph.nodes if node.op != "get_attr"}
    assert {row.key for row in facts().nodes} == names
    assert all(source in names for row in facts().nodes for source in row.inputs)
    assert {row.weight for row in facts().nodes} - {None} == {site.key for site in compiled().planned.weights}


def test_latencies_are_those_of_the_model() -> None:
    timed = hawqfx.compile(build(Plain), "latency=1s, weight_bits=6", images(), sensitivity="mse")
    model, formats = timed.planned.about(LatencyModel), timed.plan.formats
    found = timed._facts(2)
    assert "latency" not in found.absent
    assert sorted(row.seconds for row in found.kernels) == sorted(each.seconds(formats) for each in model.timed)
    assert {row.node for row in found.kernels} == {"relu", "relu#2", "mean", "head"}
    assert "conv1.weight" in {row.weight for row in found.kernels}
    (figure,) = (figure for figure in found.headline if figure.label == "Predicted latency")
    assert figure.value == f"{1e3 * model.seconds(formats):.4g} ms"


def test_a_loaded_network_leaves_the_frontier_out_and_says_so(tmp_path: Path) -> None:
    compiled().save(tmp_path / "net.hawqfx")
    loaded = hawqfx.load(tmp_path / "net.hawqfx", build(Residual))._facts(4)
    assert loaded.curve is None
    assert "frontier" in loaded.absent
    assert "not in the file" in {figure.value for figure in loaded.reproduce}
    assert loaded.noise_data == "the example in the file, 2 samples"
    assert [row.bits for row in loaded.sites] == [row.bits for row in facts().sites]


def test_a_network_that_follows_a_plan_has_no_sensitivities() -> None:
    model = build(Plain)
    plan = hawqfx.compile(model, "weight_bits=5", images(), sensitivity="mse").plan
    followed = hawqfx.compile(model, None, images(), plan=plan)._facts(4)
    assert {"frontier", "sensitivities"} <= followed.absent.keys()
    assert followed.noise_data == "the first calibration batch, 16 samples"


def test_a_layer_named_as_a_script_is_text(tmp_path: Path) -> None:
    model = torch.nn.Sequential()
    model.add_module("<script>alert(1)</script>", torch.nn.Linear(8, 3))
    data = [(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))]
    odd = hawqfx.compile(model.eval(), "weight_bits=5", data, sensitivity="mse")
    assert any("<script>alert" in key for key in odd.plan.bits)
    odd.report(tmp_path / "report.html", points=2)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "\\u003cscript\\u003ealert(1)" in text
    assert "<script>" not in odd.plan._repr_html_()


def test_bad_input_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not exist"):
        compiled().report(tmp_path / "none" / "report.html")
    with pytest.raises(HawqfxError, match="at least two"):
        compiled().report(tmp_path / "report.html", points=1)
    assert list(tmp_path.iterdir()) == []


def test_notebooks_show_short_tables() -> None:
    assert f"{compiled().weight_bytes:,} bytes" in compiled()._repr_html_()
    assert "inner.weight" in compiled().plan._repr_html_()
    odd = hawqfx.Plan("<b>", {}, {}, None)
    assert "<b>" not in odd._repr_html_()
