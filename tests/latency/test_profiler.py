"""Latencies from parts: the kernels that are integer, as onnxruntime itself has them; timings; budgets on latency."""

import json
import logging
import math
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import hawqfx
from hawqfx.errors import BudgetError, HawqfxError, InfeasibleBudget
from hawqfx.export.exporter import export
from hawqfx.ir.facts import Account, ChosenFormat, Fact, Quantizers
from hawqfx.ir.program import Program
from hawqfx.ir.sites import WeightSite
from hawqfx.latency import profiler
from hawqfx.latency.micro_timing import MicroTimer
from hawqfx.latency.profile_latency import ProfileLatency
from hawqfx.maths.formats import FLOAT, Format
from hawqfx.maths.latency_model import LatencyModel
from hawqfx.pass_manager.manager import run
from hawqfx.passes.lowering import Lowering
from hawqfx.runtime import ort, parity
from tests.nets import Concat, Plain, Residual, build, images
from tests.tools import after, context, quick

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


@cache
def measured(make: Callable[[], nn.Module]) -> Program:
    """The network with quantizers and codes, which a profile needs."""
    return after("rounding", make)


def profiled(make: Callable[[], nn.Module], **options: Any) -> LatencyModel:
    return profiler.profile(measured(make), context().batches[0], **options)


@pytest.fixture
def no_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Parts and networks that take a millisecond without being run; the list grows by a name for each."""
    timed: list[str] = []

    def part(*_: Any) -> float:
        timed.append("part")
        return 1e-3

    def networks(programs: Any, *_: Any) -> list[float]:
        timed.append("networks")
        return [1e-3] * len(programs)

    monkeypatch.setattr(MicroTimer, "_time", part)
    monkeypatch.setattr(profiler, "whole_networks", networks)
    return timed


def uniform(program: Program, width: Format) -> dict[str, Format]:
    return {site.key: width for site in program.sites}


def integer_kernels(program: Program, model: LatencyModel, formats: dict[str, Format]) -> int:
    """The number of layers, additions and averages that the rule takes for integer kernels."""
    nodes = {node.name: node for node in program.graph.graph.nodes}

    def counts(name: str) -> bool:
        return "max_pool" not in str(nodes[name].target) and "cat" not in str(nodes[name].target)

    return sum(kernel.is_integer(formats) for kernel in model.timed if counts(kernel.node))


@pytest.mark.parametrize("make", [Plain, Residual, Concat, Clipped])
def test_onnxruntime_runs_the_integer_kernels_that_the_rule_says(
    make: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all float, all 8 bits and six random plans with float among them."""
    # the first two plans export the whole networks
    monkeypatch.setattr(profiler, "_whole_seconds", lambda *_: {"float": 1e-3, "quantized": 1e-3})
    program, model = measured(make), profiled(make)
    keys = [site.key for site in program.sites]
    draw = random.Random(0)
    plans = [uniform(program, Format(8)), uniform(program, FLOAT)]
    plans += [{key: draw.choice((Format(8), Format(8), Format(4), FLOAT)) for key in keys} for _ in range(6)]
    counts = []
    for formats in plans:
        facts: dict[str, Fact] = {key: ChosenFormat(width, 0.0) for key, width in formats.items()}
        lowered = run([Lowering()], program.learn(facts), context())
        export(lowered, context().batches[0], tmp_path / "m.onnx")
        kernels = parity.kernels(tmp_path / "m.onnx")
        counts.append(sum(kernels.get(name, 0) for name in INTEGER))
    assert counts == [integer_kernels(program, model, formats) for formats in plans]
    assert counts[0] == len(program.layers) + 1 + (make is Residual)  # an average over all pixels
    assert counts[1] == 0


