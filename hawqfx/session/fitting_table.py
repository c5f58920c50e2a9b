"""A table whose rows stay single lines: where it is too wide, it leaves out columns and says which."""

import re
from collections.abc import Collection, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table

_ANY_WIDTH = 10_000  # characters


class FittingTable(Table):
    """A table of rich with a row per site.  Where nothing is left to leave out, long names go on in a second line,
    between two modules, and are never cut.

    Args:
        *headers: of its columns; the first one has the names.
        spare: headers of the columns that may be left out, the first one first.
        title: above the table.
    """

    def __init__(self, *headers: str, spare: Sequence[str], title: str) -> None:
        first, *others = headers
        columns = (Column(first, overflow="fold"), *(Column(header, no_wrap=True) for header in others))
        super().__init__(*columns, title=title)
        self.spare = tuple(spare)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        def excess(shown: Table) -> int:
            return console.measure(shown, options=options.update(max_width=_ANY_WIDTH)).maximum - options.max_width

        for count in range(len(self.spare) + 1):
            shown = self._without(self.spare[:count])
            if excess(shown) <= 0:
                break
        else:
            widest = max(len(str(name)) for name in self.columns[0].cells)
            shown = self._without(self.spare, widest - excess(shown))
        yield from shown.__rich_console__(console, options)

    def _without(self, dropped: Collection[Any], width: int = _ANY_WIDTH) -> Table:
        """The table without some columns, which its caption names, and with names in lines of some width."""
        kept = [column for column in self.columns if column.header not in dropped]
        caption = f"a wider terminal shows {', '.join(dropped)} too" if dropped else None
        shown = Table(*(column.copy() for column in kept), title=self.title, caption=caption)
        for name, *row in zip(*(column.cells for column in kept), strict=True):
            shown.add_row(in_lines(str(name), width), *row)
        return shown


def in_lines(name: str, width: int) -> str:
    """A name in lines of at most so many characters, parted after a dot or a space; a part that is longer stays whole.

    Lines after the first are indented.
    """
    lines = [""]
    for part in re.split(r"(?<=[. ])", name):
        if lines[-1].strip() and len((lines[-1] + part).rstrip()) > width:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)
