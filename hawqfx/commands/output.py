"""What commands print: tables for people, or one JSON object for programs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hawqfx.atomic_write import check_writable
from hawqfx.errors import ExportError, UsageError
from hawqfx.session.plan_json import finite

Json = Annotated[bool, typer.Option("--json", help="print one JSON value, and nothing else on standard output")]


def offering(*values: str) -> Callable[[], list[str]]:
    """What a shell completes an option with; which values there are is for the compiler to say."""
    return lambda: list(values)


def check_out(*paths: Path | None) -> None:
    """Refuse files that cannot be written, before any work: then the command line is wrong, and later the disk is.

    Raises:
        UsageError: names the path.
    """
    for path in paths:
        if path is not None:
            try:
                check_writable(path)
            except ExportError as error:
                raise UsageError(str(error)) from error


def show(table: Table, width: int = 120) -> None:
    """Print a table: as wide as the terminal, or so wide where there is none."""
    console = Console()
    (console if console.is_terminal else Console(width=width)).print(table)


def as_json(value: Any) -> None:
    """Print a value as JSON; numbers that JSON has not become null."""
    print(json_of(value))


def json_of(value: Any) -> str:
    return json.dumps(finite(value), indent=1, default=str, allow_nan=False)


def in_bytes(count: float) -> str:
    """Bytes as people write them, such as 136 kB or 1.2 MB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"
