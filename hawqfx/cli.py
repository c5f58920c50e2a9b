"""The command line: its commands are the functions of hawqfx.commands.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a budget that cannot be met, 130 interrupted.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.main import get_command

from hawqfx.commands import compiling, looking, running
from hawqfx.commands.settings import defaults
from hawqfx.errors import HawqfxError, InfeasibleBudget, UsageError

app = typer.Typer(no_args_is_help=True, help="Mixed-precision integer compiler for PyTorch models.")
for command in (
    compiling.compile,
    compiling.pareto,
    looking.explain,
    looking.report,
    looking.inspect,
    running.bench,
    running.demo,
    looking.passes,
    looking.doctor,
):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        from hawqfx import __version__

        print(f"hawqfx {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="options of commands, by default in hawqfx.toml")
    ] = None,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None:
    context.default_map = defaults(config, get_command(app))  # type: ignore[arg-type]


# exit codes; 2 is also what typer itself ends with
FAILED, INTERRUPTED = 1, 130
CODES = {UsageError: 2, InfeasibleBudget: 3}


def main() -> None:
    """The entry point: errors that hawqfx raises on purpose are printed without a traceback."""
    try:
        app()
    except HawqfxError as error:
        code = next((code for kind, code in CODES.items() if isinstance(error, kind)), FAILED)
        # which pass found it out is nothing to a user who is to change the command
        notes = "".join(f"\n({note})" for note in getattr(error, "__notes__", ()) if code == FAILED)
        print(f"hawqfx: {error}{notes}", file=sys.stderr)
        sys.exit(code)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("hawqfx: interrupted; with --cache FOLDER the same command goes on where it was", file=sys.stderr)
        raise