def test_parts_are_times_and_the_ends_are_as_measured(timings: Path, tmp_path: Path) -> None:
    profiled(Residual)
    (shared,) = timings.iterdir()
    parts = json.loads(shared.read_text())["seconds"]
    parts = {key: seconds for key, seconds in parts.items() if not key.startswith("network")}
    path = tmp_path / shared.name
    path.write_text(json.dumps({"seconds": parts}))
    program, model = measured(Residual), profiled(Residual, cache=tmp_path)
    seconds = [x for kernel in model.timed for x in (kernel.integer, kernel.floating, kernel.unpacking)]
    seconds += [x for tensor in model.converted for x in (tensor.quantize, tensor.dequantize, tensor.clip)]
    assert all(0 < x < 1 and math.isfinite(x) for x in (model.rest, *seconds))
    kept = json.loads(path.read_text())["seconds"]
    whole = {key.rpartition(" ")[2]: value for key, value in kept.items() if key.startswith("network")}
    assert model.seconds(uniform(program, FLOAT)) == pytest.approx(whole["float"])
    # the rest may take more than all of the integer network, of which the kernels are left at least a fiftieth
    assert model.seconds(uniform(program, Format(8))) >= whole["quantized"] * (1 - 1e-9)
    assert {weight for kernel in model.timed if (weight := kernel.weight)} == {site.key for site in program.weights}
    assert model.sites == {site.key for site in program.sites}


