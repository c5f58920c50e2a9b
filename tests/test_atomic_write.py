"""Files whole or not at all, and what killed processes leave."""

import os
import platform
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hawqfx.atomic_write import check_writable, folder_beside, scratch_folder, whole_file
from hawqfx.errors import ExportError


def dead() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_dead_processes_left_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of dead processes of this machine alone."""
    host, number = platform.node(), dead()
    kept = {f".hawqfx-{os.getpid()}-ab1@{host}", f".hawqfx-{number}-ab1@other", f".hawqfx-{number}-ab1", "model.onnx"}
    for name in kept:
        (tmp_path / name).touch()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for context in (whole_file(tmp_path / "new"), folder_beside(tmp_path / "new"), scratch_folder()):
        (tmp_path / f".hawqfx-{number}-ab1@{host}").touch()
        (tmp_path / f".hawqfx-{number}-ab2@{host}").mkdir()
        (tmp_path / f".hawqfx-{number}-ab2@{host}" / "part").touch()
        with context:
            pass
        assert {path.name for path in tmp_path.iterdir()} == kept | {"new"}


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def full() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("ne")
            raise OSError(28, "No space left on device")

    with pytest.raises(ExportError, match=r"file was not written: .*No space"):
        full()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_the_disk_before_a_file_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a loss of power may not part: content, then name, then the folder that has the name."""
    events: list[str] = []
    flush, replace = os.fsync, Path.replace

    def flushed(handle: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else f"{os.fstat(handle).st_size} bytes")
        flush(handle)

    def replaced(self: Path, target: Path) -> Path:
        events.append("name")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", replaced)
    with whole_file(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert events == ["3 bytes", "name", "folder"]


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot be written: .*too long"):
        check_writable(tmp_path / ("n" * 300))
    with whole_file(tmp_path / ("n" * 255)) as temporary:  # the temporary name is not longer
        temporary.touch()
