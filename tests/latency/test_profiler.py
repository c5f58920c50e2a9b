"""Latencies from parts: which kernels are integer, as onnxruntime itself has it; the folder of timings; budgets."""

import json
import logging
import math
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import hawqfx
from hawqfx import Compiled
from hawqfx.errors import HawqfxError, InfeasibleBudget
from hawqfx.ir.facts import ChosenFormat, Fact, Quantizers
from hawqfx.ir.program import WeightSite
from hawqfx.latency import profiler
from hawqfx.maths.latency_model import LatencyModel
from hawqfx.runtime import ort, parity
from tests.nets import Concat, Plain, Residual, build, images
from tests.tools import quick

INTEGER = (
    "QLinearConv", "QLinearAdd", "QLinearMul", "QLinearGlobalAveragePool", "QGemm", "QLinearMatMul",
    "MatMulIntegerToFloat",
)  # fmt: skip


class Clipped(nn.Module):
    """ReLU6 and a padding, as mobile networks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.stem, self.depthwise = nn.Conv2d(1, 8, 3, stride=2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        x = nn.functional.relu6(self.stem(self.pad(x)))
        x = nn.functional.relu6(self.depthwise(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Timings of their own, taken in no time."""
    monkeypatch.setenv("HAWQFX_CACHE", str(tmp_path / "timings"))
    monkeypatch.setattr(profiler, "PIECE_SECONDS", 0.001)
    monkeypatch.setattr(profiler, "WHOLE_SECONDS", 0.005)
    return tmp_path / "timings"


def table_of(compiled: Compiled, **options: Any) -> LatencyModel:
    return profiler.measure(compiled.session.measured, compiled.session.context.batches[0], **options)


def integers(compiled: Compiled, table: LatencyModel, bits: dict[str, int]) -> int:
    """How many layers, additions and averages the rule takes for integer kernels."""
    nodes = {node.name: node for node in compiled.session.measured.graph.graph.nodes}

    def counts(name: str) -> bool:
        return "max_pool" not in str(nodes[name].target) and "cat" not in str(nodes[name].target)

    return sum(timed.is_integer(bits) for timed in table.timed if counts(timed.node))


@pytest.mark.parametrize("make", [Plain, Residual, Concat, Clipped])
def test_onnxruntime_runs_the_integer_kernels_that_the_rule_says(make: type[nn.Module], tmp_path: Path) -> None:
    """Of all float, all 8 bits and six random plans with float among them."""
    compiled = quick(make)
    table = table_of(compiled)
    keys = [site.key for site in compiled.planned.sites]
    draw = random.Random(0)
    plans = [dict.fromkeys(keys, 8), dict.fromkeys(keys, 32)]
    plans += [{key: draw.choice((8, 8, 4, 32)) for key in keys} for _ in range(6)]
    found = []
    for bits in plans:
        facts: dict[str, Fact] = {key: ChosenFormat(width, 0.0) for key, width in bits.items()}
        compiled.session.lowered(compiled.session.measured.learn(facts), "").export(tmp_path / "m.onnx")
        kernels = parity.kernels(tmp_path / "m.onnx")
        found.append(sum(kernels.get(name, 0) for name in INTEGER))
    assert found == [integers(compiled, table, bits) for bits in plans]
    assert found[0] == len(compiled.planned.layers) + 1 + (make is Residual)  # an average over all pixels
    assert found[1] == 0


def test_parts_are_times_and_the_ends_are_as_measured() -> None:
    compiled = quick(Residual)
    table = table_of(compiled)
    every = [x for timed in table.timed for x in (timed.integer, timed.floating, timed.unpacking)]
    every += [x for c in table.converted for x in (c.quantize, c.dequantize, c.clip)]
    assert all(0 < x < 1 and math.isfinite(x) for x in (table.rest, *every))
    keys = [site.key for site in compiled.planned.sites]
    kept = json.loads(next(Path(os.environ["HAWQFX_CACHE"]).glob("*.json")).read_text())["seconds"]
    whole = {key.rpartition(" ")[2]: value for key, value in kept.items() if key.startswith("network")}
    assert table.seconds(dict.fromkeys(keys, 32)) == pytest.approx(whole["float"])
    # the rest may take more than all of the integer network, of which the kernels are left at least a fiftieth
    assert table.seconds(dict.fromkeys(keys, 8)) >= whole["integer"] * (1 - 1e-9)
    assert {weight for timed in table.timed if (weight := timed.weight)} == {s.key for s in compiled.planned.weights}


def test_a_second_call_times_nothing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    compiled = quick(Plain)
    first = table_of(compiled)

    def refuse(*_: Any, **__: Any) -> list[float]:
        raise AssertionError("timed again")

    monkeypatch.setattr(ort, "steady", refuse)
    assert table_of(compiled) == first
    with pytest.raises(AssertionError, match="timed again"):
        table_of(compiled, threads=2)
    assert len(list(folder.iterdir())) == 1


