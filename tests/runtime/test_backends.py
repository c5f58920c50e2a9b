"""Backends: what is installed runs and is compared with the float network; what is not is said."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from hawqfx import cli
from hawqfx.benchmark import benchmark
from hawqfx.errors import BackendError, PlanError, UsageError
from hawqfx.runtime import ort
from hawqfx.runtime.backends import BACKENDS, PROVIDERS, Result, available, compare, run_file, run_graph
from hawqfx.runtime.file_inputs import random_inputs
from tests.nets import Plain, build, images
from tests.tools import quick


def model() -> nn.Module:
    return build(Plain)


def loader() -> Any:
    return images()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A file and its plan."""
    folder = tmp_path_factory.mktemp("made")
    compiled = quick(Plain, "weight_bits=8")
    compiled.export(folder / "m.onnx")
    compiled.plan.write(folder / "plan.json")
    compiled.save(folder / "net.hawqfx")
    return folder / "m.onnx", folder / "plan.json"


def test_a_file_is_timed_and_compared_in_one_run(made: tuple[Path, Path]) -> None:
    found = benchmark(made[0], ["ort-cpu", "torch-cpu"], model(), images(), made[1], batch=4, rounds=5)
    assert list(found) == ["ort-cpu", "torch-cpu", "torch-cpu, float"]
    for result in found.values():
        assert not isinstance(result, str)
        assert 0 < result.median <= result.p90
        assert result.runs == 5
        assert result.throughput == pytest.approx(4 / result.median)
        assert result.parity is not None
    exact, file, graph = (found[name].parity for name in ("torch-cpu, float", "ort-cpu", "torch-cpu"))  # type: ignore[union-attr]
    assert exact is not None
    assert exact.largest <= 1e-6  # the same operators
    assert file is not None
    assert graph is not None
    assert 0 < file.mean < 0.1 * build(Plain)(images()[0][0][:4]).abs().max()
    assert file.relative == pytest.approx(graph.relative, abs=0.02)  # a step of the last quantizer


def test_the_graph_that_is_timed_is_that_of_the_file(made: tuple[Path, Path], tmp_path: Path) -> None:
    """With the codes of the saved file, whatever the data; a plan alone needs its own data, and the file its plan."""
    saved = made[0].with_name("net.hawqfx")
    found = benchmark(made[0], ["ort-cpu", "torch-cpu"], model(), images(seed=9), saved, batch=16, rounds=2)
    x = images(seed=9)[0][0]
    with torch.no_grad():
        wanted = compare(quick(Plain, "weight_bits=8").model(x).numpy(), model()(x).numpy())
    assert isinstance(found["torch-cpu"], Result)
    assert found["torch-cpu"].parity == wanted
    with pytest.raises(PlanError, match="made with other data"):
        benchmark(made[0], ["torch-cpu"], model(), images(seed=9), made[1])
    with pytest.raises(UsageError, match=r"plan\.json has no codes: give the file of Compiled\.save\(\)"):
        benchmark(made[0], ["torch-cpu"], model(), None, made[1])
    quick(Plain, "weight_bits=4").plan.write(tmp_path / "other.json")
    with pytest.raises(BackendError, match=r"m\.onnx was made by the plan .*other\.json is .*: give the file's own"):
        benchmark(made[0], ["torch-cpu"], model(), images(), tmp_path / "other.json")


def test_what_is_not_installed_is_said(made: tuple[Path, Path]) -> None:
    missing = [name for name in BACKENDS if available(name) is not None]
    if not torch.cuda.is_available():
        assert missing == ["ort-cuda", "ort-tensorrt", "torch-cuda"]
    found = benchmark(made[0], missing)
    assert all(isinstance(result, str) and result.startswith("not here: ") for result in found.values())
    for name in missing:
        inputs, batch = random_inputs(made[0], {}), quick(Plain).session.context.batches[0]
        with pytest.raises(BackendError, match=f"{name} is not here: "):
            _ = run_file(made[0], name, inputs) if name in PROVIDERS else run_graph(model(), name, batch)


def test_another_provider_is_asked_for(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def session(path: Any, **options: Any) -> Any:
        asked.append(options.get("provider", ort.CPU))
        return kept(path)

    kept = ort.session
    monkeypatch.setattr(ort, "providers", lambda: ["CUDAExecutionProvider", ort.CPU])
    monkeypatch.setattr(ort, "session", session)
    inputs = [images()[0][0].numpy()]
    assert run_file(made[0], "ort-cuda", inputs, rounds=2).provider == "CUDAExecutionProvider"
    assert asked == ["CUDAExecutionProvider"]


def test_bad_input_is_refused(made: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="backend 'gpu': must be one of ort-cpu, ort-cuda"):
        benchmark(made[0], ["gpu"])
    with pytest.raises(UsageError, match="torch-cpu runs the graph: give the model and the plan"):
        benchmark(made[0], ["torch-cpu"])
    with pytest.raises(UsageError, match="rounds=1: a median takes at least two runs"):
        benchmark(made[0], rounds=1)
    with pytest.raises(BackendError, match="they are not alike"):
        compare(np.zeros((2, 3)), np.zeros((2, 4)))


def test_the_command_prints_a_line_each_and_writes_json(made: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    here = "tests.runtime.test_backends"
    command = ["bench", str(made[0]), "--backend", "ort-cpu", "--backend", "ort-tensorrt", "--rounds", "3"]
    command += ["--model", f"{here}:model", "--data", f"{here}:loader", "--out", str(out)]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    kept = json.loads(out.read_text())
    assert kept["ort-cpu"]["provider"] == ort.CPU
    assert kept["ort-cpu"]["parity"]["agreement"] <= 1
    assert kept["ort-cpu"]["versions"]["onnxruntime"] == ort.version()
    if available("ort-tensorrt") is not None:
        assert kept["ort-tensorrt"].startswith("not here: this onnxruntime has")
        assert CliRunner().invoke(cli.app, ["bench", str(made[0]), "--backend", "ort-tensorrt"]).exit_code == 1
    assert "ort-tensorrt" in result.output


def test_a_compiled_network_benchmarks_itself() -> None:
    table = quick(Plain).benchmark(["ort-cpu", "torch-cpu"], rounds=2)
    assert list(table.columns[0].cells) == ["ort-cpu", "torch-cpu"]
    assert table.columns[-1].header == "first output against float32's"
    for cell in table.columns[-1].cells:
        assert re.fullmatch(
            r"same top-1 [\d.]+%, mean \|difference\| [\d.e-]+: [\d.]+% of float32's mean \|output\|", str(cell)
        )


def test_a_difference_has_the_unit_of_the_output_and_its_share() -> None:
    found = compare(np.array([[1.0, -3.0], [5.0, 4.0]]), np.array([[2.0, -2.0], [4.0, 8.0]]))
    assert (found.mean, found.relative_mean) == (7 / 4, 7 / 16)
    assert (found.largest, found.relative, found.agreement) == (4.0, 0.5, 0.5)
