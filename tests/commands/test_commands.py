"""Commands beside compile's own tests: options, settings, JSON, inspect, doctor, dry runs."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import QuantType, quantize_dynamic
from typer.testing import CliRunner

import hawqfx
from hawqfx import cli
from hawqfx.commands import compiling
from hawqfx.commands.output import in_bytes
from hawqfx.errors import ExportError, HawqfxError
from hawqfx.export.inspection import stored_weights
from hawqfx.forecast import forecast
from hawqfx.latency import profiler
from hawqfx.latency.micro_timing import MicroTimer
from tests.nets import Plain, build, images
from tests.tools import quick

ROOT = Path(__file__).parents[2]
HERE = "tests.commands.test_commands"
run = CliRunner()


def model() -> object:
    return build(Plain)


def loader() -> object:
    return images()


def focal(output: Any, target: Any) -> Any:
    log = output.log_softmax(1).gather(1, target[:, None])[:, 0]
    return -((1 - log.exp()) ** 2 * log).mean()


def call(folder: Path, *more: str) -> list[str]:
    out = str(folder / "model.onnx")
    return ["compile", f"{HERE}:model", "--data", f"{HERE}:loader", "--out", out, "--sensitivity", "mse", *more]


def test_every_argument_of_compile_is_an_option() -> None:
    """But for those that are Python objects."""
    arguments = set(inspect.signature(hawqfx.compile).parameters) - {"observers", "console"}
    options = set(inspect.signature(compiling.compile).parameters)
    renamed = {"plan": "from_plan", "dynamic_shapes": "dynamic"}
    assert {renamed.get(name, name) for name in arguments} <= options


def test_options_reach_the_compiler(tmp_path: Path) -> None:
    words = ["--budget", "weight_bits=5", "--weight-bits", "4-6", "--activation-bits", "8", "--rounding", "nearest"]
    words += ["--loss", f"{HERE}:focal", "--json"]
    found = json.loads(run.invoke(cli.app, call(tmp_path, *words)).stdout)
    weights = {bits for key, bits in found["bits"].items() if key.endswith("weight")}
    assert weights <= {4, 5, 6}
    assert found["bytes"] == (tmp_path / "model.onnx").stat().st_size
    assert found["budget"] == "weight_bits=5"
    assert found["calibration_loss"]["float"] == pytest.approx(found["calibration_loss"]["compiled"], rel=0.2)


def test_a_plan_is_followed_in_place_of_a_budget(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    first = run.invoke(cli.app, call(tmp_path, "--budget", "weight_bits=5", "--plan", str(plan), "--json"))
    again = run.invoke(cli.app, call(tmp_path, "--from-plan", str(plan), "--json"))
    assert again.exit_code == 0, again.output
    assert json.loads(first.stdout)["bits"] == json.loads(again.stdout)["bits"]


@pytest.mark.parametrize(("budget", "reference"), [("weight_bits=5", "weights"), ("size=100kB", "file")])
def test_the_last_lines_are_the_file_and_the_loss(budget: str, reference: str, tmp_path: Path) -> None:
    """A share is of what the percentages of the budget are of."""
    lines = run.invoke(cli.app, call(tmp_path, "--budget", budget)).stdout.strip().splitlines()
    size = (tmp_path / "model.onnx").stat().st_size
    assert lines[-2].startswith(f"{tmp_path / 'model.onnx'}: ")
    assert f"({size:,} bytes)" in lines[-2]
    assert f" of float32's {reference} of " in lines[-2]
    assert lines[-2].endswith(f"budget {budget}")
    assert lines[-1].startswith("loss on the calibration data: ")


def test_a_file_holds_a_call_and_the_line_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hawqfx.toml").write_text(
        f'[compile]\nmodel = "{HERE}:model"\ndata = "{HERE}:loader"\nbudget = "weight_bits=4"\nout = "m.onnx"\n'
        'sensitivity = "mse"\nkeep-float = ["head.*"]\n'
    )
    found = json.loads(run.invoke(cli.app, ["compile", "--json"]).stdout)
    assert found["budget"] == "weight_bits=4"
    assert "head.weight" not in found["bits"]
    found = json.loads(run.invoke(cli.app, ["compile", "--json", "--budget", "weight_bits=6", "--plan", "p"]).stdout)
    assert found["budget"] == "weight_bits=6"
    # a plan on the line takes the place of the file's budget
    followed = json.loads(run.invoke(cli.app, ["compile", "--json", "--from-plan", "p"]).stdout)
    assert followed["bits"] == found["bits"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[compiel]\n", "there is no command 'compiel'"),
        ("[compile]\nbugdet = 'x'\n", "compile has no option 'bugdet'"),
        ("[compile\n", "cannot be read"),
    ],
)
def test_a_file_with_slips_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(text)
    result = run.invoke(cli.app, ["--config", str(path), "passes"])
    assert isinstance(result.exception, HawqfxError)
    assert message in str(result.exception)


def test_version() -> None:
    assert run.invoke(cli.app, ["--version"]).stdout == f"hawqfx {hawqfx.__version__}\n"


# what bash does when tab is pressed at the end of a line
COMPLETED = """
eval "$(hawqfx --show-completion bash)"
while read -r -a COMP_WORDS; do
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    $(complete -p hawqfx | sed 's/.*-F \\([^ ]*\\).*/\\1/') hawqfx
    echo "${COMPREPLY[*]}"
