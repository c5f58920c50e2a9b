"""The wheel: what is in it, and that it works where only it is."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = (
    "hawqfx/py.typed",
    "hawqfx/passes/rounding.py",
    "hawqfx/report/page.html",
    "hawqfx/report/vendor/vega.min.js",
    "hawqfx/zoo/FASHION_MNIST_LICENSE",
)
SMOKE = """
import hawqfx, pathlib, sys
assert pathlib.Path(hawqfx.__file__).is_relative_to(sys.argv[1]), hawqfx.__file__
from hawqfx import zoo
compiled = hawqfx.compile(zoo.resnet20(), "weight_bits=4", zoo.calibration()[0][0][:16], sensitivity="mse")
compiled.export(pathlib.Path(sys.argv[1]) / "model.onnx")
compiled.report(pathlib.Path(sys.argv[1]) / "report.html", points=2)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_has_all_and_only_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert set(NEEDED) <= set(names)
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "hawqfx").rglob("*.py") if "passes" not in path.parts}
    sources |= {f"hawqfx/passes/{path.name}" for path in (ROOT / "passes").glob("*.py")}
    assert sources <= set(names)
    assert {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")} == {"hawqfx"}
    assert wheel.stat().st_size < 4e6  # the network with its images 2.4 MB, the report's libraries .4


def test_what_is_imported_is_declared() -> None:
    """typer took click along, until one day it did not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for extra in ("hf", "notebook") for name in project["optional-dependencies"][extra]]
    declared = {re.split(r"[^\w-]", name)[0] for name in (*project["dependencies"], *extras)}
    imported = set()
    for path in [*(ROOT / "hawqfx").rglob("*.py"), *(ROOT / "passes").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names - {"hawqfx"} == declared


def test_import_loads_nothing_and_every_name_is_there() -> None:
    """torch alone takes seconds; a name is loaded when it is first used."""
    code = """
import hawqfx, sys
assert "torch" not in sys.modules
assert set(hawqfx.__all__) == set(hawqfx._MODULES) <= set(dir(hawqfx))
names = {name: getattr(hawqfx, name) for name in hawqfx.__all__}
assert all(value.__name__ == name and value.__module__.startswith("hawqfx.") for name, value in names.items())
assert "torch" in sys.modules and issubclass(hawqfx.errors.UsageError, hawqfx.errors.HawqfxError)
try:
    hawqfx.compiel
except AttributeError as error:
    assert "hawqfx" in str(error) and "compiel" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_compiles_where_it_is_installed_alone(wheel: Path, tmp_path: Path) -> None:
    """From a folder that holds nothing else of hawqfx, with the dependencies of this environment."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", SMOKE, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.onnx").stat().st_size > 100_000


def test_what_is_installed_has_hashes() -> None:
    """All that the tests install but torch; `make hashes` writes the file."""

    def pins(file: str) -> dict[str, str]:
        found = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / file).read_text(), re.MULTILINE)
        return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}

    hashed, known = pins("hashes.txt"), pins("constraints.txt")
    elsewhere = {"httpx2-jsfetch"}  # of WebAssembly alone
    assert {name: known.get(name) for name in hashed if name not in elsewhere} == {
        name: version for name, version in hashed.items() if name not in elsewhere
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    named = {re.sub(r"[-_.]+", "-", re.split(r"[^\w-]", name)[0]).lower() for name in wanted}
    assert named - set(hashed) == {"torch"}
    parts = re.split(r"^(?=\S)", (ROOT / "hashes.txt").read_text(), flags=re.MULTILINE)
    assert all("--hash=sha256:" in part for part in parts if "==" in part)
