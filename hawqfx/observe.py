"""Observers: write the graph after each pass, print it, time the passes, show progress."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hawqfx.contract import Observer, Pass
from hawqfx.program import Program
from hawqfx.study import Progress as Report


def graph_text(program: Program) -> str:
    """The graph, a node a line, with shapes where they are known and the chosen bits of sites."""
    lines = []
    for node in program.graph.graph.nodes:
        value = node.meta.get("val")
        shape = "" if not hasattr(value, "shape") else f"  # {list(value.shape)}"
        lines.append(f"{node.format_node()}{shape}")
    return "\n".join(line for line in lines if not line.startswith("None")) + "\n"


@dataclass(frozen=True)
class Dump(Observer):
    """Writes NN_pass.txt into a folder after each pass."""

    folder: Path

    def after(self, number: int, step: Pass, program: Program, seconds: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{number:02d}_{step.name}.txt").write_text(graph_text(program))


@dataclass(frozen=True)
class PrintAfter(Observer):
    """Prints the graph after the pass of this name."""

    name: str
    stream: TextIO = field(default_factory=lambda: sys.stderr)

    def after(self, number: int, step: Pass, program: Program, seconds: float) -> None:
        if step.name == self.name:
            self.stream.write(f"# after {step.name}\n{graph_text(program)}")


@dataclass(frozen=True)
class TimePasses(Observer):
    """Collects seconds per pass; `table()` shows them."""

    seconds: dict[str, float] = field(default_factory=dict)

    def after(self, number: int, step: Pass, program: Program, seconds: float) -> None:
        self.seconds[step.name] = self.seconds.get(step.name, 0.0) + seconds

    def table(self) -> Table:
        table = Table("pass", "seconds", title="time per pass")
        for name, seconds in self.seconds.items():
            table.add_row(name, f"{seconds:.2f}")
        return table


@contextmanager
def progress_bars(console: Console) -> Iterator[Report]:
    """Rich progress bars, one per label, for Study.progress; silent when `console` is not a terminal."""
    columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, int] = {}

        def report(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, total=total)  # type: ignore[arg-type]

        yield report
