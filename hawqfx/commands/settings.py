"""hawqfx.toml: the options of commands, a table for each; what stands on the command line wins.

[compile]
model = "nets.py:resnet"
data = "nets.py:images"
budget = "size=12.5%"
out = "model.onnx"
keep-float = ["head.*"]
"""

import tomllib
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from hawqfx.errors import UsageError

FILE = Path("hawqfx.toml")


def defaults(path: Path | None, group: TyperGroup) -> dict[str, Any]:
    """The options of a file, as typer takes them: command -> parameter -> value.

    Args:
        path: of the file; None: hawqfx.toml in the working folder, if there is one.
        group: the commands and their parameters.

    Raises:
        UsageError: if the file cannot be read, or names what no command takes.
    """
    if path is None and not FILE.is_file():
        return {}
    path = path or FILE
    try:
        with path.open("rb") as stream:
            tables = tomllib.load(stream)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    found = {}
    for name, table in tables.items():
        command = group.commands.get(name)
        if command is None or not isinstance(table, dict):
            raise UsageError(f"{path}: there is no command {name!r}: tables are {', '.join(sorted(group.commands))}")
        known = {parameter.name for parameter in command.params}
        values = {key.replace("-", "_"): value for key, value in table.items()}
        strangers = sorted(values.keys() - known)
        if strangers:
            raise UsageError(f"{path}: {name} has no option {strangers[0]!r}; see hawqfx {name} --help")
        found[name] = values
    return found


def either(context: typer.Context, **values: Any) -> tuple[Any, ...]:
    """Options that exclude each other: where some stand on the command line, without those of the file."""
    sources = {name: context.get_parameter_source(name) for name in values}
    written = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    return tuple(value if not written or name in written else None for name, value in values.items())
