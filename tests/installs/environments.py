"""The release in an empty environment: from the wheel and from the sdist, with the lowest versions that pyproject.toml
allows and with the newest.  `make install-test` runs this, for it installs packages of hundreds of MB.

torch is the build that constraints.txt pins, in all of them: the newest brings CUDA along on Linux.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
SMOKE = """
import hawqfx
from hawqfx import zoo
compiled = hawqfx.compile(zoo.resnet20(), "size=14%", zoo.calibration()[0][0][:16], sensitivity="mse")
compiled.export("model.onnx")
compiled.save("net.hawqfx")
compiled.report("report.html", points=2)
"""


UV = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
pytestmark = pytest.mark.skipif(UV is None, reason="there is no uv: pip install uv")


def run(*command: object, folder: Path = ROOT) -> str:
    """The output of a command that runs in a folder; an AssertionError with all that it said, if it fails."""
    done = subprocess.run(list(map(str, command)), cwd=folder, env=CLEAN, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("built")
    run(UV, "build", "--quiet", "--out-dir", folder, ROOT)
    return folder


def lowest() -> str:
    """Constraints: the lowest release of every direct dependency that its bound allows, with torch's own bound."""
    options = ("--quiet", "--resolution", "lowest-direct", "--no-deps", "--no-header", "--no-annotate")
    found = run(UV, "pip", "compile", *options, ROOT / "pyproject.toml")
    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert len(found.splitlines()) == len(bounds)
    return found


@pytest.mark.parametrize("versions", ["lowest", "newest"])
@pytest.mark.parametrize("kind", ["whl", "tar.gz"])
def test_it_compiles_in_an_empty_environment(built: Path, tmp_path: Path, kind: str, versions: str) -> None:
    (release,) = built.glob(f"*.{kind}")
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    binaries = tmp_path / "venv" / "bin"
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(lowest() if versions == "lowest" else TORCH)
    run(binaries / "python", "-m", "pip", "install", "--quiet", "--constraint", constraints, release)
    print(run(binaries / "python", "-m", "pip", "freeze"))
    run(binaries / "python", "-c", SMOKE, folder=tmp_path)
    assert "relu output" in run(binaries / "hawqfx", "explain", "net.hawqfx", "relu output", folder=tmp_path)
    assert "stem.0.weight" in run(binaries / "hawqfx", "inspect", "model.onnx", folder=tmp_path)
    assert "onnxruntime" in run(binaries / "hawqfx", "doctor", folder=tmp_path)
