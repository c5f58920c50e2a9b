"""Predicted against measured latency of whole networks, and budgets on latency.

    python benchmarks/latency_model.py [--quick] [--check]

ResNet-20, EfficientNet-Lite0 and MiniLM (subjects.py; the extra `bench`), one sample, one thread.  Nine plans each,
from all float to all 8 bits, with weights, activations or whole stretches of the network at other widths or in float:
the latency that the parts predict (hawqfx/latency) beside that of the exported file, medians of runs in bursts, in
turns.  Then six budgets between the two ends for each network: does the exported plan keep them, when it is timed once
more?  A machine that is shared runs faster in one minute than in another: the two ends are timed again beside the other
plans, and for the claim predictions are scaled by as much as both moved since the parts were timed (`drift`).  Parts
are timed anew, in a folder of their own.  --quick: ResNet-20 alone.
"""

import random
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import Claims, arguments, console
from rich.table import Table
from subjects import SUBJECTS

import hawqfx
from hawqfx.errors import InfeasibleBudget
from hawqfx.ir.facts import ChosenFormat, Fact
from hawqfx.ir.sites import WeightSite
from hawqfx.latency.profiler import profile
from hawqfx.maths.formats import FLOAT, Format
from hawqfx.runtime import ort
from hawqfx.session.session import Session

NETWORKS = ("resnet20", "efficientnet-lite0", "minilm")
SECONDS = 12.0  # for the runs of all files of a network
STEPS = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)  # of the way from all 8 bits to all float
NEAR, KEPT = 0.15, 5


def plans(session: Session) -> dict[str, dict[str, Format]]:
    draw = random.Random(0)
    sites = session.measured.sites
    keys = [site.key for site in sites]
    weights = list(dict.fromkeys(layer.weight for layer in session.measured.layers))
    activations = [site.key for site in session.measured.activations]
    first = {*weights[: len(weights) // 2], *activations[: len(activations) // 2]}
    mixed_weights = {s.key: Format(draw.randint(2, 8)) if isinstance(s, WeightSite) else Format(8) for s in sites}
    mixed_activations = {s.key: Format(8 if isinstance(s, WeightSite) else draw.choice((4, 6, 8))) for s in sites}
    return {
        "all float": dict.fromkeys(keys, FLOAT),
        "all 8 bits": dict.fromkeys(keys, Format(8)),
        "weights of 2 to 8 bits": mixed_weights,
        "activations of 4, 6 and 8 bits": mixed_activations,
        "a third of the sites float": {key: FLOAT if draw.random() < 1 / 3 else Format(8) for key in keys},
        "a tenth of the sites float": {key: FLOAT if draw.random() < 0.1 else Format(8) for key in keys},
        "first half float": {key: FLOAT if key in first else Format(8) for key in keys},
        "second half float": {key: Format(8) if key in first else FLOAT for key in keys},
        "every other weight float": {key: FLOAT if key in weights[1::2] else Format(8) for key in keys},
    }


def times(session: Session, formats: dict[str, dict[str, Format]]) -> dict[str, float]:
    """Measured seconds of the exported files."""
    sample = session.context.batches[0].first(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, widths in enumerate(formats.values()):
            facts: dict[str, Fact] = {key: ChosenFormat(width, 0.0) for key, width in widths.items()}
            paths.append(Path(folder) / f"{number}.onnx")
            session.lowered(session.measured.learn(facts), "").export(paths[-1])
        feeds = []
        for path in paths:
            names = [value.name for value in ort.session(path).get_inputs()]
            feeds.append(dict(zip(names, (tensor.numpy() for tensor in sample.tensors), strict=True)))
        return dict(zip(formats, ort.steady(paths, feeds, threads=1, budget=SECONDS), strict=True))


def kept_formats(session: Session, budget: str) -> dict[str, Format] | None:
    """The formats for a budget on latency; None where it is refused, which counts as not kept."""
    try:
        return session.at(budget, against_uniform=False).planned.formats()
    except InfeasibleBudget as error:
        console.print(f"[yellow]{error}[/]")
        return None


def examine(name: str, cache: Path) -> dict[str, Any]:
    subject = SUBJECTS[name]()
    compiled = hawqfx.compile(
        subject.model, "weight_bits=8", subject.calibration, loss=subject.loss, draw=subject.draw,
        sensitivity="mse", rounding="nearest", samples=4,
    )  # fmt: skip
    session = compiled.session
    table = profile(session.measured, session.context.batches[0], cache=cache, progress=session.context.progress)
    bits = plans(session)
    found = {plan: {"predicted": table.seconds(bits[plan]), "measured": t} for plan, t in times(session, bits).items()}
    low, high = (table.seconds(bits[plan]) for plan in ("all 8 bits", "all float"))
    timed = replace(session, measured=session.measured.learn_about_network(table))
    budgets = {f"latency={1e3 * (low + step * (high - low)):.4f}ms": low + step * (high - low) for step in STEPS}
    answers = {text: kept_formats(timed, text) for text in budgets}
    chosen = {text: widths for text, widths in answers.items() if widths is not None}
    measured = times(session, chosen)
    kept = {text: {"budget": budgets[text], "predicted": table.seconds(bits), "measured": measured[text]}
            for text, bits in chosen.items()}  # fmt: skip
    return {"plans": found, "budgets": kept}


def drift(found: dict[str, Any]) -> float:
    """How much slower the machine was when whole plans were timed than when parts were."""
    ends = (found["plans"][plan] for plan in ("all float", "all 8 bits"))
    return statistics.geometric_mean(row["measured"] / row["predicted"] for row in ends)


def main() -> None:
    args = arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        results = {name: examine(name, Path(folder)) for name in NETWORKS[: 1 if args.quick else None]}
    report(results, args)


def report(results: dict[str, Any], args: Any) -> None:
    claims = Claims()
    for name, found in results.items():
        found["drift"] = drift(found)
        table = Table("plan", "predicted, ms", "measured, ms", "ratio", title=name)
        for plan, row in {**found["plans"], **found["budgets"]}.items():
            cells = (f"{1e3 * row[key]:.3f}" for key in ("predicted", "measured"))
            table.add_row(plan, *cells, f"{row['predicted'] / row['measured']:.3f}")
        console.print(table)
        ratios = [found["drift"] * row["predicted"] / row["measured"] for row in found["plans"].values()]
        text = ", ".join(f"{ratio:.2f}" for ratio in ratios) + f"; drift {found['drift']:.2f}"
        claims.add(f"{name}: predicted within 15% on nine plans", all(abs(r - 1) <= NEAR for r in ratios), text)
        rows = found["budgets"].values()
        kept = sum(row["measured"] <= row["budget"] for row in rows)
        text = f"{kept} of {len(STEPS)}: " + ", ".join(f"{row['measured'] / row['budget']:.3f}" for row in rows)
        claims.add(f"{name}: a budget on latency is kept by the file in {KEPT} of 6 cases", kept >= KEPT, text)
    claims.finish("latency_model", args, {"networks": results, "threads": 1, "seed": 0})


if __name__ == "__main__":
    main()
