"""What commands print: tables for people, or one JSON object for programs."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hawqfx.session.plan_json import finite

Json = Annotated[bool, typer.Option("--json", help="print one JSON object, and nothing else on standard output")]


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
