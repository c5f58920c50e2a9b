"""The work that faults are put into, and the processes that do it.

A process is forked from one that has done the work once, so that a kill costs a second and not ten.
"""

import copy
import functools
import gc
import logging
import os
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.onnx._internal.exporter._constants import TORCHLIB_OPSET
from torch.onnx._internal.exporter._registration import ONNXRegistry

import hawqfx
from hawqfx.passes.hawq_v2 import HawqV2
from hawqfx.passes.learned_rounding import LearnedRounding
from tests.nets import Plain, Residual, build, images

PATIENCE = 120  # seconds after which a process hangs
STAGES = ("compile", "export", "save", "end")
MODEL, SAVED = "model.onnx", "model.saved"

# Every cache is in one of them: batches and their size, blocks that were learned; and the folder for scratch files.
JOBS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "measured": lambda: (build(Plain), {"budget": "size=200%", "sensitivity": HawqV2(8, tolerance=0)}),
    "learned": lambda: (
        build(Residual),
        {"budget": "weight_bits=3", "sensitivity": "gauss-newton", "rounding": LearnedRounding(steps=8)},
    ),
}


def nothing(stage: str) -> None:
    """Tells nobody of a stage."""


def compiled(job: str, cache: Path | None, **options: Any) -> hawqfx.Compiled:
    model, own = JOBS[job]()
    return hawqfx.compile(model, data=images(count=4), cache=cache, **own | options)


def work(job: str, folder: Path, cache: Path | None, tell: Callable[[str], None] = nothing) -> None:
    """Compile, export and save.

    Args:
        job: one of JOBS.
        folder: of both files.
        cache: the folder of measurements.
        tell: called with the name of each stage when it begins.
    """
    tell("compile")
    network = compiled(job, cache)
    tell("export")
    network.export(folder / MODEL)
    tell("save")
    network.save(folder / SAVED)
    tell("end")


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of both files; of one that does not exist, none."""
    return {name: (folder / name).read_bytes() for name in (MODEL, SAVED) if (folder / name).is_file()}


def others(*folders: Path) -> list[str]:
    """The files and folders that no one asked for."""
    found = [path for folder in folders for path in folder.rglob("*")]
    return [str(path) for path in found if path.name.startswith((".", "tmp")) or "@" in path.name]


def warm_up() -> None:
    """Do all work once, and what a process does once only."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    read = functools.cache(ONNXRegistry.from_torchlib)  # half of the time of an export

    def from_torchlib(opset_version: int = TORCHLIB_OPSET) -> ONNXRegistry:
        registry = copy.copy(read(opset_version))
        registry.functions = {target: [*known] for target, known in registry.functions.items()}
        return registry

    ONNXRegistry.from_torchlib = staticmethod(from_torchlib)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as name:
        for job in JOBS:
            work(job, Path(name), Path(name) / "cache")
    gc.collect()


@dataclass
class Process:
    """A forked process.

    Args:
        number: of the process.
        stages: the end of a pipe where it tells its stages, a line each.
        log: the file of its standard output and error.
    """

    number: int
    stages: int
    log: Path

    def until(self, stage: str) -> bool:
        """Wait until a stage begins; whether it did before the process ended."""
        told, end = "", time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if select.select([self.stages], [], [], 1)[0]:
                more = os.read(self.stages, 1000).decode()
                told += more
                if f"{stage}\n" in told:
                    return True
                if not more:
                    return False
        return False

    def kill(self) -> None:
        os.kill(self.number, signal.SIGKILL)

    def wait(self) -> int:
        """The exit code, or minus the number of the signal that ended it.

        Raises:
            AssertionError: if it hangs; it is killed then.
        """
        end = time.monotonic() + PATIENCE
        try:
            while True:
                number, status = os.waitpid(self.number, os.WNOHANG)
                if number:
                    return os.waitstatus_to_exitcode(status)
                if time.monotonic() > end:
                    self.kill()
                    os.waitpid(self.number, 0)
                    raise AssertionError(f"a process hangs: {self.log.read_text()[-2000:]}")
                time.sleep(0.002)
        finally:
            os.close(self.stages)


def fork(
    task: Callable[[Callable[[str], None]], None], room: Path, dies_at: int = 0, steps: int = 0, counts: bool = False
) -> Process:
    """Run a task in a process of its own.

    Args:
        task: called with a function that tells its stages.
        room: a folder; the process has its temporary files in `room`/scratch, its output in `room`/log.
        dies_at: kill it at this call to the file system on something in the room, counted from 1.
        steps: of the interpreter, calls and returns, that it has left then; with none, it dies before the call.
        counts: write the number of such calls into `room`/calls at the end.
    """
    (room / "scratch").mkdir(parents=True, exist_ok=True)
    log = room / "log"
    reads, writes = os.pipe()
    number = os.fork()
    if number:
        os.close(writes)
        return Process(number, reads, log)
    code = 1
    try:
        os.close(reads)
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        logging.lastResort = logging.StreamHandler(os.fdopen(os.dup(2), "w", buffering=1))
        tempfile.tempdir = str(room / "scratch")
        calls = _Calls(room, dies_at, steps)
        sys.addaudithook(calls)
        task(lambda stage: void(os.write(writes, f"{stage}\n".encode())))
        if counts:
            calls.dies_at, seen = 0, calls.seen
            (room / "calls").write_text(str(seen))
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def void(value: object) -> None:
    """Drops a value."""


class _Calls:
    """Counts the calls that open, rename, delete or make something in a folder, as Python's audit events tell them."""

    def __init__(self, room: Path, dies_at: int, steps: int) -> None:
        self.room, self.dies_at, self.steps, self.seen = str(room), dies_at, steps, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" and not event.startswith(("os.", "shutil.", "tempfile.")):
            return
        if not any(str(argument).startswith(self.room) for argument in arguments[:2]):
            return
        self.seen += 1
        if self.seen == self.dies_at:
            self._step()
            sys.setprofile(self._step)

    def _step(self, *_: object) -> None:
        self.steps -= 1
        if self.steps < 0:
            os.kill(os.getpid(), signal.SIGKILL)
