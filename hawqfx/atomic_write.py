"""Writes files whole or not at all.

A process that is killed leaves its temporary files.  Their names say who made them, and the next process that writes
into the same folder deletes those whose maker is dead.
"""

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from hawqfx.errors import ExportError

# .hawqfx-PID-RANDOM@HOST; the host, since folders are shared between machines
TEMPORARY = re.compile(r"\.hawqfx-(\d+)-\w+@(.*)")


def check_folder(folder: Path) -> None:
    """Check that files can be written in a folder, by a file that is made and deleted.

    Permissions do not tell: of a file system that takes no files, as /proc, they say that it does.

    Args:
        folder: it need not exist; then it is the folder to make it in that is checked.

    Raises:
        OSError: if there is no such folder and none can be made, or if it takes no files.
    """
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is no folder")
    try:
        tempfile.TemporaryFile(dir=existing, prefix=_prefix(), suffix=_suffix()).close()
    except OSError as error:
        raise OSError(f"nothing can be written in the folder {existing}: {error.strerror}") from error


def check_writable(path: Path) -> None:
    """Check that a file can be written at a path, so that long work does not end in an error.

    Args:
        path: of the file; the file itself need not exist.

    Raises:
        ExportError: if the path is a folder, or if its folder does not exist or is not writable.
    """
    try:
        if path.is_dir():
            raise ExportError(f"{path} is a folder: give the name of a file in it")
        if not path.parent.is_dir():
            raise ExportError(f"{path} cannot be written: the folder {path.parent} does not exist")
        check_folder(path.parent)
    except OSError as error:  # such as a name that is too long
        raise ExportError(f"{path} cannot be written: {error}") from error


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
    with _refused_as_export_error(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=_prefix(), suffix=_suffix())
        os.close(handle)
        temporary = Path(name)
        try:
            _delete_abandoned(path.parent)
            yield temporary
            temporary.chmod(0o644)
            take_place(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def take_place(written: Path, path: Path) -> None:
    """Rename a file to its place once its content is on the disk, so that after a loss of power the old file is there
    or the new one."""
    _flush(written, os.O_RDWR)
    written.replace(path)
    if os.name == "posix":  # Windows opens no folders
        _flush(path.parent, os.O_RDONLY)


def _flush(path: Path, how: int) -> None:
    handle = os.open(path, how)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A context with a temporary folder, in the system's folder for such.

    Raises:
        ExportError: if the operating system refuses to write there.
    """
    with (
        _refused_as_export_error("a temporary file"),
        tempfile.TemporaryDirectory(prefix=_prefix(), suffix=_suffix()) as name,
    ):
        _delete_abandoned(Path(name).parent)
        yield Path(name)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A context with a temporary folder in the folder of a file, from which files are renamed to their places.

    Raises:
        ExportError: if the operating system refuses to write there.
    """
    check_writable(path)
    with (
        _refused_as_export_error(path),
        tempfile.TemporaryDirectory(dir=path.parent, prefix=_prefix(), suffix=_suffix()) as name,
    ):
        _delete_abandoned(path.parent)
        yield Path(name)


@contextmanager
def _refused_as_export_error(what: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise ExportError(f"{what} was not written: {error}") from error


def _prefix() -> str:
    return f".hawqfx-{os.getpid()}-"


def _suffix() -> str:
    return f"@{platform.node()}"


def _delete_abandoned(folder: Path) -> None:
    """Delete the temporary files that processes of this machine left in a folder when they were killed."""
    import psutil  # `hawqfx.compile` loads without it

    for name in os.listdir(folder):
        made = TEMPORARY.fullmatch(name)
        if made and made[2] == platform.node() and not psutil.pid_exists(int(made[1])):
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):  # another process was faster, or the file is another user's
                    path.unlink()
