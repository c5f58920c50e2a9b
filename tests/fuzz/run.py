"""Compiles random networks and compares their files with onnxruntime; `make fuzz`.

    python -m tests.fuzz.run [--count N] [--seed N] [--jobs N] [--only FAMILY:SEED ...]

Every network is compiled under a random budget, with random widths, schemes, packing, target, rounding and so on
(settings.py), exported, and run.  The file must compute what the graph computes, on batches of other sizes too, and the
captured network what the model computes; a budget that cannot be met must be met where it is raised to the least that
the refusal names; some networks are saved and loaded, and must export the same bytes again.  Or the network is refused
by an error of hawqfx; a PassError, an ExportError or a BackendError is no refusal, but a promise that hawqfx broke.
Anything else is a finding, and its FAMILY:SEED is printed.
"""

import argparse
import collections
import logging
import os
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils import _pytree as pytree

import hawqfx
from hawqfx.allocation.budget import Budget, Limit
from hawqfx.errors import BackendError, ExportError, HawqfxError, InfeasibleBudget, PassError
from hawqfx.runtime import ort
from tests.fuzz.draws import Choices
from tests.fuzz.networks import FAMILIES, Case, Family, Inputs, case, run
from tests.fuzz.settings import judged, settings

TIES = 0.02  # of the outputs' mean: flipped ties, in networks of a few layers
NOISE = 0.1  # of an output's mean: if inputs that change in their last place change it by more, it is rounding alone
RENEWED = 200  # networks after which a process is replaced by a new one
SUMS = 1e-3  # of the outputs' mean: sums of float32 in another order, and behind ranges that are huge


@dataclass(frozen=True)
class Outcome:
    """What became of a network.

    Args:
        kind: "right", "refused", or "wrong".
        detail: the refusal, or what is wrong.
    """

    kind: str
    detail: str = ""


class Wrong(Exception):
    """What is found in a network that compiled."""


def tried(family: Family, seed: int, folder: Path) -> Outcome:
    """Compile, export and run one network."""
    found, draw = case(family, seed), Choices(seed + 1_000_000)
    try:
        _tried(found, draw, folder / f"{family}-{seed}")
    except Wrong as error:
        return Outcome("wrong", str(error))
    except HawqfxError as error:
        # of these three, a promise was broken, or a file is wrong or does not load
        kind = "wrong" if isinstance(error, (PassError, ExportError, BackendError)) else "refused"
        return Outcome(kind, f"{type(error).__name__}: {error}")
    except Exception as error:  # what the fuzz is to find
        at = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome("wrong", f"{type(error).__name__}: {error} ({at.filename}:{at.lineno})")
    return Outcome("right")


def _tried(found: Case, draw: Choices, path: Path) -> None:
    options = {"data": found.batches, **settings(draw, found)}
    with torch.no_grad():
        answers = [run(found.model, batch) for batch in (*found.batches, *found.others)]
        moved = run(found.model, pytree.tree_map(_moved, found.batches[0]))
    # instance-norms of equal pixels are zero but for what sums in float32 leave
    rounding = {
        at for at, both in enumerate(zip(*map(_tensors, (moved, answers[0])), strict=True)) if _away(*both) > NOISE
    }
    if draw.chance(4):
        options |= judged(draw, found, answers[: len(found.batches)]) or {}
    compiled = _compiled(found, options)
    file, packing = path.with_suffix(".onnx"), draw.one("portable", "portable", "native")
    compiled.export(file, packing)
    session = ort.session(file)
    for batch, answer in zip((*found.batches, *found.others), answers, strict=True):
        _compare("the captured network", compiled.session.measured.graph, batch, _tensors(answer), SUMS, rounding)
        found_there = ort.run(session, [leaf.numpy() for leaf in _tensors(batch)])
        _compare("the graph", compiled.model, batch, [torch.from_numpy(each) for each in found_there], TIES, rounding)
    if draw.chance(12):
        compiled.save(path.with_suffix(".hawqfx"))
        loaded = hawqfx.load(path.with_suffix(".hawqfx"), found.model, found.dynamic_shapes)
        again = path.with_suffix(".again.onnx")
        loaded.export(again, packing)
        if again.read_bytes() != file.read_bytes():
            raise Wrong("the network that was saved and loaded exports other bytes")


