"""Faults of what is around a process: full disks, folders that cannot be written, other processes, damage, clocks.

Each returns the number of its trials and what was wrong.
"""

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hawqfx
from hawqfx.errors import ExportError, HawqfxError, UsageError
from hawqfx.ir.program import Program
from hawqfx.pass_manager.base import Observer, Pass
from tests.faults.kills import OLD, Clean
from tests.faults.work import JOBS, MODEL, SAVED, compiled, contents, fork, others, work
from tests.nets import images
from tests.tools import damaged

Found = tuple[int, list[str]]
PAGE = 4096


def _same(job: str, room: Path, cache: Path, clean: Mapping[str, Clean], word: str = "") -> list[str]:
    """Run a job; what is wrong with its files, and whether its log has a word."""
    process = fork(partial(work, job, room, cache), room)
    code, log = process.wait(), process.log.read_text()
    if code != 0:
        return [f"ended with {code}: {log[-500:]}"]
    faults = [f"{name} differs" for name, content in clean[job].files.items() if contents(room).get(name) != content]
    return faults + ([f"no word of {word!r}: {log[-300:]}"] if word not in log else [])


@contextlib.contextmanager
def _small_disk(room: Path) -> Iterator[Path]:
    """A disk of 64 pages, where one can be mounted.

    Raises:
        OSError: where none can.
    """
    folder = room / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={64 * PAGE}", "tmpfs", folder], capture_output=True)
    if done.returncode != 0:
        raise OSError(done.stderr.decode())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=False)


