"""What every benchmark shares: its arguments, the machine it ran on, claims that can fail, and the JSON it writes."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "onnx", "onnxruntime", "ortools", "numpy")

console = Console(width=120)


def arguments(doc: str) -> argparse.Namespace:
    return parser(doc).parse_args()


def parser(doc: str) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a reduced run of a minute or two; writes no results")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a claim does not hold")
    return parser


def environment() -> dict[str, Any]:
    """The machine and the versions, as far as they bear on figures."""
    from hawqfx.runtime.processor import has_vnni  # compile_time.py measures releases that have it elsewhere

    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vnni": has_vnni(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def each_network(
    benchmark: str, names: Sequence[str], examine: Callable[[str], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What was found on networks, by name, with those of earlier runs; written after each, so that a run may be stopped
    and gone on with --only."""
    path = RESULTS / f"{benchmark}.json"
    results: dict[str, dict[str, Any]] = json.loads(path.read_text())["networks"] if path.exists() else {}
    for name in names:
        results[name] = examine(name) | {"environment": environment()}
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps({"networks": results}, indent=1) + "\n")
    return results


@dataclass
class Claims:
    """What the benchmark sets out to show, and whether this run bears it out."""

    found: list[dict[str, Any]] = field(default_factory=list)

    def add(self, claim: str, holds: bool, measured: str) -> None:
        self.found.append({"claim": claim, "holds": bool(holds), "measured": measured})

    def finish(self, name: str, args: argparse.Namespace, results: dict[str, Any]) -> None:
        """Print the claims, write the results, and exit with 1 under --check if one does not hold."""
        for claim in self.found:
            colour = "green" if claim["holds"] else "red"
            console.print(
                f"[{colour}]{'holds' if claim['holds'] else 'FAILS'}[/]  {claim['claim']}: {claim['measured']}"
            )
        if not args.quick:
            RESULTS.mkdir(exist_ok=True)
            content = {"environment": environment(), "claims": self.found, **results}
            (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        if args.check and not all(claim["holds"] for claim in self.found):
            sys.exit(1)