def _compiled(found: Case, options: dict[str, Any]) -> hawqfx.Compiled:
    """The compiled network; where a limit is too small, under the least that the refusal names.

    Raises:
        Wrong: if that is too small again.
    """
    raised: dict[str, str] = {}
    budget = Budget.of(options["budget"])
    while True:
        try:
            return hawqfx.compile(found.model, **{**options, "budget": budget})
        except InfeasibleBudget as error:
            if error.limit in raised:
                raise Wrong(f"{raised[error.limit]}; and then: {error}") from error
            if not error.least >= 0:
                raise
            raised[error.limit] = str(error)
            budget = replace(budget, **{error.limit: Limit(error.least)})


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


@torch.no_grad()
def _compare(
    name: str, model: Any, batch: Inputs, answers: list[Tensor], most: float, rounding: Collection[int]
) -> None:
    """Raises Wrong if a model's outputs differ from these answers by more than `most` of their mean size; the values of
    those numbered in `rounding` are not compared."""
    wanted = _tensors(run(model, batch))
    if len(wanted) != len(answers):
        raise Wrong(f"{name} has {len(wanted)} outputs, and not {len(answers)}")
    for number, (one, other) in enumerate(zip(answers, wanted, strict=True)):
        what = f"{name} on {[tuple(each.shape) for each in _tensors(batch)]}: output {number}"
        if one.shape != other.shape:
            raise Wrong(f"{what} has shape {tuple(other.shape)}, and not {tuple(one.shape)}")
        away = _away(one, other)
        if number not in rounding and not away <= most:
            raise Wrong(f"{what} differs by {away:.2%} of its mean")


def _away(one: Tensor, other: Tensor) -> float:
    return float((one - other).double().abs().mean() / other.double().abs().mean().clamp_min(1e-30))


def _moved(leaf: Any) -> Any:
    """A value by two units in its last place."""
    return leaf * (1 + 2.0**-22) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _ready() -> None:
    """Sets up a process that tries networks: one thread, and no warnings."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def _in_folder(family: Family, seed: int) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return tried(family, seed, Path(folder))


class _Process(threading.local):
    """A process that tries the networks of a thread, one after another; where it ends, another takes its place."""

    def __init__(self) -> None:
        self._renew()

    def _renew(self) -> None:
        self.pool = ProcessPoolExecutor(1, get_context("spawn"), _ready, max_tasks_per_child=RENEWED)

    def outcome(self, wanted: tuple[Family, int]) -> Outcome:
        try:
            return self.pool.submit(_in_folder, *wanted).result()
        except BrokenProcessPool:  # onnxruntime aborts where it should raise
            self._renew()
            return Outcome("wrong", "the process ended")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first network; the others follow")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (one a core)")
    parser.add_argument("--refused", action="store_true", help="print refusals too")
    parser.add_argument("--only", nargs="+", default=[], metavar="FAMILY:SEED")
    args = parser.parse_args(words)
    wanted = [(FAMILIES[n % len(FAMILIES)], n) for n in range(args.seed, args.seed + args.count)]
    if args.only:
        wanted = [(family, int(seed)) for family, _, seed in (each.partition(":") for each in args.only)]
        assert all(family in get_args(Family) for family, _ in wanted)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    refusals: collections.Counter[str] = collections.Counter()
    start, console, process = time.perf_counter(), Console(width=160), _Process()
    with ThreadPoolExecutor(args.jobs) as threads:
        outcomes = zip(wanted, threads.map(process.outcome, wanted), strict=True)
        for number, ((family, seed), outcome) in enumerate(outcomes, 1):
            counts[family, outcome.kind] += 1
            if outcome.kind == "refused":
                refusals[outcome.detail.partition(":")[0]] += 1
            if outcome.kind == "wrong" or args.only or (args.refused and outcome.kind == "refused"):
                console.print(f"{family}:{seed} {outcome.kind}: {outcome.detail[:600]}", markup=False, soft_wrap=True)
            if number % 50 == 0:
                console.print(f"{number} networks in {time.perf_counter() - start:.0f} s")
    table = Table("family", "right", "refused", "wrong", title=f"{len(wanted)} networks from seed {args.seed}")
    for family in FAMILIES:
        table.add_row(family, *(str(counts[family, kind]) for kind in ("right", "refused", "wrong")))
    console.print(table)
    console.print(f"refused by {dict(refusals)}; {time.perf_counter() - start:.0f} s")
    return int(any(kind == "wrong" for _, kind in counts))


if __name__ == "__main__":
    sys.exit(main())