done
"""


def test_bash_completes_commands_options_and_values(tmp_path: Path) -> None:
    program = tmp_path / "hawqfx"
    program.write_text(f"#!{sys.executable}\nfrom hawqfx.cli import main\n\nmain()\n")
    program.chmod(0o755)
    lines = {
        "hawqfx comp": "compile",
        "hawqfx compile --packi": "--packing",
        "hawqfx compile --sensitivity hawq": "hawq-v2 hawq-v1",
    }
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", COMPLETED], input="\n".join(lines) + "\n", env=environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == list(lines.values()), done.stderr


@pytest.mark.parametrize("packing", ["portable", "native"])
def test_inspect_tells_bits_and_bytes_from_the_file_alone(packing: Any, tmp_path: Path) -> None:
    compiled = quick(Plain, "weight_bits=5")
    path = tmp_path / "m.onnx"
    compiled.export(path, packing)
    found = {each.name: each for each in stored_weights(path)}
    for site in compiled.planned.weights:
        assert found[site.key].bits == compiled.plan.bits[site.key]
        assert found[site.key].shape == tuple(site.shape)
        assert found[site.key].bytes == pytest.approx(site.numel * found[site.key].bits / 8, abs=4)  # whole bytes
    listed = json.loads(run.invoke(cli.app, ["inspect", str(path), "--json"]).stdout)
    assert listed["metadata"]["hawqfx_packing"] == packing
    assert [each["name"] for each in listed["weights"]] == list(found)
    assert "conv2.weight" in run.invoke(cli.app, ["inspect", str(path)]).stdout


def test_inspect_reads_files_of_other_tools(tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(np.ones((6, 4), np.float32), "w")
    x, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, n]) for name, n in (("x", 6), ("y", 4))
    )
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    plain, integer = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), plain)
    (entry,) = stored_weights(plain)
    assert (entry.layer, entry.operator) == ("linear", "MatMul")
    assert (entry.bits, entry.bytes, entry.format) == (32, 96, "float32")
    quantize_dynamic(plain, integer, weight_type=QuantType.QInt8)
    (entry,) = stored_weights(integer)
    assert (entry.layer, entry.operator) == ("linear", "MatMulInteger")
    assert (entry.bits, entry.bytes, entry.format) == (8, 24, "int8")


@pytest.mark.parametrize("content", [b"", b"no model", bytes(range(256))])
def test_inspect_refuses_what_is_no_model(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=r"m\.onnx"):
        stored_weights(tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="cannot be read"):
        stored_weights(tmp_path / "nowhere.onnx")


def test_doctor_says_what_there_is() -> None:
    found = json.loads(run.invoke(cli.app, ["doctor", "--json"]).stdout)
    assert found["versions"]["hawqfx"] == hawqfx.__version__
    assert "CPUExecutionProvider" in found["onnxruntime providers"]
    assert found["free memory, MB"] > 0
    assert found["advice"]
    table = run.invoke(cli.app, ["doctor"]).stdout
    assert ", ".join(found["onnxruntime providers"]) in table
    assert "None" not in table


def test_explain_pareto_and_passes_speak_json(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    run.invoke(cli.app, call(tmp_path, "--budget", "weight_bits=5", "--plan", str(plan)))
    tree = json.loads(run.invoke(cli.app, ["explain", str(plan), "conv*", "--json"]).stdout)
    assert set(tree["sites"]) == {"conv1.weight", "conv2.weight"}
    words = ["pareto", f"{HERE}:model", "--data", f"{HERE}:loader", "--points", "3", "--evaluate", "1"]
    points = json.loads(
        run.invoke(cli.app, [*words, "--sensitivity", "mse", "--limit", "weight_bits", "--json"]).stdout
    )
    assert [point["limits"]["weight_bits"]["amount"] for point in points] == sorted(
        point["limits"]["weight_bits"]["amount"] for point in points
    )
    assert len(points) == 3
    assert "relu output" in points[0]["bits"]  # by the names of the summary
    assert re.fullmatch(r"weight_bits=\d(\.\d{1,3})?", points[1]["budget"])
    passes = json.loads(run.invoke(cli.app, ["passes", "--json"]).stdout)
    assert passes[0]["pass"] == "fold_constants"


def test_a_dry_run_measures_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "compile_model", lambda *_, **__: pytest.fail("it compiled"))
    result = run.invoke(cli.app, call(tmp_path, "--budget", "weight_bits=5", "--dry-run"))
    assert result.exit_code == 0, result.output
    assert "the bits of 3 weights and 4 activations for 'weight_bits=5'" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_forecast_counts_passes_by_the_metric() -> None:
    """Seconds are checked by benchmarks/forecast.py; here, that they grow with the samples and the metric's cost."""
    data = images()
    default = forecast(build(Plain), "weight_bits=5", data)
    assert (default.weights, default.activations, default.samples) == (3, 4, 32)
    assert default.metric == "gauss_newton"
    assert default.passes.startswith("128 backward passes")
    widths = forecast(build(Plain), "weight_bits=5", data, sensitivity="measured", weight_bits=(4, 5))
    assert widths.passes == "18 forward passes of each sample"  # 3 weights at 2 widths, 4 activations at 3
    exact = forecast(build(Plain), "weight_bits=5", data, sensitivity="hawq-v2", rounding="learned", refine=1)
    assert "Hessian-vector products" in exact.passes
    assert exact.more == ("learned rounding", "refinement")
    assert exact.bytes > 0
    with pytest.raises(HawqfxError, match="is not understood"):
        forecast(build(Plain), "nonsense", data)


@pytest.mark.parametrize(("count", "text"), [(12, "12 bytes"), (1234, "1.23 kB"), (1.2e6, "1.2 MB"), (3e9, "3 GB")])
def test_sizes_are_as_people_write_them(count: float, text: str) -> None:
    assert in_bytes(count) == text


def test_a_latency_at_a_shape_is_kept_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And refused without a traceback, in a dry run too, where the network has no such dimension."""
    monkeypatch.setenv("HAWQFX_CACHE", str(tmp_path / "timings"))
    monkeypatch.setattr(MicroTimer, "_time", lambda *_: 1e-4)  # the parts; the networks are run
    monkeypatch.setattr(profiler, "WHOLE_SECONDS", 0.005)
    result = run.invoke(cli.app, call(tmp_path, "--budget", "latency=10s@batch=3", "--no-check"))
    assert result.exit_code == 0, result.output
    assert "budget latency=10s@batch=3" in result.output
    assert "of 1e+04 ms at batch=3; " in result.output
    refused = run.invoke(cli.app, call(tmp_path, "--budget", "latency=10s@past=3", "--dry-run"))
    assert "past=3: of this network batch varies, and no 'past'" in str(refused.exception)
