"""The command line does what compile() does."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hawqfx import cli
from hawqfx.commands import compiling
from hawqfx.errors import HawqfxError
from hawqfx.pass_manager.base import options_of
from hawqfx.pipeline import every_pass, recipe
from hawqfx.session.plan import Plan
from tests.nets import Plain, build, images

ROOT = Path(__file__).parent.parent
run = CliRunner()


def model() -> object:
    return build(Plain)


def loader() -> object:
    return images()


def arguments(folder: Path, *more: str) -> list[str]:
    here = "tests.test_cli"
    out = str(folder / "model.onnx")
    return [
        "compile",
        f"{here}:model",
        "--budget",
        "weight_bits=6",
        "--data",
        f"{here}:loader",
        "--out",
        out,
        "--probes",
        "2",
        *more,
    ]


def test_compile_writes_the_file_the_plan_and_the_dump(tmp_path: Path) -> None:
    plan, dump = tmp_path / "plan.json", tmp_path / "dump"
    result = run.invoke(cli.app, arguments(tmp_path, "--plan", str(plan), "--dump", str(dump), "--time-passes"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "model.onnx").stat().st_size > 1000
    assert set(Plan.read(plan).bits) == {"conv1.weight", "conv2.weight", "head.weight", "x", "relu", "relu_1", "mean"}
    steps = (f"{number:02}_{step.name}.txt" for number, step in enumerate(recipe().passes, 1))
    assert sorted(path.name for path in dump.iterdir()) == list(steps)
    assert "conv1.weight" in result.output
    assert "time per pass" in result.output


def test_a_metric_is_chosen_by_name_and_its_measurements_are_kept(tmp_path: Path) -> None:
    options = ("--sensitivity", "fisher", "--cache", str(tmp_path / "cache"), "--samples", "20", "--batch", "8")
    result = run.invoke(cli.app, arguments(tmp_path, *options))
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "cache").glob("*/batch-*.json"))) == 3  # 16 + 4 samples in parts of 8
    refused = run.invoke(cli.app, arguments(tmp_path, "--sensitivity", "mse"))
    assert "--probes: the metric mse draws none" in str(refused.exception)


def test_torchrun_writes_one_file_and_speaks_with_one_voice(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "hawqfx"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, *arguments(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.onnx").stat().st_size > 1000
    assert done.stdout.count("calibrated on") == 1


def test_print_after_names_a_pass(tmp_path: Path) -> None:
    result = run.invoke(cli.app, arguments(tmp_path, "--print-after", "nonsense"))
    assert isinstance(result.exception, HawqfxError)
    passes = "fold_constants, fold_batchnorm, float_reference, decompose, equalize, normalize_tables, insert_copies"
    assert passes in str(result.exception)


def test_errors_are_one_line_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["hawqfx", *arguments(tmp_path, "--keep-float", "*")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert "hawqfx: the graph has no convolution or linear layer" in error
    assert "Traceback" not in error
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("spec", ["tests.test_cli", "no_such_module:f", "tests.test_cli:missing"])
def test_a_factory_that_cannot_be_loaded(tmp_path: Path, spec: str) -> None:
    wrong = arguments(tmp_path)
    wrong[1] = spec
    assert isinstance(run.invoke(cli.app, wrong).exception, HawqfxError)


def test_passes_lists_the_recipe_in_order() -> None:
    output = run.invoke(cli.app, ["passes"]).output
    names = [
        "fold_constants",
        "fold_batchnorm",
        "float_reference",
        "decompose",
        "equalize",
        "normalize_tables",
        "insert_copies",
        "smoothing",
        "smooth_inputs",
        "find_sites",
        "histograms",
        "calibration",
        "rounding",
        "perturbation",
        "cost",
        "gauss_newton",
        "allocation",
        "sequential_rounding",
        "lowering",
        "integer_constants",
        "linear_kernels",
        "space_to_depth",
        "signed_factors",
        "float_weights",
        "global_average",
        "table_rows",
    ]
    names += ["hawq_v2", "fisher", "taylor", "measured", "mse", "hawq_v1", "interactions", "at_plan", "bias_correction"]
    names += ["learned_rounding"]
    names += ["weigh_file", "profile_latency"]
    assert re.findall(r"(\w+) +│ (?:analysis|rewrite)", output) == names
    steps = every_pass()
    undocumented = [(step.name, entry.name) for step in steps for entry in options_of(step) if not entry.metadata]
    assert undocumented == []


def none() -> None: ...


def boom() -> None:
    raise ValueError("the checkpoint is gone")


NUMBER = 3


COMPILE = "compile HERE:model --data HERE:loader --out m.onnx --budget size=90%"
REFUSED = {  # before anything is measured
    "compile HERE:NUMBER --data HERE:loader --out m.onnx": "is 3: name a function that returns",
    "compile nowhere:f --data HERE:loader --out m.onnx": "'nowhere:f' cannot be loaded: ModuleNotFoundError",
    "compile nowhere.py:f --data HERE:loader --out m.onnx": "nowhere.py is no file",
    "compile HERE:nothing --data HERE:loader --out m.onnx": "tests.test_cli has no 'nothing'",
    "compile HERE --data HERE:loader --out m.onnx": "write it as pkg.module:function",
    "compile hf:nowhere --data HERE:loader --out m.onnx": "there is no config.json in this folder",
    "compile HERE:boom --budget size=90% --data HERE:loader --out no/m.onnx": "the folder no does not exist",
    "compile HERE:model --budget size=90% --data HERE:loader --out /proc/m.onnx": "written in the folder /proc",
    "compile HERE:model --data HERE:loader --out m.onnx": "give a budget, such as 'size=12.5%', or a plan",
    "compile HERE:model --data HERE:loader --out m.onnx --budget sze=3%": "'sze=3%' is not understood",
    "compile HERE:model --data HERE:loader --out m.onnx --budget drop=1%": "a budget on drop needs metric=",
    "compile HERE:model --data HERE:loader --out m.onnx --budget latency=1s@length=3": "and no 'length'",
    "compile HERE:model --data HERE:loader": "Missing option '--out'",
    f"{COMPILE} --plan no/p": "the folder no does not",
    f"{COMPILE} --save no/p": "the folder no does not",
    f"{COMPILE} --report no/p": "the folder no does not",
    f"{COMPILE} --from-plan nope.json": "file 'nope.json' does not exist",
    f"{COMPILE} --reround": "reround=True takes the bits of a plan",
    f"{COMPILE} --weights nope.safetensors": "file 'nope.safetensors' does not exist",
    f"{COMPILE} --packing foo": "portable, native",
    f"{COMPILE} --loss HERE:nothing": "tests.test_cli has no 'nothing'",
    f"{COMPILE} --loss HERE:NUMBER": "loss=3: must be a function",
    f"{COMPILE} --draw HERE:NUMBER": "draw=3: must be a function",
    f"{COMPILE} --metric HERE:NUMBER": "metric=3: must be a function",
    f"{COMPILE} --holdout HERE:loader": "holdout= is data that metric= is validated on",
    f"{COMPILE} --sensitivity foo": "sensitivity='foo': must be one of",
    f"{COMPILE} --sensitivity mse --probes 4": "the metric mse draws none",
    f"{COMPILE} --probes 1": "Invalid value for '--probes'",
    f"{COMPILE} --weight-bits 9": "bit widths must be from 2 to 8",
    f"{COMPILE} --weight-bits two": "write widths as 2,3,4 or 2-8",
    f"{COMPILE} --activation-bits 1-3": "bit widths must be from 2 to 8",
    f"{COMPILE} --schemes foo": "must be some of static, dynamic, weight-only",
    f"{COMPILE} --block-sizes 7": "must be some of 32, 64, 128",
    f"{COMPILE} --rounding foo": "rounding='foo': must be",
    f"{COMPILE} --keep-float foo*": "keep_float 'foo*': no weight has such a name",
    f"{COMPILE} --fix foo": "write it as PATTERN=BITS",
    f"{COMPILE} --fix foo*=8": "fix 'foo*': no site has such a name",
    f"{COMPILE} --fix head*=9": "bits are from 2 to 8",
    f"{COMPILE} --rule foo": "rule='foo': must be",
    f"{COMPILE} --rule hawq-v2 --sensitivity mse": "by the trace, which mse does not measure: take",
    "compile HERE:model --data HERE:loader --out m.onnx --budget latency=1s --refine 1": "refine=1: plans for",
    f"{COMPILE} --refine -1": "Invalid value for '--refine'",
    f"{COMPILE} --tokens foo": 'must be "causal"',
    f"{COMPILE} --dynamic foo": "write it as INPUT:AXIS=NAME",
    f"{COMPILE} --samples 0": "Invalid value for '--samples'",
    f"{COMPILE} --batch 0": "Invalid value for '--batch'",
    f"{COMPILE} --cache /proc/none": "the cache /proc/none cannot be used: nothing can be written in the folder /proc",
    f"{COMPILE} --device tpu": "device='tpu' cannot be used",
    f"{COMPILE} --target foo": "target='foo': must be one of any, x86-avx2",
    f"{COMPILE} --threads 0": "Invalid value for '--threads'",
    f"{COMPILE} --seed x": "Invalid value for '--seed'",
    f"{COMPILE} --dump /dev/null/x": "folder /dev/null/x cannot",
    f"{COMPILE} --print-after foo": "the passes are fold_constants",
    f"{COMPILE} --nonsense": "No such option: --nonsense",
    "--config nope.toml passes": "file 'nope.toml' does not exist",
    "pareto HERE:model --data HERE:loader --limit foo": "limit='foo': a frontier goes along",
    "pareto HERE:model --data HERE:loader --cache /proc/none": "the cache /proc/none cannot be used",
    "bench nope.onnx": "file 'nope.onnx' does not exist",
    "bench FILE --backend foo": "backend 'foo': must be one of",
    "bench FILE --out no/x.json": "the folder no does not exist",
    "explain nope.json": "file 'nope.json' does not exist",
    "report nope.hawqfx HERE:model": "file 'nope.hawqfx' does not exist",
    "report FILE HERE:model --out no/r.html": "the folder no does not exist",
    "inspect nope.onnx": "file 'nope.onnx' does not exist",
    "demo --budget foo": "'foo' is not understood",
    "demo --out /dev/null/x": "folder /dev/null/x cannot",
    "nonsense": "No such command 'nonsense'",
}
FAILED = {
    "compile HERE:none --budget size=90% --data HERE:loader --out m.onnx": "returned None",
    "compile HERE:boom --budget size=90% --data HERE:loader --out m.onnx": "ValueError: the checkpoint is gone",
    f"{COMPILE} --weights FILE": "the checkpoint file cannot be read",
    f"{COMPILE} --keep-float *": "the graph has no convolution or linear layer",
    f"{COMPILE} --loss HERE:boom": "loss= raised TypeError",
    "compile HERE:model --data HERE:loader --out m.onnx --from-plan FILE": "this is no plan",
    "bench FILE": "file cannot be loaded by onnxruntime",
    "explain FILE": "this is no plan",
    "report FILE HERE:model": "or is no file of Compiled.save()",
    "inspect FILE": "file cannot be read as an ONNX model",
}


@pytest.mark.parametrize(
    ("command", "message", "code"),
    [*((*item, 2) for item in REFUSED.items()), *((*item, 1) for item in FAILED.items())],
)
def test_what_is_wrong_is_said_before_anything_is_measured(
    command: str,
    message: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("it is being measured")

    monkeypatch.setattr("hawqfx.passes.histograms.Histograms.learn", forbidden)
    monkeypatch.setenv("COLUMNS", "200")  # typer wraps its messages
    monkeypatch.chdir(tmp_path)
    Path("file").write_bytes(b"no model")
    words = command.replace("HERE", "tests.test_cli").replace("FILE", "file").split()
    monkeypatch.setattr("sys.argv", ["hawqfx", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    error = capsys.readouterr().err
    assert message in error
    assert "in pass" not in error or code == 1
    assert caught.value.code == code
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_exit_codes_tell_a_budget_that_cannot_be_met_and_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(tmp_path)
    words[words.index("weight_bits=6")] = "weight_bits=1"
    monkeypatch.setattr("sys.argv", ["hawqfx", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 3
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("hawqfx: weight_bits=1 cannot be met")

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compiling, "compile_model", lambda *_, **__: interrupted())
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 130
    assert "interrupted; with --cache FOLDER the same command goes on where it was" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_report_writes_the_page_of_a_saved_network(tmp_path: Path) -> None:
    saved, out, whole = tmp_path / "net.hawqfx", tmp_path / "report.html", tmp_path / "whole.html"
    assert run.invoke(cli.app, arguments(tmp_path, "--save", str(saved), "--report", str(whole))).exit_code == 0
    result = run.invoke(cli.app, ["report", str(saved), "tests.test_cli:model", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert f"{out.stat().st_size:,} bytes" in result.output.replace("\n", "")
    assert "conv1.weight" in out.read_text(encoding="utf-8")
    without = "No other plans are known"  # the frontier
    assert without in out.read_text(encoding="utf-8")
    assert without not in whole.read_text(encoding="utf-8")
    with pytest.raises(HawqfxError, match="does not exist"):
        run.invoke(
            cli.app,
            ["report", str(saved), "tests.test_cli:model", "--out", str(tmp_path / "none" / "a.html")],
            catch_exceptions=False,
        )


SLOW = """
import sys, time
from hawqfx import cli, zoo

def make():
    return zoo.resnet20()

def data():
    print("measuring", flush=True)
    return zoo.calibration()
"""


def test_an_interrupt_leaves_nothing_and_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    words = ["compile", "slow.py:make", "--budget", "weight_bits=4", "--data", "slow.py:data", "--out", "m.onnx"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "hawqfx", *words], cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "measuring\n"
    time.sleep(2)  # into the passes, which take ten seconds
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    # Python ends by the signal itself where it came within an exec(); to a shell that is 130, too
    assert process.returncode in (130, -signal.SIGINT), error
    assert "interrupted; with --cache FOLDER the same command goes on where it was" in error
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".onnx" or path.name.startswith("tmp")] == []