def _fill(disk: Path, free: int) -> None:
    """Fill a disk up to so many pages."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(PAGE))
    os.truncate(filler, max(0, filler.stat().st_size - free * PAGE))


def _refuses(
    error: type[HawqfxError], names: str, call: Callable[..., object], *arguments: Any, **options: Any
) -> bool:
    """Whether a call fails; if it does, it is with an error of hawqfx that names a path."""
    try:
        call(*arguments, **options)
        return False
    except error as refusal:
        if names not in str(refusal):
            raise AssertionError(f"nothing of {names!r} in: {refusal}") from refusal
        return True


def _on_full_disk(job: str, disk: Path, _: object) -> None:
    network = compiled(job, None)
    _refuses(ExportError, str(disk / MODEL), network.export, disk / MODEL)
    _refuses(ExportError, str(disk / SAVED), network.save, disk / SAVED)
    _refuses(HawqfxError, str(disk), compiled, job, disk / "cache")
    tempfile.tempdir = str(disk)
    _refuses(ExportError, "was not written", compiled, "measured", None)


def full_disk(room: Path, clean: Mapping[str, Clean], draw: random.Random, thorough: bool) -> Found:
    """export, save and the cache on a disk that has no, one, two, ... free pages."""
    trials, faults = 0, list[str]()
    with _small_disk(room) as disk:
        for job in sorted(JOBS):
            for free in range(5) if thorough else (0, 1):
                for name, content in OLD.items():
                    (disk / name).write_bytes(content[:100])
                _fill(disk, free)

                process = fork(partial(_on_full_disk, job, disk), room)
                if process.wait() != 0:
                    faults.append(f"{job}, {free} pages free: {process.log.read_text()[-600:]}")
                for name, content in contents(disk).items():
                    if content not in (OLD[name][:100], clean[job].files[name]):
                        faults.append(f"{job}, {free} pages free: {name} is half written")
                faults += [f"{job}, {free} pages free: left {path}" for path in others(disk)]
                if len(contents(disk)) != len(OLD):
                    faults.append(f"{job}, {free} pages free: a file is gone")
                (disk / "filler").unlink()
                faults += _same(job, room, disk / "cache", clean)
                trials += 4
                for path in disk.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return trials, faults


def _with_small_files(job: str, target: Path, most: int, _: object) -> None:
    network = compiled(job, None)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert _refuses(ExportError, str(target / MODEL), network.export, target / MODEL)
    assert _refuses(ExportError, str(target / SAVED), network.save, target / SAVED)
    _refuses(HawqfxError, "was not written", compiled, job, target / "cache")  # the cache, or the file that is weighed


def largest_file(room: Path, clean: Mapping[str, Clean], draw: random.Random, thorough: bool) -> Found:
    """export, save and the cache where files may have a few bytes only, which needs no disk of its own."""
    trials, faults = 0, list[str]()
    job = draw.choice(sorted(JOBS))
    for most in (0, 10, 1000, 2500) if thorough else (draw.randint(1, 2500),):
        target = room / f"at most {most}"
        target.mkdir()
        for name, content in OLD.items():
            (target / name).write_bytes(content)

        process = fork(partial(_with_small_files, job, target, most), room)
        code = process.wait()
        if code != 0:
            faults.append(f"at most {most} bytes: ended with {code}: {process.log.read_text()[-600:]}")
        if contents(target) != OLD:
            faults.append(f"at most {most} bytes: an old file is lost")
        faults += [f"at most {most} bytes: left {path}" for path in others(target)]
        faults += _same(job, room, target / "cache", clean)
        trials += 3
    return trials, faults


class _Started(Observer):
    """Whether a pass ran."""

    def before(self, number: int, step: Pass, program: Program) -> None:
        raise AssertionError(f"{step.name} runs before the cache is refused")

    def after(self, number: int, step: Pass, program: Program, seconds: float) -> None:
        raise AssertionError(f"{step.name} ran before the cache is refused")


def unwritable(room: Path, clean: Mapping[str, Clean], draw: random.Random, thorough: bool) -> Found:
    """Folders that do not exist, that are files, that are not on any disk, or that have no permission."""
    (room / "file").write_text("a file")
    closed = room / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    folders = [room / "missing", room / "file", Path("/proc/self")]
    folders += [] if os.access(closed, os.W_OK) else [closed]  # root may write anywhere

    caches = [
        room / "file",
        room / "file" / "below",
        Path("/proc/cache"),
        *(folder / "new" for folder in folders if folder == closed),
    ]
    process = fork(partial(_where_nothing_can_be_written, folders, caches), room)
    code = process.wait()
    faults = [] if code == 0 else [f"ended with {code}: {process.log.read_text()[-600:]}"]
    closed.chmod(0o700)
    return 3 * len(folders) + len(caches), faults


def _where_nothing_can_be_written(folders: Sequence[Path], caches: Sequence[Path], _: object) -> None:
    network = compiled("learned", None)
    for folder in folders:
        for name, write in ((MODEL, network.export), (SAVED, network.save), ("page.html", network.report)):
            assert _refuses(ExportError, str(folder / name), write, folder / name), f"{folder / name} was written"
    for cache in caches:
        assert _refuses(UsageError, str(cache), compiled, "learned", cache, observers=[_Started()])


def together(room: Path, clean: Mapping[str, Clean], draw: random.Random, thorough: bool) -> Found:
    """Two and four processes at once on one cache, each with files of its own, then all on the same files."""
    trials, faults = 0, list[str]()
    for job in sorted(JOBS) if thorough else ["learned"]:
        for count in (2, 4) if thorough else (2,):
            for shared in (False, True):
                group = room / f"{job} {count} {shared}"
                rooms = [group / str(number) for number in range(count)]
                targets = [group if shared else own for own in rooms]
                tasks = [partial(work, job, target, group / "cache") for target in targets]
                processes = [fork(task, own) for task, own in zip(tasks, rooms, strict=True)]
                codes = [process.wait() for process in processes]
                logs = [process.log.read_text() for process in processes]
                for number, (code, log, target) in enumerate(zip(codes, logs, targets, strict=True)):
                    if code != 0 or "damaged" in log:
                        faults.append(f"{count} of {job}: process {number} ended with {code}: {log[-600:]}")
                    elif contents(target) != clean[job].files:
                        faults.append(f"{count} of {job}: the files of process {number} differ")
                faults += [f"{count} of {job}: left {path}" for path in others(group)]
                trials += count
    return trials, faults


def damage(room: Path, clean: Mapping[str, Clean], draw: random.Random, thorough: bool) -> Found:
    """Files of the cache that are truncated, flipped, emptied, or folders."""
    trials, faults = 0, list[str]()
    for job in sorted(JOBS) if thorough else ["learned"]:
        cache = room / f"cache of {job}"
        faults += _same(job, room, cache, clean)
        files = sorted(path.relative_to(cache) for path in cache.rglob("*") if path.is_file())
        for how in ("truncated", "flipped", "emptied", "a folder"):
            for name in draw.sample(files, 5) if thorough else [draw.choice(files)]:
                copy = room / "copy"
                shutil.copytree(cache, copy)
                damaged(copy / name, how)
                faults += [
                    f"{name} {how}: {fault}" for fault in _same(job, room, copy, clean, f"{name.name} is damaged")
                ]
                shutil.rmtree(copy)
                trials += 1
    return trials, faults


def clocks(room: Path, clean: Mapping[str, Clean], draw: random.Random, thorough: bool) -> Found:
    """Entries of the future and of 1970, and a clock that goes back."""
    trials, faults, real = 0, list[str](), time.time
    for job in sorted(JOBS) if thorough else ["measured"]:
        cache = room / f"cache of {job}"
        faults += _same(job, room, cache, clean)
        for moment in (real() + 10 * 365 * 86400, 0):
            for path in cache.rglob("*"):
                os.utime(path, (moment, moment))
            faults += [f"entries of {moment:.0f}: {fault}" for fault in _same(job, room, cache, clean)]
        for path in list(cache.rglob("batch-*"))[:2]:
            path.unlink()
        time.time = lambda: 2e9 - real()
        try:
            faults += [f"a clock that goes back: {fault}" for fault in _same(job, room, cache, clean)]
        finally:
            time.time = real
        trials += 3
    return trials, faults


def _timed(cache: Path, _: object) -> None:
    os.environ["HAWQFX_CACHE"] = str(cache)
    hawqfx.measure_latency(JOBS["measured"]()[0], images(count=1))


def other_disk(room: Path, clean: Mapping[str, Clean], draw: random.Random, thorough: bool) -> Found:
    """The cache on another file system than the files and the folder of scratch files, given both ways."""
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == room.stat().st_dev:
        raise OSError("there is no other file system at /dev/shm")
    with tempfile.TemporaryDirectory(dir=shared) as name:
        faults = _same("learned", room, Path(name) / "cache", clean)
        faults += _same("learned", room, Path(name) / "cache", clean)

        process = fork(partial(_timed, Path(name) / "timings"), room)
        if process.wait() != 0 or not list(Path(name).glob("timings/latency-*.json")):
            faults.append(f"timings: {process.log.read_text()[-600:]}")
        return 3, faults + [f"left {path}" for path in others(Path(name) / "cache", room)]


CONDITIONS = {
    "full disk": full_disk,
    "largest file": largest_file,
    "unwritable": unwritable,
    "together": together,
    "damage": damage,
    "clocks": clocks,
    "other disk": other_disk,
}