def test_a_second_call_times_nothing(timings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = profiled(Plain)
    folder = shutil.copytree(timings, tmp_path / "timings")

    def refuse(*_: Any, **__: Any) -> list[float]:
        raise AssertionError("timed again")

    monkeypatch.setattr(ort, "steady", refuse)
    assert profiled(Plain, cache=folder) == first
    with pytest.raises(AssertionError, match="timed again"):
        profiled(Plain, threads=2, cache=folder)
    assert len(list(folder.iterdir())) == 1


def test_damaged_timings_are_taken_again(tmp_path: Path, no_runs: list[str], caplog: pytest.LogCaptureFixture) -> None:
    first = profiled(Plain, cache=tmp_path)
    count = len(no_runs)
    (path,) = tmp_path.iterdir()
    path.write_text('{"seconds": 7')
    with caplog.at_level(logging.WARNING):
        assert profiled(Plain, cache=tmp_path) == first
    assert "are damaged" in caplog.text
    assert json.loads(path.read_text())["seconds"]
    assert len(no_runs) == 2 * count > 0


def test_the_pass_gives_the_model_of_the_first_batch(no_runs: list[str], tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    listening = replace(context(), progress=lambda label, done, total, note="": heard.append((label, done, total)))
    program = run([ProfileLatency(threads=1, shape={"batch": 4}, cache=tmp_path)], measured(Plain), listening)
    assert program.about(LatencyModel) == profiled(Plain, shape={"batch": 4}, cache=tmp_path)
    assert heard[-1] == ("latency", 4, 4)


def made_up(make: Callable[[], nn.Module], cache: Path) -> LatencyModel:
    """A model in which integer kernels are twice as fast and conversions cost something."""
    model = profiled(make, cache=cache)
    return replace(
        model,
        rest=1e-4,
        timed=tuple(replace(kernel, integer=1e-3, floating=2e-3, unpacking=3e-3) for kernel in model.timed),
        converted=tuple(replace(t, quantize=1e-4, dequantize=1e-4, clip=2e-4) for t in model.converted),
    )


@pytest.mark.usefixtures("no_runs")
def test_a_budget_on_latency_is_kept_and_may_leave_sites_in_float(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, model = quick(Residual).session, made_up(Residual, tmp_path)
    monkeypatch.setattr(profiler, "profile", lambda *_, **__: model)
    monkeypatch.setattr(profiler, "whole_networks", lambda *_: [0.0])
    ends = [model.seconds(uniform(session.measured, width)) for width in (Format(8), FLOAT)]
    losses = []
    for step in (0.05, 0.4, 0.7, 1.0):
        most = ends[0] + step * (ends[1] - ends[0])
        found = session.at(f"latency={1e3 * most:.6f}ms", against_uniform=False)
        seconds = model.seconds(found.planned.formats())
        assert seconds <= most + 1e-9
        losses.append(found.planned.about(Account).loss)
        assert f"latency: {1e3 * seconds:.4g} ms, measured 0 ms" in found.plan.explain()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0
    floats = {key for key, bits in found.plan.bits.items() if bits == 32}
    assert {site.key for site in session.measured.sites if isinstance(site, WeightSite)} <= floats
    fastest = session.at("latency=0.1ms").plan.bits  # the fastest: what is run decides
    assert fastest == dict.fromkeys((site.key for site in session.measured.sites), 8)
    monkeypatch.setattr(profiler, "whole_networks", lambda *_: [1.0])
    with pytest.raises(InfeasibleBudget, match=r"latency=0\.1ms cannot be met: the fastest network, .* at 1000 ms"):
        session.at("latency=0.1ms")
    with pytest.raises(InfeasibleBudget, match=r"size=10B cannot be met"):
        session.at("latency=1s, size=10B")


@pytest.mark.usefixtures("no_runs")
def test_a_network_that_runs_slower_than_predicted_is_planned_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every network takes a fifth longer than its parts: the budget is kept by the network, not by the prediction."""
    session, model = quick(Residual).session, made_up(Residual, tmp_path)
    asked: list[dict[str, Format]] = []

    def slower(programs: Any, *_: Any) -> list[float]:
        asked.append(programs[0].formats())
        return [1.2 * model.seconds(asked[-1])]

    monkeypatch.setattr(profiler, "profile", lambda *_, **__: model)
    monkeypatch.setattr(profiler, "whole_networks", slower)
    most = 0.9 * model.seconds(uniform(session.measured, FLOAT))
    found = session.at(f"latency={1e3 * most:.6f}ms")
    assert len(asked) > 1
    seconds = model.seconds(found.planned.formats())
    assert 1.2 * seconds <= 0.98 * most
    use = found.planned.about(Account).limits["latency"]
    assert use.measured == 1.2 * seconds
    assert use.bound == pytest.approx(most, rel=1e-6)  # as the text has it
    with pytest.raises(InfeasibleBudget, match=r"cannot be met: the fastest network, predicted to take"):
        session.at(f"latency={1e3 * model.seconds(uniform(session.measured, Format(8))):.6f}ms")


@pytest.mark.usefixtures("no_runs")
def test_a_frontier_of_latencies_has_the_plans_of_its_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sites in float, and every plan run: each network takes a fifth longer than its parts."""
    session, model = quick(Residual).session, made_up(Residual, tmp_path)
    monkeypatch.setattr(profiler, "profile", lambda *_, **__: model)
    monkeypatch.setattr(profiler, "whole_networks", lambda ps, *_: [1.2 * model.seconds(ps[0].formats())])
    budgets = [f"latency={1e3 * part * model.seconds(uniform(session.measured, FLOAT)):.6f}ms" for part in (0.9, 2.0)]
    for budget, point in zip(budgets, session.frontier(budgets=budgets, evaluate=1).points, strict=True):
        found = session.at(budget, against_uniform=False)
        assert point.formats == found.planned.formats()
        assert point.account.limits["latency"].measured == found.planned.about(Account).limits["latency"].measured
    assert 32 in point.bits.values()


def test_measure_latency_needs_no_sensitivity() -> None:
    model = hawqfx.measure_latency(build(Plain), images(), threads=1)
    assert len(model.timed) == 4
    assert "onnxruntime" in model.setting


def test_profiles_of_missing_dimensions_or_formats_are_refused() -> None:
    with pytest.raises(BudgetError, match="sequence=1: of this network batch varies"):
        profiled(Plain, shape={"sequence": 1})
    program = measured(Plain)
    for site in (program.weights[0], program.activations[1]):
        none: dict[str, Fact] = {site.key: Quantizers({})}
        with pytest.raises(HawqfxError, match=f"{re.escape(repr(site.name))} was not measured there: let it have 8"):
            profiler.profile(program.learn(none), context().batches[0])