def test_damaged_timings_are_taken_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiled = quick(Plain)
    table_of(compiled)
    (path,) = folder.iterdir()
    path.write_text('{"seconds": 7')
    with caplog.at_level(logging.WARNING):
        table_of(compiled)
    assert "are damaged" in caplog.text
    assert json.loads(path.read_text())["seconds"]


def test_a_budget_on_latency_is_kept_and_may_leave_sites_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a table in which integer kernels are twice as fast and conversions cost something."""
    compiled = quick(Residual)
    session = compiled.session
    table = table_of(compiled)
    table = replace(
        table,
        rest=1e-4,
        timed=tuple(replace(t, integer=1e-3, floating=2e-3, unpacking=3e-3) for t in table.timed),
        converted=tuple(replace(c, quantize=1e-4, dequantize=1e-4, clip=2e-4) for c in table.converted),
    )
    monkeypatch.setattr(profiler, "measure", lambda *_, **__: table)
    monkeypatch.setattr(profiler, "whole_networks", lambda *_: [0.0])
    keys = [site.key for site in session.measured.sites]
    ends = [table.seconds(dict.fromkeys(keys, bits)) for bits in (8, 32)]
    losses = []
    for step in (0.05, 0.4, 0.7, 1.0):
        most = ends[0] + step * (ends[1] - ends[0])
        found = session.at(f"latency={1e3 * most:.6f}ms", against_uniform=False)
        assert table.seconds(found.plan.bits) <= most + 1e-9
        assert found.planned.account is not None
        losses.append(found.planned.account.loss)
        assert f"latency: {1e3 * table.seconds(found.plan.bits):.4g} ms, measured 0 ms" in found.plan.explain()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0
    floats = {key for key, bits in found.plan.bits.items() if bits == 32}
    assert {site.key for site in session.measured.sites if isinstance(site, WeightSite)} <= floats
    assert session.at("latency=0.1ms").plan.bits == dict.fromkeys(keys, 8)  # the fastest: what is run decides
    monkeypatch.setattr(profiler, "whole_networks", lambda *_: [1.0])
    with pytest.raises(InfeasibleBudget, match=r"latency=0.0001 cannot be met: the fastest network, .* at 1000 ms"):
        session.at("latency=0.1ms")
    with pytest.raises(InfeasibleBudget, match=r"size=10 cannot be met"):
        session.at("latency=1s, size=10B")


def test_a_network_that_runs_slower_than_predicted_is_planned_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network takes a fifth longer than its parts: the budget is kept by the network, not by the prediction."""
    session = quick(Residual).session
    table = table_of(quick(Residual))
    table = replace(
        table,
        rest=1e-4,
        timed=tuple(replace(t, integer=1e-3, floating=2e-3, unpacking=3e-3) for t in table.timed),
        converted=tuple(replace(c, quantize=1e-4, dequantize=1e-4, clip=2e-4) for c in table.converted),
    )
    keys = [site.key for site in session.measured.sites]
    asked: list[dict[str, int]] = []

    def slower(programs: Any, *_: Any) -> list[float]:
        asked.append(programs[0].bits())
        return [1.2 * table.seconds(asked[-1])]

    monkeypatch.setattr(profiler, "measure", lambda *_, **__: table)
    monkeypatch.setattr(profiler, "whole_networks", slower)
    most = 0.9 * table.seconds(dict.fromkeys(keys, 32))
    found = session.at(f"latency={1e3 * most:.6f}ms")
    assert len(asked) > 1
    assert 1.2 * table.seconds(found.plan.bits) <= 0.98 * most
    assert found.planned.account is not None
    use = found.planned.account.limits["latency"]
    assert use.measured == 1.2 * table.seconds(found.plan.bits)
    assert use.bound == pytest.approx(most, rel=1e-6)  # as the text has it
    with pytest.raises(InfeasibleBudget, match=r"cannot be met: the fastest network, predicted to take"):
        session.at(f"latency={1e3 * table.seconds(dict.fromkeys(keys, 8)):.6f}ms")


def test_measure_latency_needs_no_sensitivity() -> None:
    table = hawqfx.measure_latency(build(Plain), images(), threads=1)
    assert len(table.timed) == 4
    assert "onnxruntime" in table.setting


def test_what_cannot_be_timed_is_refused() -> None:
    compiled = quick(Plain)
    with pytest.raises(HawqfxError, match="the example has only 16 samples"):
        table_of(compiled, batch=17)
    four: dict[str, Fact] = {"conv1.weight": Quantizers({})}
    with pytest.raises(HawqfxError, match=r"'conv1\.weight' was not measured there: let it have 8"):
        profiler.measure(compiled.session.measured.learn(four), compiled.session.context.batches[0])
