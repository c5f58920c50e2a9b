"""Files are written whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hawqfx.errors import ExportError


def check_writable(path: Path) -> None:
    """Before the work, not after it: the folder is there and takes a file.  Raises ExportError."""
    if path.is_dir():
        raise ExportError(f"{path} is a folder: give the name of a file in it")
    if not path.parent.is_dir():
        raise ExportError(f"{path} cannot be written: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise ExportError(f"{path} cannot be written: no permission in the folder {path.parent}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to, which takes its name when the block ends well.

    When it does not, the temporary file goes and `path` is as it was.  Raises ExportError for errors of the system.
    """
    check_writable(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ExportError(f"{path} was not written: {error}") from error
