"""Which folder may import which, which file alone knows a backend, and that the imports have no circle."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).parent.parent

# folder (or single file) of hawqfx -> what it may import besides itself, in the order of the data
LAW: dict[str, set[str]] = {
    "errors": set(),
    "maths": set(),
    "zoo": set(),
    "atomic_write": {"errors"},
    "ir": {"errors", "maths"},
    "frontend": {"errors", "ir", "maths"},
    "arguments": {"atomic_write", "errors", "maths"},
    "analysis": {"errors", "frontend", "ir", "maths"},
    "pass_manager": {"errors", "frontend", "ir"},
    "sensitivity": {"atomic_write", "errors", "frontend", "ir", "maths", "pass_manager"},
    "learning": {"analysis", "atomic_write", "errors", "frontend", "ir", "maths", "sensitivity"},
    "allocation": {"analysis", "errors", "ir", "maths"},
    "passes": {
        "allocation", "analysis", "errors", "frontend", "ir", "learning", "maths", "pass_manager", "sensitivity",
    },
    "export": {"atomic_write", "errors", "frontend", "ir", "maths", "pass_manager", "passes"},
    "runtime": {"atomic_write", "errors", "export", "frontend", "ir", "maths"},
    "latency": {
        "analysis", "atomic_write", "errors", "export", "frontend", "ir", "maths", "pass_manager", "passes",
        "runtime",
    },
    "pipeline": {
        "allocation", "errors", "export", "frontend", "ir", "latency", "maths", "pass_manager", "passes", "sensitivity",
    },
    "report": {"analysis", "errors", "frontend", "ir", "maths"},
    "session": {
        "allocation", "analysis", "arguments", "atomic_write", "errors", "export", "frontend", "ir", "latency", "maths",
        "pass_manager", "passes", "pipeline", "report", "runtime",
    },
    "options": {
        "allocation", "arguments", "errors", "export", "frontend", "ir", "maths", "pass_manager", "passes", "pipeline",
        "session",
    },
    "compiler": {
        "allocation", "errors", "frontend", "ir", "latency", "maths", "options", "pass_manager", "passes", "pipeline",
        "runtime", "session",
    },
    "benchmark": {"compiler", "errors", "frontend", "runtime", "session"},
    "demo": {"allocation", "compiler", "pass_manager", "runtime", "session", "zoo"},
    "forecast": {
        "allocation", "analysis", "compiler", "errors", "frontend", "ir", "learning", "maths", "options",
        "pass_manager", "passes", "sensitivity",
    },
    "commands": {
        "allocation", "atomic_write", "benchmark", "compiler", "demo", "errors", "export", "forecast", "frontend", "ir",
        "options", "pass_manager", "pipeline", "runtime", "sensitivity", "session",
    },
    "cli": {"commands", "errors"},
    "__main__": {"cli"},
    "__init__": {"allocation", "compiler", "errors", "session"},
}  # fmt: skip

# library -> the folder or file that alone imports it
OWNERS = {
    "ortools": "hawqfx/allocation/solver",
    "onnx": "hawqfx/export",
    "onnx_ir": "hawqfx/export",
    "onnxscript": "hawqfx/export",
    "onnxruntime": "hawqfx/runtime/ort.py",
}


def sources() -> list[Path]:
    """Every source file, passes/ under its own name and not again behind the symlink."""
    inside = [path for path in (ROOT / "hawqfx").rglob("*.py") if "passes" not in path.relative_to(ROOT).parts]
    return sorted([*inside, *(ROOT / "passes").glob("*.py")])


def module(path: Path) -> str:
    """The dotted name of a file below hawqfx."""
    name = path.relative_to(ROOT).with_suffix("").as_posix().removeprefix("hawqfx/")
    return name.removesuffix("/__init__").replace("/", ".")


def for_annotations_alone(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


@cache
def imports(path: Path, annotations: bool = True) -> frozenset[str]:
    """Dotted names that a file imports, wherever in the file; with or without those for annotations alone."""
    tree, found = ast.parse(path.read_text()), set()
    unrun = {inner for node in ast.walk(tree) if for_annotations_alone(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if node in unrun and not annotations:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def arrows() -> "networkx.DiGraph[str]":
    """An arrow from every file to each file of hawqfx that it imports when it runs."""
    files = {module(path) for path in sources()}
    graph: networkx.DiGraph[str] = networkx.DiGraph()
    graph.add_nodes_from(files)
    for path in sources():
        for name in imports(path, annotations=False):
            inside = name.removeprefix("hawqfx.").split(".")
            if name.startswith("hawqfx."):
                ends = (".".join(inside[:length]) for length in range(len(inside), 0, -1))
                target = next((end for end in ends if end in files), None)
                if target is not None and target != module(path):
                    graph.add_edge(module(path), target)
    return graph


def room(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("path", sources(), ids=lambda path: module(path))
def test_the_import_law(path: Path) -> None:
    here = room(module(path))
    used = {room(name.removeprefix("hawqfx.")) for name in imports(path) if name.startswith("hawqfx.")} & LAW.keys()
    if here == "passes":
        assert not any(name.startswith("hawqfx.passes.") for name in imports(path)), "passes never import each other"
    assert used <= LAW[here] | {here}, f"{path.name} may not import {used - LAW[here]}"


def test_the_law_itself_has_no_circle() -> None:
    law = networkx.DiGraph([(one, other) for one, others in LAW.items() for other in others])
    assert networkx.is_directed_acyclic_graph(law)


def test_imports_have_no_circle() -> None:
    """Between files; counts arrows and rooms, which `pytest -rP -k circle` shows."""
    graph = arrows()
    rooms = {(room(one), room(other)) for one, other in graph.edges if room(one) != room(other)}
    print(f"{graph.number_of_nodes()} files, {graph.number_of_edges()} arrows; {len(LAW)} rooms, {len(rooms)} arrows")
    circles = [part for part in networkx.strongly_connected_components(graph) if len(part) > 1]
    assert circles == []


def test_each_backend_is_imported_in_one_place() -> None:
    for path in sources():
        for name in imports(path):
            owner = OWNERS.get(name.split(".")[0])
            assert owner is None or (ROOT / owner) in (path, *path.parents), f"{path} imports {name}"


def test_values_never_change() -> None:
    """Every dataclass is frozen, so that facts, options and plans may be shared; but those that gather as they go."""
    gather = {"SearchSpace", "TimingCache", "_BlockwiseWeights", "_Search", "_SubgraphModels", "MicroTimer"}
    found = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                ways = {way for way in map(ast.unparse, node.decorator_list) if way.startswith("dataclass")}
                found |= {node.name} if ways and not any("frozen=True" in way for way in ways) else set()
    assert found == gather


def test_nothing_is_unpickled() -> None:
    """A pickle runs what its author likes: files are JSON, safetensors and ONNX, and checkpoints tensors alone."""
    loaders = ("pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle")
    others = [path for folder in ("benchmarks", "examples", "tests/fuzz") for path in (ROOT / folder).rglob("*.py")]
    assert ROOT / "benchmarks" / "others" / "exchange.py" in others
    for path in [*sources(), *others]:
        assert not {name.split(".")[0] for name in imports(path)} & set(loaders), path
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called, given = ast.unparse(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords}
            assert called != "torch.load" or given.get("weights_only") == "True", f"{path}: {ast.unparse(node)}"
            assert called != "np.load" or given.get("allow_pickle", "False") == "False", f"{path}: {ast.unparse(node)}"


def test_compile_loads_little_besides_torch() -> None:
    """No backend, and nothing that one step needs alone: networkx, rich, psutil and the like wait until they are used.
    Names and not seconds, which depend on the machine."""
    code = """
import sys, torch
def libraries():
    return {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names
known = libraries()
import hawqfx
hawqfx.compile
print(*libraries() - known)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"hawqfx", "safetensors"}


def test_every_folder_is_packaged() -> None:
    listed = (ROOT / "pyproject.toml").read_text()
    for path in sources():
        if path.name == "__init__.py":
            name = ".".join(filter(None, ("hawqfx", module(path).removeprefix("__init__"))))
            assert f'"{name}"' in listed, f"{name} is missing in [tool.setuptools] packages"
