"""Compiles and exports again and again in one process, and looks whether anything grows; `make soak`.

    python -m tests.faults.soak [--count N]

Prints the resident memory, the open files, the threads and what is in the folder of temporary files, after every
twelfth part of the compilations (at most 25).  The median memory of the last quarter may exceed that of the second by
5%, which allocators need to settle; files, threads and temporary files may not grow at all.
"""

import argparse
import gc
import itertools
import logging
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import astuple, dataclass
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from tests.faults.work import JOBS, work

GROWTH = 1.05  # of memory, from the second quarter to the last


@dataclass(frozen=True)
class Use:
    """What a process holds.

    Args:
        done: compilations so far.
        memory: resident, in MB.
        files: open file descriptors.
        threads: of the process.
        temporary: entries in the folder of temporary files.
        seconds: since the start.
    """

    done: int
    memory: float
    files: int
    threads: int
    temporary: int
    seconds: float


def _use(done: int, folder: Path, start: float) -> Use:
    gc.collect()
    own = psutil.Process()
    resident = own.memory_info().rss / 1e6
    return Use(
        done, resident, own.num_fds(), own.num_threads(), len(list(folder.iterdir())), time.perf_counter() - start
    )


def soak(count: int, console: Console) -> list[str]:
    """Do all jobs in turn, each with and without a cache.

    Returns:
        What grew.
    """
    every = max(1, min(25, count // 12))
    uses, start, before = list[Use](), time.perf_counter(), tempfile.tempdir
    with tempfile.TemporaryDirectory() as name:
        scratch, files, cache = (Path(name) / part for part in ("scratch", "files", "cache"))
        scratch.mkdir()
        files.mkdir()
        tempfile.tempdir = str(scratch)
        try:
            kinds = itertools.cycle(itertools.product((None, cache), JOBS))
            for done, (kept, job) in zip(range(1, count + 1), kinds, strict=False):
                work(job, files, kept)
                if done % every == 0:
                    uses.append(_use(done, scratch, start))
                    console.print(" ".join(f"{each:,.0f}" for each in astuple(uses[-1])))
        finally:
            tempfile.tempdir = before
    table = Table("compiled", "resident MB", "open files", "threads", "temporary files", "s")
    for use in uses:
        table.add_row(*(f"{each:,.0f}" for each in astuple(use)))
    console.print(table)
    return grown(uses)


def grown(uses: list[Use]) -> list[str]:
    """What is larger in the last quarter than in the second."""
    quarter = len(uses) // 4
    second, last = uses[quarter : 2 * quarter], uses[-quarter:]
    found = []
    memory = [statistics.median(use.memory for use in part) for part in (second, last)]
    if memory[1] > GROWTH * memory[0]:
        found.append(f"memory: from {memory[0]:,.0f} MB in the second quarter to {memory[1]:,.0f} MB in the last")
    for name in ("files", "threads", "temporary"):
        most, now = max(getattr(use, name) for use in second), max(getattr(use, name) for use in last)
        if now > most:
            found.append(f"{name}: from {most} in the second quarter to {now} in the last")
    return found


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    args = parser.parse_args(words)
    if args.count < 8:
        parser.error("--count: at least 8, two for each quarter")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    found = soak(args.count, Console(width=120))
    for each in found:
        print(f"grows: {each}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
