"""What mixed precision is worth: the plan of a budget against one width for all weights.

    python benchmarks/uniform.py [--quick] [--check] [--only SUBJECT ...]

On trained networks (subjects.py; the extra `bench`), compiled once each from their calibration data, with weights of so
many bits on average and activations of 8: the mean divergence from the float output on held-out data (divergence.py) of

* the plan alone, and what `compile` returns: uniform bits instead, where these lose less on the calibration data;
* uniform bits within the same budget: the same average for whole numbers, and 2 bits for an average of 2.5, the widest
  that the budget holds, which is also the rival that `compile` tries.

The ratio is that of the means, mixed to uniform; the standard error is that of the mean of the paired differences,
sample by sample.  Agreement is the share of held-out samples with the float network's argmax.  The default
rounding, seed 0.  Results are written after each network, so a run may be stopped and gone on with --only.
--quick: ResNet-20 with its first 128 calibration images and 256 held-out ones, two budgets.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from common import Claims, console, each_network, parser
from rich.table import Table
from subjects import SUBJECTS, Subject, outputs

import hawqfx
from hawqfx import Compiled
from hawqfx.maths.paired import SIGNIFICANT, paired_difference

BUDGETS = (6, 5, 4, 3, 2.5)  # bits per weight on average
GAIN = 0.6  # the geometric mean of the ratios is claimed to be at most this


def examine(subject: Subject, budgets: Sequence[float] = BUDGETS) -> dict[str, Any]:
    """One network under every budget."""
    start = time.perf_counter()
    base = hawqfx.compile(
        subject.model, f"weight_bits={budgets[0]}", subject.calibration, loss=subject.loss, draw=subject.draw
    )
    found: dict[str, Any] = {
        "seconds": time.perf_counter() - start, "calibration": base.session.context.samples,
        "held out": len(subject.held_out_float), "budgets": {},
    }  # fmt: skip
    console.print(f"{subject.name}: compiled in {found['seconds']:.0f} s")
    for bits in budgets:
        found["budgets"][str(bits)] = row = under(base, subject, bits)
        console.print(f"{subject.name}, {bits} bits: {row}")
    return found


def under(base: Compiled, subject: Subject, bits: float) -> dict[str, Any]:
    """The plan of one budget, what is returned for it, and uniform bits within it."""
    budget, even = f"weight_bits={bits}", math.floor(bits)
    returned = base.at(budget)
    gave_way = returned.rival is not None and returned.rival.chosen
    answers = {"returned": outputs(returned.model, subject.held_out)}
    answers["uniform"] = outputs(base.uniform(even).model, subject.held_out)
    answers["refined"] = outputs(base.at(budget, against_uniform=False, refine=1).model, subject.held_out)
    answers["plan"] = answers["returned"]
    if gave_way:
        answers["plan"] = outputs(base.at(budget, against_uniform=False).model, subject.held_out)
    found = {kind: subject.divergence(answer, subject.held_out_float) for kind, answer in answers.items()}
    row: dict[str, Any] = {"uniform bits": even, "returned uniform": gave_way}
    for kind, values in found.items():
        row[kind] = {"divergence": float(values.mean())}
        if kind != "uniform":
            behind = paired_difference(values, found["uniform"], torch.ones_like(values))
            ratio = float(values.mean() / found["uniform"].mean())
            row[kind] |= {"ratio": ratio, "difference": behind.mean, "stderr": behind.stderr}
        if subject.classes:
            same = answers[kind].argmax(-1) == subject.held_out_float.argmax(-1)
            row[kind]["agreement"] = float(same.double().mean())
    return row


def quick() -> Subject:
    full = SUBJECTS["resnet20"]()
    return replace(full, calibration=full.calibration[:1], held_out=full.held_out[:1])


def show(results: dict[str, Any]) -> None:
    columns = ("bits", "uniform", "plan", "ratio", "refined", "returned", "ratio", "difference", "agreement")
    table = Table("network", *columns, title="Mean divergence from float on held-out data, against uniform bits")
    for name, found in results.items():
        for bits, row in found["budgets"].items():
            plan, returned, uniform = row["plan"], row["returned"], row["uniform"]
            agreement = ""
            if "agreement" in plan:
                agreement = f"{returned['agreement']:.3f} against {uniform['agreement']:.3f}"
            table.add_row(
                f"{name}, n={found['held out']}", f"{bits}, {row['uniform bits']}", f"{uniform['divergence']:.4g}",
                f"{plan['divergence']:.4g}", f"{plan['ratio']:.3f}", f"{row['refined']['divergence']:.4g}",
                "uniform" if row["returned uniform"] else "plan", f"{returned['ratio']:.3f}",
                f"{returned['difference']:+.2g} +- {returned['stderr']:.1g}", agreement,
            )  # fmt: skip
    console.print(table)


def claim(results: dict[str, Any], claims: Claims) -> None:
    for kind in ("plan", "returned"):
        rows = {
            f"{name} at {bits} bits": row[kind]
            for name, found in results.items()
            for bits, row in found["budgets"].items()
        }
        worse = [where for where, row in rows.items() if row["difference"] > SIGNIFICANT * row["stderr"]]
        claims.add(
            f"{kind}: nowhere further from float than uniform bits, beyond two standard errors",
            not worse,
            f"{', '.join(worse) or 'nowhere'}, of {len(rows)}",
        )
        mean = statistics.geometric_mean(row["ratio"] for row in rows.values())
        claims.add(f"{kind}: {GAIN} times the divergence of uniform bits or less", mean <= GAIN, f"{mean:.3f}")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    args = options.parse_args()
    if args.quick:
        results = {"resnet20": examine(quick(), BUDGETS[2:4])}
    else:
        results = each_network("uniform", args.only, lambda name: examine(SUBJECTS[name]()))
    show(results)
    claims = Claims()
    claim(results, claims)
    claims.finish("uniform", args, {"networks": results, "seed": 0})


if __name__ == "__main__":
    main()
