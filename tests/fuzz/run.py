"""Compiles random networks and compares their files with onnxruntime; `make fuzz`.

    python -m tests.fuzz.run [--count N] [--seed N] [--only FAMILY:SEED ...]

Every network is compiled under a random budget, with random widths, schemes, packing, target and rounding, exported,
and run.  The file must compute what the graph computes, or the network must be refused by an error of hawqfx; a
PassError, an ExportError or a BackendError is no refusal, but a promise that hawqfx broke.  Anything else is a finding,
and its FAMILY:SEED is printed.
"""

import argparse
import collections
import logging
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils import _pytree as pytree

import hawqfx
from hawqfx.errors import BackendError, ExportError, HawqfxError, PassError
from hawqfx.runtime import ort
from tests.fuzz.networks import FAMILIES, Choices, Family, case

SAME = 0.02  # of the outputs' mean: flipped ties, in networks of a few layers


@dataclass(frozen=True)
class Outcome:
    """What became of a network.

    Args:
        kind: "right", "refused", or "wrong".
        detail: the refusal, or what is wrong.
    """

    kind: str
    detail: str = ""


def options(draw: Choices) -> dict[str, Any]:
    """A random budget, and random options beside it."""
    widths = draw.one(range(2, 9), (2, 4, 8), (3, 5), (8,), range(2, 6))
    budget = draw.one(
        "weight_bits=6", "weight_bits=8", "weight_bits=7", "size=400%", "bops=6%", "bops=5%", "activation_memory=95%",
        "weight_memory=60%", "weight_bits=7, bops=7%",
    )  # fmt: skip
    return {
        "budget": budget,
        "weight_bits": widths,
        "activation_bits": draw.one((4, 6, 8), (8,), (6, 8)),
        "schemes": draw.one(None, None, None, ("static", "dynamic"), ("static", "dynamic", "weight-only")),
        "rounding": draw.one("nearest", "compensated"),
        "target": draw.one("any", "any", "x86-avx2"),
        "sensitivity": "mse",
    }


def tried(family: Family, seed: int, folder: Path) -> Outcome:
    """Compile, export and run one network."""
    found, draw = case(family, seed), Choices(seed + 1_000_000)
    packing = draw.one("portable", "portable", "native")
    path = folder / f"{family}-{seed}.onnx"
    try:
        compiled = hawqfx.compile(found.model, data=found.batches, **options(draw))
        compiled.export(path, packing)
    except (PassError, ExportError, BackendError) as error:  # a promise broken, a file that is wrong or does not load
        return Outcome("wrong", f"{type(error).__name__}: {error}")
    except HawqfxError as error:
        return Outcome("refused", f"{type(error).__name__}: {error}")
    except Exception as error:  # what the fuzz is to find
        return Outcome("wrong", f"{type(error).__name__}: {error}")
    return _compared(compiled, path, found.batches[0])


@torch.no_grad()
def _compared(compiled: hawqfx.Compiled, path: Path, batch: Any) -> Outcome:
    """The file against the graph, on other samples than the export was checked on: two of the first batch."""
    kwargs = batch if isinstance(batch, dict) else {}
    args = () if isinstance(batch, dict) else (batch,)
    args, kwargs = pytree.tree_map(lambda x: x[:2].flip(0), (args, kwargs))
    graph = [leaf for leaf in pytree.tree_leaves(compiled.model(*args, **kwargs)) if isinstance(leaf, Tensor)]
    tensors = [leaf.numpy() for leaf in pytree.tree_leaves((args, kwargs))]
    answers = [torch.from_numpy(each) for each in ort.run(ort.session(path), tensors)]
    if len(graph) != len(answers):
        return Outcome("wrong", f"the file has {len(answers)} outputs, the graph {len(graph)}")
    for number, (one, other) in enumerate(zip(answers, graph, strict=True)):
        if one.shape != other.shape:
            return Outcome("wrong", f"output {number} has shape {tuple(one.shape)}, the graph's {tuple(other.shape)}")
        away = float((one - other).double().abs().mean() / other.double().abs().mean().clamp_min(1e-30))
        if not away <= SAME:
            return Outcome("wrong", f"output {number} differs by {away:.1%} of its mean")
    return Outcome("right")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first network; the others follow")
    parser.add_argument("--refused", action="store_true", help="print refusals too")
    parser.add_argument("--only", nargs="+", default=[], metavar="FAMILY:SEED")
    args = parser.parse_args(words)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    wanted = [(FAMILIES[n % len(FAMILIES)], n) for n in range(args.seed, args.seed + args.count)]
    if args.only:
        wanted = [(family, int(seed)) for family, _, seed in (each.partition(":") for each in args.only)]
        assert all(family in get_args(Family) for family, _ in wanted)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    refusals: collections.Counter[str] = collections.Counter()
    start, console = time.perf_counter(), Console(width=160)
    with tempfile.TemporaryDirectory() as folder:
        for family, seed in wanted:
            outcome = tried(family, seed, Path(folder))
            counts[family, outcome.kind] += 1
            if outcome.kind == "refused":
                refusals[outcome.detail.partition(":")[0]] += 1
            if outcome.kind == "wrong" or args.only or (args.refused and outcome.kind == "refused"):
                console.print(f"{family}:{seed} {outcome.kind}: {outcome.detail[:600]}", markup=False, soft_wrap=True)
            for file in Path(folder).iterdir():
                file.unlink()
    table = Table("family", "right", "refused", "wrong", title=f"{len(wanted)} networks from seed {args.seed}")
    for family in FAMILIES:
        table.add_row(family, *(str(counts[family, kind]) for kind in ("right", "refused", "wrong")))
    console.print(table)
    console.print(f"refused by {dict(refusals)}; {time.perf_counter() - start:.0f} s")
    return int(any(kind == "wrong" for _, kind in counts))


if __name__ == "__main__":
    sys.exit(main())
