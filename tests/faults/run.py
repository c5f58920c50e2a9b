"""Puts faults into compile, export and save; `make faults`.

    python -m tests.faults.run [--count N] [--seed N] [--only NUMBER ...] [--conditions NAME ...] [--quick]

A process that compiles a network with a cache, exports it over an older file and saves it over an older one is killed
at random moments, half of them inside a stage or before a call to the file system.  After each kill both files are
whole, the older or the new one, and the next run on the same cache gives the bytes of a run without a kill and leaves
no temporary file.  Then come the faults of tests/faults/conditions.py.  Anything else is a finding.
"""

import argparse
import collections
import random
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.faults.conditions import CONDITIONS
from tests.faults.kills import KINDS, Clean, Kill, killed
from tests.faults.work import JOBS, warm_up


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="of the kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", type=int, metavar="NUMBER", help="these kills, and nothing else")
    parser.add_argument("--conditions", nargs="*", default=list(CONDITIONS), choices=list(CONDITIONS))
    parser.add_argument("--quick", action="store_true", help="fewer trials of each condition")
    args = parser.parse_args(words)
    start, console = time.perf_counter(), Console(width=160)
    warm_up()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clean = {job: Clean.of(job, folder / job) for job in JOBS}
        numbers = range(args.count) if args.only is None else args.only
        kills = []
        for number in numbers:
            kills.append(killed(number, args.seed, clean, folder / "kill"))
            for fault in kills[-1].faults:
                console.print(f"kill {number}: {fault}", markup=False, soft_wrap=True)
        wrong = any(kill.faults for kill in kills)
        console.print(_table(kills, args.seed))
        conditions = Table("fault", "trials", "wrong")
        for condition in args.conditions if args.only is None else []:
            room = folder / condition
            room.mkdir()
            try:
                trials, faults = CONDITIONS[condition](room, clean, random.Random(args.seed), not args.quick)
            except OSError as error:  # this machine cannot
                conditions.add_row(condition, "0", f"not tried: {error}")
                continue
            for fault in faults:
                console.print(f"{condition}: {fault}", markup=False, soft_wrap=True)
            conditions.add_row(condition, str(trials), str(len(faults)))
            wrong |= bool(faults)
        if conditions.row_count:
            console.print(conditions)
    console.print(f"{time.perf_counter() - start:.0f} s")
    return int(wrong)


def _table(kills: list[Kill], seed: int) -> Table:
    columns = ("kill at", "kills", "ended before", "old files", "new files", "with a cache", "temporary files", "wrong")
    table = Table(*columns, title=f"{len(kills)} kills, seed {seed}")
    for kind in KINDS:
        own = [kill for kill in kills if kill.kind == kind]
        counts: collections.Counter[str] = collections.Counter()
        for kill in own:
            counts["ended"] += not kill.died
            counts["old"] += kill.kept[0]
            counts["new"] += kill.kept[1]
            counts["cache"] += kill.measured > 0
            counts["left"] += kill.left
            counts["wrong"] += bool(kill.faults)
        names = ("ended", "old", "new", "cache", "left", "wrong")
        table.add_row(kind, str(len(own)), *(str(counts[name]) for name in names))
    return table


if __name__ == "__main__":
    sys.exit(main())
