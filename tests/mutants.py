"""Changes one thing in the sources, at random, and looks whether a test fails; `make mutants`.

    python tests/mutants.py [--count N] [--seed S] [--only FOLDER] [--python PYTHON]

The changes are those of Cosmic Ray, which alone need an environment of its own; PYTHON runs the tests.  Of all mutants
of a folder N are drawn, so that the part that is caught estimates that of all, and each is tried in a copy of the
checkout against the tests of that folder, quick ones first, until one fails.  A test that takes three times as long as
it should counts as failed.  mutmut is not used: it wraps every function, and torch reads the signatures and the source
of those that it traces; and it needs one run of all tests before the first mutant.

Not drawn are changes of annotations, which no test sees, and removed decorators, without which hardly a file imports:
the one would make the part smaller than it is, the other larger.
"""

import argparse
import ast
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome

ROOT = Path(__file__).resolve().parent.parent
GOAL = 0.9  # of the mutants are caught
SLACK = 60.0  # seconds, beside three times those of the tests as they are


@dataclass(frozen=True)
class Folder:
    """What is changed, and by which tests that should be seen.

    Args:
        sources: patterns of files.
        tests: files and single tests, quick ones first.
    """

    sources: tuple[str, ...]
    tests: tuple[str, ...]


FROZEN = "tests/test_import_law.py::test_values_never_change"
FOLDERS = {
    "maths": Folder(
        ("hawqfx/maths/*.py",),
        ("tests/maths", FROZEN, "tests/passes/test_quantizers.py", "tests/latency/test_scaling.py"),
    ),
    "allocation": Folder(
        ("hawqfx/allocation/**/*.py",),
        (FROZEN, "tests/allocation", "tests/passes/test_allocation.py", "tests/passes/test_interactions.py"),
    ),
    "lowering": Folder(
        (
            "passes/lowering.py",
            "passes/insert_copies.py",
            "passes/smooth_inputs.py",
            "hawqfx/analysis/partition.py",
            "hawqfx/ir/quantizers.py",
        ),
        (
            FROZEN,
            "tests/passes/test_smoothing.py",
            "tests/analysis/test_partition.py",
            "tests/passes/test_lowering.py",
            "tests/passes/test_quantizers.py",
            "tests/test_schemes.py::test_weights_in_blocks_alone_have_no_other_formats",
            "tests/passes/test_metrics.py",
        ),
    ),
    "export": Folder(
        ("hawqfx/export/**/*.py",),
        (
            FROZEN,
            "tests/export/test_translations.py",
            "tests/export/test_legalize.py",
            "tests/latency/test_profiler.py",
            "tests/commands/test_commands.py::test_inspect_tells_bits_and_bytes_from_the_file_alone",
            "tests/commands/test_commands.py::test_inspect_reads_files_of_other_tools",
            "tests/export/test_exporter.py",
            "tests/export/test_file_size.py::test_the_file_keeps_the_budget_and_the_promise",
            "tests/test_schemes.py",
        ),
    ),
}


def _annotations(path: Path) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the annotations of a file begin and end, as lines from 1 and columns from 0."""
    for node in ast.walk(ast.parse(path.read_text())):
        for name in ("annotation", "returns"):
            part = getattr(node, name, None)
            if isinstance(part, ast.expr) and part.end_lineno is not None and part.end_col_offset is not None:
                yield (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)


def mutants(sources: tuple[str, ...]) -> list[MutationSpec]:
    """All mutants of the files that the patterns find below the current folder, in a fixed order."""
    paths = sorted({path for pattern in sources for path in Path().glob(pattern)})
    spans = {path: list(_annotations(path)) for path in paths}
    with use_db(":memory:", WorkDB.Mode.create) as database:
        init(paths, database, {})
        every = [mutation for item in database.work_items for mutation in item.mutations]
    seen = [
        each
        for each in every
        if not each.operator_name.endswith("/RemoveDecorator")
        and not any(start <= each.start_pos < end for start, end in spans[each.module_path])
    ]
    return sorted(seen, key=lambda each: (str(each.module_path), each.operator_name, each.occurrence))


def caught(name: str, folder: Folder, count: int, seed: int, python: str) -> tuple[int, int, int]:
    """Try mutants of one folder, and print those that no test caught.

    Returns:
        Mutants that there are, that were tried, that a test caught.

    Raises:
        SystemExit: the tests fail without a change.
    """
    command = [python, "-m", "pytest", "--exitfirst", "-p", "no:cacheprovider", *folder.tests]
    start = time.perf_counter()
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(f"the tests of {name} fail without a change: {shlex.join(command)}")
    seconds = time.perf_counter() - start
    every = mutants(folder.sources)
    drawn = random.Random(f"{seed} {name}").sample(every, min(count, len(every)))
    print(f"{name}: {len(drawn)} of {len(every)} mutants; the tests take {seconds:.0f} s", flush=True)
    found = 0
    for number, mutation in enumerate(drawn, 1):
        start = time.perf_counter()
        result = mutate_and_test([mutation], shlex.join(command), 3 * seconds + SLACK)
        if result.test_outcome is TestOutcome.INCOMPETENT or result.test_outcome is None:
            raise SystemExit(f"{mutation}: {result.output}")
        killed = result.test_outcome is TestOutcome.KILLED
        found += killed
        place = f"{mutation.module_path}:{mutation.start_pos[0]} {mutation.operator_name.removeprefix('core/')}"
        print(
            f"{number} {'caught' if killed else 'SURVIVED'} {place} {time.perf_counter() - start:.0f} s",
            *([] if killed else [result.diff]),
            sep="\n",
            flush=True,
        )
    return len(every), len(drawn), found


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=30, help="mutants of each folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(FOLDERS), action="append", help="these folders alone")
    parser.add_argument("--python", default=str(ROOT / ".venv/bin/python"), help="runs the tests")
    args = parser.parse_args(words)
    python = os.path.abspath(args.python)
    totals = {}
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "hawqfx"
        ignored = shutil.ignore_patterns(".*", "build", "dist", "site", "demo", "__pycache__")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
        os.chdir(copy)
        os.environ |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        for name in args.only or FOLDERS:
            totals[name] = caught(name, FOLDERS[name], args.count, args.seed, python)
        os.chdir(ROOT)
    for name, (every, tried, found) in totals.items():
        print(f"{name}: {found} of {tried} caught, drawn from {every}; seed {args.seed}")
    return int(any(found < GOAL * tried for _, tried, found in totals.values()))


if __name__ == "__main__":
    sys.exit(main())
