"""Writes files whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hawqfx.errors import ExportError


def check_writable(path: Path) -> None:
    """Check that a file can be written at a path, so that long work does not end in an error.

    Args:
        path: of the file; the file itself need not exist.

    Raises:
        ExportError: if the path is a folder, or if its folder does not exist or is not writable.
    """
    if path.is_dir():
        raise ExportError(f"{path} is a folder: give the name of a file in it")
    if not path.parent.is_dir():
        raise ExportError(f"{path} cannot be written: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise ExportError(f"{path} cannot be written: no permission in the folder {path.parent}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A context in which a file is written: the file appears at its path only when the block ends without an error.

    Args:
        path: of the file.

    Yields:
        The path of a temporary file in the same folder.  At the end of the block it is renamed to `path`; after an
        error it is deleted, and `path` is as before.

    Raises:
        ExportError: if the operating system refuses to write the file.
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
