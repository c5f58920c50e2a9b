"""Kills at random moments of compile, export and save, over older files."""

import random
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.faults.work import JOBS, MODEL, SAVED, STAGES, contents, fork, others, work

OLD = {MODEL: b"an older model" * 1000, SAVED: b"an older saved file" * 1000}
LAST = 20  # calls of export and save
STEPS = 12  # from the opening of a file to its closing, and some more
KINDS = ("moment", "stage", "call")  # half of the kills are at any moment


@dataclass(frozen=True)
class Clean:
    """A run of a job without a fault.

    Args:
        files: the bytes of its files.
        begins: seconds at which each stage begins.
        calls: the number of its calls to the file system.
    """

    files: Mapping[str, bytes]
    begins: Mapping[str, float]
    calls: int

    @staticmethod
    def of(job: str, room: Path) -> "Clean":
        process = fork(partial(work, job, room, room / "cache"), room, counts=True)
        start, begins = time.perf_counter(), {}
        for stage in STAGES:
            process.until(stage)
            begins[stage] = time.perf_counter() - start
        assert process.wait() == 0, process.log.read_text()
        assert not others(room), others(room)
        return Clean(contents(room), begins, int((room / "calls").read_text()))


@dataclass(frozen=True)
class Kill:
    """What a kill left.

    Args:
        kind: "moment", after a random time; "stage", a random time after a random stage began; "call", at a random call
            to the file system or a few steps of the interpreter after it.
        died: whether the process was killed before its end.
        kept: the files that were the older ones after the kill, and those that were the new ones.
        measured: files of the cache after the kill.
        left: temporary files and folders after the kill.
        faults: what is wrong; nothing, if all is well.
    """

    kind: str
    died: bool
    kept: tuple[int, int]
    measured: int
    left: int
    faults: tuple[str, ...]


def killed(number: int, seed: int, clean: Mapping[str, Clean], room: Path) -> Kill:
    """Kill a process and look at its files, then run it again on the same cache and look again.

    Args:
        number: of the kill.
        seed: with the number, says which job dies and when.
        clean: the jobs without a fault.
        room: a folder that is made and deleted.
    """
    draw = random.Random(f"{seed} {number}")
    job, kind = draw.choice(sorted(JOBS)), ("moment", "stage", "moment", "call")[number % 4]
    wanted, cache = clean[job], room / "cache"
    room.mkdir()
    for name, content in OLD.items():
        (room / name).write_bytes(content)
    begins = wanted.begins
    calls = steps = 0
    if kind == "call":  # half of them in export and save
        calls, steps = draw.randint(draw.choice((1, wanted.calls - LAST)), wanted.calls), draw.randint(0, STEPS)
    process = fork(partial(work, job, room, cache), room, dies_at=calls, steps=steps)
    if kind != "call":
        stage = STAGES[0] if kind == "moment" else draw.choice(STAGES[:-1])
        last = STAGES[-1] if kind == "moment" else STAGES[STAGES.index(stage) + 1]
        process.until(stage)
        time.sleep(draw.uniform(0, begins[last] - begins[stage]))
        process.kill()
    code = process.wait()
    died, faults, found = code == -signal.SIGKILL, list[str](), contents(room)
    if code != 0 and not died:
        faults.append(f"ended with {code}: {process.log.read_text()[-500:]}")
    for name, old in OLD.items():
        if found.get(name) not in (old, wanted.files[name]):
            faults.append(f"{name} is {'half written' if name in found else 'gone'}")
    kept = sum(found.get(name) == old for name, old in OLD.items())
    left = others(room)
    measured = sum(path.is_file() and str(path) not in left for path in cache.rglob("*"))
    again = fork(partial(work, job, room, cache), room)
    code, files = again.wait(), contents(room)
    if code != 0:
        faults.append(f"the next run ended with {code}: {again.log.read_text()[-500:]}")
    faults += [f"{name} of the next run differs" for name in OLD if files[name] != wanted.files[name]]
    faults += [f"the next run leaves {path}" for path in others(room)]
    if "damaged" in again.log.read_text():
        faults.append(f"the next run finds damage: {again.log.read_text()[-500:]}")
    shutil.rmtree(room)
    return Kill(kind, died, (kept, len(OLD) - kept), measured, len(left), tuple(faults))
