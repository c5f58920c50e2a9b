"""Who may import whom, what passes promise, and what the law of the graph forbids."""

import ast
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from hawqfx.budget import Budget
from hawqfx.contract import Analysis, Kind, Observer, Pass, Rewrite
from hawqfx.errors import PassError
from hawqfx.facts import Bits, Cost, Fact, FactTable, Sensitivity
from hawqfx.passes.lowering import Lowering
from hawqfx.pipeline import METRICS, OPTIONAL, recipe
from hawqfx.program import Program, copy_graph
from hawqfx.runner import run
from hawqfx.study import Study
from hawqfx.verify import verify
from tests.nets import Plain
from tests.tools import after, captured, study

ROOT = Path(__file__).parent.parent

# module -> the modules of hawqfx that it may import; "maths" and "passes" stand for what is in those folders
LAW: dict[str, set[str]] = {
    "errors": set(),
    "maths": set(),
    "zoo": set(),
    "files": {"errors"},
    "facts": {"errors", "maths"},
    "ops": {"maths"},
    "target": {"errors", "maths"},
    "timetable": {"maths"},
    "program": {"facts", "maths", "timetable"},
    "integers": {"vocabulary"},
    "liveness": {"program", "vocabulary"},
    "limits": {"budget", "facts", "liveness", "maths", "program", "timetable"},
    "study": {"errors"},
    "budget": {"errors"},
    "vocabulary": set(),
    "quantized": {"facts", "maths", "ops", "program"},
    "writer": {"program"},
    "nonlinearity": {"maths", "vocabulary"},
    "contract": {"program", "facts", "study"},
    "derivatives": {"errors", "program", "study"},
    "shelf": {"errors", "files"},
    "workers": {"errors"},
    "heap": set(),
    "measure": {
        "contract", "derivatives", "errors", "facts", "maths", "heap", "program", "shelf", "study", "workers",
    },
    "verify": {"program", "errors"},
    "capture": {"program", "study", "errors", "vocabulary"},
    "passes": {
        "maths", "program", "facts", "study", "contract", "errors", "vocabulary", "ops", "budget", "quantized",
        "measure", "derivatives", "limits", "integers", "writer", "nonlinearity",
    },
    "runner": {"contract", "verify", "program", "errors", "facts", "study"},
    "observe": {"contract", "program", "study"},
    "pipeline": {"passes", "contract", "budget", "errors"},
    "plan": {"errors", "facts", "files", "maths", "program"},
    "frontier": {"facts"},
    "runtime": set(),
    "frozen": {"maths", "ops", "program", "vocabulary"},
    "export": {"capture", "errors", "files", "frozen", "maths", "ops", "program", "study"},
    "parity": {"export", "ops", "program", "runtime", "study", "vocabulary"},
    "latency": {
        "errors", "export", "facts", "files", "integers", "maths", "pipeline", "program", "runner", "runtime", "study",
        "timetable", "vocabulary",
    },
    "session": {
        "backends", "budget", "contract", "errors", "export", "facts", "frontier", "latency", "maths", "passes",
        "pipeline", "plan", "program", "runner", "study",
    },
    "compiler": {
        "budget", "capture", "contract", "errors", "frontier", "latency", "maths", "observe", "passes", "pipeline",
        "plan", "runner", "session", "study", "target", "timetable",
    },
    "backends": {"errors", "runtime", "study"},
    "benchmark": {"backends", "capture", "compiler", "plan", "study"},
    "demo": {"compiler", "observe", "runtime", "session", "zoo"},
    "cli": {
        "backends", "benchmark", "budget", "compiler", "contract", "demo", "errors", "files", "observe", "pipeline",
        "plan", "workers",
    },
    "__main__": {"cli"},
    "__init__": {"budget", "compiler", "frontier", "plan", "session"},
}  # fmt: skip

OWNERS = {"ortools": "hawqfx/maths/knapsack.py", "onnx": "hawqfx/export.py", "onnxruntime": "hawqfx/runtime.py"}
OWNERS |= {"onnx_ir": OWNERS["onnx"], "onnxscript": OWNERS["onnx"]}


def sources() -> list[Path]:
    folders = (ROOT / "hawqfx", ROOT / "hawqfx/maths", ROOT / "hawqfx/zoo", ROOT / "passes")
    return [path for folder in folders for path in sorted(folder.glob("*.py"))]


