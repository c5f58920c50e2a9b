"""Observers that write the graph after every pass, print it or time the passes; and progress bars."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch
from torch import fx

from hawqfx.errors import ExportError
from hawqfx.frontend.context import Progress as Report
from hawqfx.ir.program import Program
from hawqfx.pass_manager.base import Observer, Pass

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def graph_text(program: Program) -> str:
    """The graph as text: a line for every node, with the shape where it is known; N is the batch."""
    return "".join(f"{_node_text(node)}\n" for node in program.graph.graph.nodes)


def _node_text(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {node.args[0]}"
    expression = str(node.target).removesuffix(".default")
    if node.op == "call_function":
        arguments = [*map(str, node.args), *(f"{name}={value}" for name, value in node.kwargs.items())]
        expression = f"{expression}({', '.join(arguments)})"
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return f"{node.name} = {expression}"
    shape = ", ".join(str(size) if isinstance(size, int) else "N" for size in value.shape)
    return f"{node.name} = {expression}  # [{shape}]"


@dataclass(frozen=True)
class Dump(Observer):
    """Writes the graph after every pass into a file NUMBER_PASS.txt.

    Args:
        folder: of the files; it is made if it does not exist.

    Raises:
        ExportError: from `after`, if a file cannot be written.
    """

    folder: Path

    def after(self, number: int, step: Pass, program: Program, seconds: float) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{number:02d}_{step.name}.txt").write_text(graph_text(program))
        except OSError as error:
            raise ExportError(f"the graph was not written into {self.folder}: {error}") from error


@dataclass(frozen=True)
class PrintAfter(Observer):
    """Prints the graph after one of the passes.

    Args:
        name: of the pass.
        stream: takes the text.
    """

    name: str
    stream: TextIO = field(default_factory=lambda: sys.stderr)

    def after(self, number: int, step: Pass, program: Program, seconds: float) -> None:
        if step.name == self.name:
            self.stream.write(f"# after {step.name}\n{graph_text(program)}")


@dataclass(frozen=True)
class TimePasses(Observer):
    """Adds up the seconds of every pass.

    Args:
        seconds: name of a pass -> its seconds, over all runs.
    """

    seconds: dict[str, float] = field(default_factory=dict)

    def after(self, number: int, step: Pass, program: Program, seconds: float) -> None:
        self.seconds[step.name] = self.seconds.get(step.name, 0.0) + seconds

    def table(self) -> "Table":
        """The seconds, a row for every pass."""
        from rich.table import Table  # `hawqfx.compile` loads without it

        table = Table("pass", "seconds", title="time per pass")
        for name, seconds in self.seconds.items():
            table.add_row(name, f"{seconds:.2f}")
        return table


@contextmanager
def progress_bars(console: "Console | None" = None) -> Iterator[Report]:
    """A context with progress bars.

    Args:
        console: shows the bars, if it is a terminal; else nothing is shown.  None: that of stderr.

    Yields:
        A function for Context.progress, which shows a bar for every label.
    """
    from rich.console import Console  # `hawqfx.compile` loads without it
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = console or Console(stderr=True)
    note = TextColumn("{task.fields[note]}")
    columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, int] = {}

        def report(label: str, done: int, total: int, note: str = "") -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total, note="")
            bars.update(tasks[label], completed=done, total=total, note=note)  # type: ignore[arg-type]

        yield report
