"""Latencies at a shape: what is run, by the profiler and by the search, has the sizes that are asked for."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim

import hawqfx
from hawqfx import Budget
from hawqfx.errors import BudgetError, HawqfxError, InfeasibleBudget
from hawqfx.ir.facts import Account
from hawqfx.latency import profiler
from hawqfx.latency.micro_timing import MicroTimer
from hawqfx.maths.latency_model import LatencyModel
from hawqfx.runtime import ort
from hawqfx.session.session import Session
from tests.frontend.test_dimensions import Pixels, seeded
from tests.test_decoders import model, texts

Shapes = dict[str, tuple[int, ...]]


@cache
def images() -> Session:
    """Of images with a height that varies; those of the data have 8 by 10 pixels."""
    data = [torch.randn(3, 1, 8, 10, generator=torch.Generator().manual_seed(0))]
    heights = {"x": {2: Dim("height", max=64)}}
    options: dict[str, Any] = {"sensitivity": "mse", "rounding": "nearest", "dynamic_shapes": heights}
    return hawqfx.compile(seeded(Pixels), "weight_bits=6", data, **options).session


@cache
def decoder() -> Session:
    """Of 6 new tokens after 6 past ones."""
    options: dict[str, Any] = {"sensitivity": "mse", "rounding": "nearest", "tokens": "causal"}
    return hawqfx.compile(model("grouped-query"), "weight_bits=6", texts(), **options).session


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Shapes]:
    """The shapes that each whole network was fed with, once; parts take a millisecond without being run."""
    shapes: list[Shapes] = []

    def once(files: Any, feeds: Any, **_: Any) -> list[float]:
        for file, feed in zip(files, feeds, strict=True):
            ort.session(file).run(None, feed)
            shapes.append({name: value.shape for name, value in feed.items()})
        return [1e-3] * len(files)

    monkeypatch.setattr(ort, "steady", once)
    monkeypatch.setattr(MicroTimer, "_time", lambda *_: 1e-4)
    return shapes


def decoder_feed(batch: int, new: int, past: int) -> Shapes:
    held = {f"past_key_values.{layer}.{part}": (batch, 2, past, 8) for layer in range(2) for part in ("key", "value")}
    return {"input_ids": (batch, new), "attention_mask": (batch, past + new), **held}


def parts_in(folder: Path) -> str:
    """The keys of the parts whose timings are kept in a folder."""
    (path,) = folder.iterdir()
    return " ".join(key for key in json.loads(path.read_text())["seconds"] if not key.startswith("network"))


@pytest.mark.parametrize(
    ("text", "feed"),
    [
        ("latency=1s", decoder_feed(1, 6, 6)),
        ("latency=1s@sequence=1@past=30", decoder_feed(1, 1, 30)),
        ("latency=1s@batch=2@past=0", decoder_feed(2, 6, 0)),
    ],
)
def test_a_decoder_is_timed_at_the_shape(text: str, feed: Shapes, ran: list[Shapes], tmp_path: Path) -> None:
    """Both networks of the profile and the one of the plan, which runs in onnxruntime."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAWQFX_CACHE", str(tmp_path))
        found = decoder().at(text)
    assert ran == [feed] * 3
    shape = {"batch": feed["input_ids"][0], "sequence": feed["input_ids"][1], "past": feed["past_key_values.0.key"][2]}
    assert found.planned.about(LatencyModel).shape == shape
    assert found.planned.about(Account).limits["latency"].shape == shape
    assert found.budget == str(Budget.parse(text))
    words = ", ".join(f"{name}={size}" for name, size in shape.items())
    assert (
        f"latency: {1e3 * found.planned.about(LatencyModel).seconds(found.planned.formats()):.4g} ms" in found.summary()
    )
    assert f"measured 1 ms of 1000 ms at {words}; " in found.summary()
    assert f"at {words}" in "".join(path.read_text() for path in tmp_path.iterdir())
    own = {number for sizes in feed.values() for number in sizes} | {
        shape["batch"] * shape["sequence"]
    }  # rows of a layer
    numbers = set(map(int, re.findall(r"\d+", parts_in(tmp_path))))
    assert shape["past"] + shape["sequence"] in numbers  # the keys that are multiplied
    assert numbers.isdisjoint({6, 12} - own)  # the sizes of the data
    again = hawqfx.Plan.from_json(found.plan.to_json())
    assert again == found.plan
    assert again.explain() == found.plan.explain()