def imports(path: Path) -> set[str]:
    """Dotted names of modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(path: Path) -> str:
    if path.parent.name in ("maths", "zoo", "passes"):
        return path.parent.name
    return path.stem


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_import_law(path: Path) -> None:
    used = {name.split(".")[1] for name in imports(path) if name.startswith("hawqfx.")}
    used = {name for name in used if name in LAW}
    allowed = LAW[part(path)] | ({part(path)} if part(path) in ("maths", "zoo") else set())
    assert used <= allowed, f"{path.name} may not import {used - allowed}"
    if part(path) == "passes":
        assert not any(name.startswith("hawqfx.passes.") for name in imports(path)), "passes never import each other"


def test_each_backend_is_imported_in_one_file() -> None:
    for path in sources():
        for name in imports(path):
            owner = OWNERS.get(name.split(".")[0])
            assert owner is None or path == ROOT / owner, f"{path} imports {name}"


def test_importing_hawqfx_loads_no_backend() -> None:
    code = (
        "import hawqfx, sys; print(sorted({m.split('.')[0] for m in sys.modules} & {'ortools','onnx','onnxruntime'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


EVERY_PASS = {step.name: step for step in (*recipe(Budget()), *(make() for make in (*METRICS.values(), *OPTIONAL)))}


@pytest.mark.parametrize("step", EVERY_PASS.values(), ids=EVERY_PASS)
def test_every_pass_is_a_frozen_dataclass_named_as_its_file(step: Pass) -> None:
    assert is_dataclass(step)
    assert type(step).__dataclass_params__.frozen
    assert type(step).__module__ == f"hawqfx.passes.{step.name}"
    assert (ROOT / "passes" / f"{step.name}.py").exists()
    assert isinstance(step, Analysis) != isinstance(step, Rewrite)
    assert hash(step) == hash(replace(step))  # its fields are its options, and immutable
    assert all(field.init for field in fields(step))


def test_the_recipe_gives_what_it_needs_and_uses_every_pass_file() -> None:
    files = {path.stem for path in (ROOT / "passes").glob("*.py")} - {"__init__"}
    assert EVERY_PASS.keys() == files


class Liar(Analysis):
    """Promises what it does not give."""

    gives: ClassVar[tuple[Kind, ...]] = (Sensitivity,)

    def learn(self, program: Program, study: Study) -> Mapping[str, Fact]:
        return {}


class Meddler(Analysis):
    """An analysis that changes the graph."""

    def learn(self, program: Program, study: Study) -> Program:
        return replace(program, graph=copy_graph(program.graph))


@dataclass(frozen=True)
class Spoiler(Rewrite):
    """A rewrite that changes the function by a tenth of a percent."""

    tolerance: ClassVar[float] = 1e-4

    def rewrite(self, program: Program) -> Program:
        graph = copy_graph(program.graph)
        (output,) = graph.graph.find_nodes(op="output")
        result = output.args[0][0]
        with graph.graph.inserting_before(output):
            output.args = ((graph.graph.call_function(torch.ops.aten.mul.Scalar, (result, 1.001)),),)
        graph.recompile()
        return replace(program, graph=graph)


def test_the_runner_holds_passes_to_their_promises() -> None:
    program = after("find_sites", Plain)
    with pytest.raises(PassError, match=r"liar promised Sensitivity and gave none for conv1\.weight"):
        run([Liar()], program, study())
    with pytest.raises(PassError, match="meddler is an analysis and changed the graph"):
        run([Meddler()], program, study())
    with pytest.raises(PassError, match=r"spoiler changed output 0 by 1.0e-03, over its tolerance 1e-04") as caught:
        run([Spoiler()], program, study())
    assert (
        "in pass spoiler, after ['fold_constants', 'fold_batchnorm', 'decompose', 'equalize', 'borders', 'find_sites']"
        in caught.value.__notes__[0]
    )


def test_the_order_is_checked_before_anything_runs() -> None:
    seen: list[str] = []

    class Watch(Observer):
        def before(self, number: int, step: Pass, program: Program) -> None:
            seen.append(step.name)

    with pytest.raises(
        PassError, match="lowering needs Bits, Quantizers, Rounding, which no pass up to the program given"
    ):
        run([Lowering()], captured(Plain), study(), [Watch()])
    assert seen == []


def test_history_tells_what_ran() -> None:
    assert [step.name for step in after("calibration", Plain).history] == [
        "fold_constants",
        "fold_batchnorm",
        "decompose",
        "equalize",
        "borders",
        "find_sites",
        "calibration",
    ]


def test_the_law_of_the_graph() -> None:
    program = after("find_sites", Plain)

    def broken(change: Any) -> Program:
        graph = copy_graph(program.graph)
        change(graph.graph)
        return replace(program, graph=graph)

    def call_a_module(graph: torch.fx.Graph) -> None:
        with graph.inserting_before(next(iter(graph.find_nodes(op="output")))):
            graph.call_method("relu", (graph.find_nodes(op="placeholder")[0],))

    def call_a_lambda(graph: torch.fx.Graph) -> None:
        with graph.inserting_before(next(iter(graph.find_nodes(op="output")))):
            graph.call_function(print, ())

    with pytest.raises(PassError, match="only functions may be called"):
        verify(broken(call_a_module))
    with pytest.raises(PassError, match="which is no operator"):
        verify(broken(call_a_lambda))
    with pytest.raises(PassError, match="two sites have the same key"):
        verify(replace(program, sites=(*program.sites, program.sites[0])))
    with pytest.raises(PassError, match="not in the graph"):
        verify(replace(program, sites=(replace(program.activations[0], nodes=("missing",)),)))


def test_facts_are_typed_and_immutable() -> None:
    table = FactTable().with_facts({"a": Bits(4, 0.0)})
    more = table.with_facts({"a": Cost({4: 2})})
    assert (table.has("a", Cost), more.has("a", Cost), more.get("a", Bits).bits) == (False, True, 4)
    with pytest.raises(PassError, match="nothing is known about the Cost of 'b'"):
        more.get("b", Cost)
