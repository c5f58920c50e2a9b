"""What rounding is worth: the same formats, rounded to the nearest and compensated, each with its biases corrected too,
sequential, without its biases, without its scales and whole, and learned from there.

    python benchmarks/rounding.py [--quick] [--check] [--only SUBJECT ...] [--steps N] [--seeds N]

On trained networks (subjects.py; the extra `bench`), from their calibration data.  Formats are those of the default
metric on compensated codes, with weights of so many bits on average, or one width for all; activations have 8 bits.  In
onnxruntime, of the exported files: the score, agreement with the float network's argmax on what is scored, and the mean
divergence from the float network on data held out (divergence.py).  Codes are learned with seeds 0, 1 and 2, or the
first of these, which draw steps and the samples that judge; the table has the mean, and half the distance of the
extremes.  Seconds are those of rounding alone.  Results are written after each network, so a run may be stopped and
gone on with --only.
--quick: ResNet-20 with its first 128 calibration images and 256 held-out ones, at 2.5 bits, one seed, 20 steps.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from common import Claims, console, each_network, parser
from deployed import Deployed
from rich.table import Table
from subjects import SUBJECTS, Subject, divergences

import hawqfx
from hawqfx import Compiled
from hawqfx.pass_manager.base import Analysis
from hawqfx.passes.bias_correction import BiasCorrection
from hawqfx.passes.learned_rounding import LearnedRounding
from hawqfx.passes.sequential_rounding import SequentialRounding
from hawqfx.session.session import Session

# bits per weight on average, or of every weight
PLANS: dict[str, tuple[str, ...]] = {
    "resnet20": ("mixed 2.5", "uniform 2"),
    "efficientnet-lite0": ("mixed 4", "uniform 4", "mixed 3"),
    "minilm": ("mixed 4", "mixed 3"),
    "yolox-nano": ("mixed 4", "mixed 3"),
}
SEEDS = (0, 1, 2)
CORRECTED = ", biases corrected"
SEQUENTIAL = {
    "sequential, codes alone": SequentialRounding(biases=False, scales=False),
    "sequential, codes and biases": SequentialRounding(scales=False),
    "sequential, codes and scales": SequentialRounding(biases=False),
    "sequential": SequentialRounding(),
}


def examine(subject: Subject, plans: Sequence[str], learning: LearnedRounding, seeds: Sequence[int]) -> dict[str, Any]:
    """Every plan of a network in every rounding."""
    rounds: dict[str, Session] = {}
    kinds: tuple[tuple[Literal["nearest", "compensated"], str | None], ...]
    kinds = (("nearest", "mse"), ("compensated", None))  # the former takes the formats of the latter
    for rounding, metric in kinds:
        start = time.perf_counter()
        compiled = hawqfx.compile(
            subject.model, "weight_bits=8", subject.calibration, loss=subject.loss, draw=subject.draw,
            rounding=rounding, sensitivity=metric, bias_correction=False,
        )  # fmt: skip
        rounds[rounding] = compiled.session
        console.print(f"{subject.name}: compiled, {rounding}, in {time.perf_counter() - start:.0f} s")
    found: dict[str, Any] = {
        "metric": subject.metric, "n": subject.samples, "held out": len(subject.held_out_float),
        "float": subject.score(subject.model), "calibration": rounds["nearest"].context.samples, "plans": {},
    }  # fmt: skip
    for plan in plans:
        rows = found["plans"][plan] = {}
        chosen = planned(rounds["compensated"], plan)
        for name, network in (("nearest", rounded(rounds["nearest"], chosen)), ("compensated", chosen)):
            rows[name] = [answers(subject, network)]
            rows[name + CORRECTED] = [answers(subject, finished(network, BiasCorrection()))]
        for name, step in SEQUENTIAL.items():
            start = time.perf_counter()
            network = finished(chosen, step)
            seconds = time.perf_counter() - start
            rows[name] = [answers(subject, network) | {"seconds": seconds}]
        rows["learned"] = []
        for seed in seeds:
            session = replace(rounds["compensated"], finish=(SEQUENTIAL["sequential"],), learning=learning)
            session = replace(session, context=replace(session.context, seed=seed))
            start = time.perf_counter()
            network = rounded(session, chosen)
            seconds = time.perf_counter() - start
            rows["learned"].append(answers(subject, network) | {"seconds": seconds})
        console.print(f"{subject.name}, {plan}: {rows}")
    return found


def planned(session: Session, plan: str) -> Compiled:
    kind, bits = plan.split()
    if kind == "uniform":
        return session.uniform(int(bits))
    return session.at(f"weight_bits={bits}", against_uniform=False)


def rounded(session: Session, chosen: Compiled) -> Compiled:
    """A plan's formats in the rounding of a session."""
    return session.lowered(session.planner.given(chosen.planned.formats()), chosen.budget)