@pytest.mark.usefixtures("ran")
def test_parts_have_the_shapes_of_the_run(tmp_path: Path) -> None:
    session = images()
    profiler.profile(session.measured, session.context.batches[0], shape={"height": 24, "batch": 2}, cache=tmp_path)
    keys = parts_in(tmp_path)
    assert "[2, 1, 24, 10]" in keys
    assert "[2, 4, 24, 10]" in keys
    assert "8, 10]" not in keys


def test_images_are_timed_at_their_size_and_profiled_again_at_another(
    ran: list[Shapes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAWQFX_CACHE", str(tmp_path))
    session, profiles = images(), []
    profile = profiler.profile

    def counted(*args: Any, **options: Any) -> LatencyModel:
        profiles.append(options["shape"])
        return profile(*args, **options)

    monkeypatch.setattr(profiler, "profile", counted)
    first = session.at("latency=1s@height=24")
    assert ran == [{"x": (1, 1, 24, 10)}] * 3
    second = first.at("latency=1s@height=33@batch=2")
    assert ran[3:] == [{"x": (2, 1, 33, 10)}] * 3
    assert (first.session.measured.about(LatencyModel).shape, second.session.measured.about(LatencyModel).shape) == (
        {"batch": 1, "height": 24},
        {"batch": 2, "height": 33},
    )
    assert profiles == [{"height": 24}, {"height": 33, "batch": 2}]
    third = second.at("latency=2s@batch=2@height=33")  # known, whatever the order
    assert len(profiles) == 2
    assert ran[6:] == [{"x": (2, 1, 33, 10)}]
    third.at("latency=2s")
    assert profiles[2:] == [{}]
    assert ran[7:] == [{"x": (1, 1, 8, 10)}] * 3
    session.at("latency=1s@height=24")  # the timings are kept: only the plan's network runs
    assert ran[10:] == [{"x": (1, 1, 24, 10)}]
    assert str(first.plan.budget) == "latency=1s@height=24"


@pytest.mark.usefixtures("ran")
def test_a_budget_that_cannot_be_met_says_its_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAWQFX_CACHE", str(tmp_path))
    with pytest.raises(InfeasibleBudget, match=r"latency=1us@height=24 cannot be met"):
        images().at("latency=1us@height=24")


@pytest.mark.usefixtures("ran")
def test_a_frontier_at_a_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAWQFX_CACHE", str(tmp_path))
    frontier = images().frontier(budgets=["latency=1s@height=24", "latency=2s@height=24", "weight_bits=6"])
    assert [point.budget for point in frontier.points] == [
        "latency=1s@height=24",
        "latency=2s@height=24",
        "weight_bits=6",
    ]
    assert frontier.points[0].account.limits["latency"].shape == {"batch": 1, "height": 24}
    with pytest.raises(HawqfxError, match="latencies at several shapes"):
        images().frontier(budgets=["latency=1s@height=24", "latency=2s"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latency=1s@sequence=1", "sequence=1: of this network batch, height varies, and no 'sequence'"),
        ("latency=1s@width=10, size=50%", "width=10: of this network batch, height varies"),
        ("latency=1s@height=65", "height=65: the network was captured for at most 64"),
        ("latency=1s@batch=0", "computes nothing at batch=0, height=8"),
        ("drop=1%, latency=1s@tall=3", "tall=3: of this network batch, height varies"),
    ],
)
def test_shapes_that_the_network_cannot_take_are_refused(text: str, message: str, ran: list[Shapes]) -> None:
    with pytest.raises(BudgetError, match=message):
        images().at(text)
    assert not ran


def test_a_shape_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hawqfx.compiler.try_loss", lambda *_: pytest.fail("too late"))
    with pytest.raises(BudgetError, match="height=9: of this network batch varies, and no 'height'; dynamic_shapes="):
        hawqfx.compile(seeded(Pixels), "latency=1s@height=9", [torch.randn(3, 1, 8, 10)])


def test_measure_latency_of_a_decoder_at_a_token(ran: list[Shapes], tmp_path: Path) -> None:
    times = hawqfx.measure_latency(
        model("grouped-query"), texts(), tokens="causal", shape={"sequence": 1, "past": 20}, cache=tmp_path
    )
    assert times.shape == {"batch": 1, "sequence": 1, "past": 20}
    assert ran == [decoder_feed(1, 1, 20)] * 2
    with pytest.raises(BudgetError, match="height=4: of this network batch, sequence, past varies"):
        hawqfx.measure_latency(model("grouped-query"), texts(), tokens="causal", shape={"height": 4}, cache=tmp_path)