def finished(network: Compiled, step: Analysis) -> Compiled:
    """The network after one more pass."""
    session = replace(network.session, learning=None, finish=(step,))
    return session.lowered(network.planned, network.budget)


def answers(subject: Subject, network: Compiled) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        network.export(path)
        deployed: Callable[..., Any] = Deployed(path)
        return {
            "score": subject.score(deployed), "more": subject.more(deployed), "bytes": path.stat().st_size,
            "divergence": float(divergences(subject, deployed).mean()),
        }  # fmt: skip


def quick() -> Subject:
    full = SUBJECTS["resnet20"]()
    return replace(full, calibration=full.calibration[:1], held_out=full.held_out[:1])


def show(results: dict[str, Any]) -> None:
    table = Table("network", "plan", "rounding", "score", "other metrics", "divergence", "seconds")
    for name, found in results.items():
        title = f"{name}, {found['metric']}, float {found['float']:.4f}, n={found['n']}, held out {found['held out']}"
        for plan, rows in found["plans"].items():
            for rounding, runs in rows.items():
                more = ", ".join(f"{key} {spread([run['more'][key] for run in runs])}" for key in runs[0]["more"])
                seconds = f"{statistics.mean(run['seconds'] for run in runs):.0f}" if "seconds" in runs[0] else ""
                table.add_row(
                    title, plan, rounding, spread([run["score"] for run in runs]), more,
                    f"{statistics.mean(run['divergence'] for run in runs):.4g}", seconds,
                )  # fmt: skip
                title = ""
    console.print(table)


def spread(values: Sequence[float]) -> str:
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.4f}" + (f" +- {half:.4f}" if len(values) > 1 else "")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=PLANS, default=list(PLANS))
    options.add_argument("--steps", type=int, default=LearnedRounding().steps)
    options.add_argument("--seeds", type=int, choices=range(1, len(SEEDS) + 1), default=len(SEEDS))
    args = options.parse_args()
    if args.quick:
        results = {"resnet20": examine(quick(), ("mixed 2.5",), LearnedRounding(steps=20), SEEDS[:1])}
    else:
        learning = LearnedRounding(steps=args.steps)
        results = each_network(
            "rounding", args.only, lambda name: examine(SUBJECTS[name](), PLANS[name], learning, SEEDS[: args.seeds])
        )
    show(results)
    claims = Claims()
    for name, found in results.items():
        for plan, rows in found["plans"].items():
            learned = statistics.mean(run["divergence"] for run in rows["learned"])
            before = rows["compensated"][0]["divergence"]
            corrected = rows["compensated" + CORRECTED][0]["divergence"]
            sequential = rows["sequential"][0]["divergence"]
            claims.add(
                f"{name}, {plan}: sequential codes are nearer to float than compensated ones with corrected biases",
                sequential < corrected, f"{sequential:.4g} against {corrected:.4g}",
            )  # fmt: skip
            claims.add(
                f"{name}, {plan}: learned codes are nearer to float than compensated ones", learned < before,
                f"{learned:.4g} against {before:.4g}",
            )  # fmt: skip
    claims.finish("rounding", args, {"networks": results})


if __name__ == "__main__":
    main()
