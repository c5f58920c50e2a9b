"""How well each metric predicts what quantization does to the loss, and what its allocations are worth.

    python benchmarks/fidelity.py [--quick] [--check] [--only SUBJECT ...]

On four trained networks (subjects.py; the extra `bench`), from their calibration data:

* Kendall's tau of the predicted loss increase against the measured one (the metric `measured`), over all pairs of a
  weight and a width, over those of 4 bits and fewer, and over activations;
* the score of the network with the weights that an allocation of every metric chooses at four budgets (average bits per
  weight; activations at 8 bits), by the fake-quantized graph;
* seconds to measure.

Compensated rounding, seed 0.  Results are written after each network, so a run may be stopped and gone on with --only.
--quick: ResNet-20 with its first 128 calibration images, scored on the 2,000 images of hawqfx.zoo.
"""

import time
from dataclasses import replace
from typing import Any

import torch
from common import Claims, console, each_network, parser
from rich.table import Table
from scipy.stats import kendalltau
from subjects import SUBJECTS, Subject

import hawqfx
from hawqfx import Compiled, pipeline, zoo
from hawqfx.errors import HawqfxError
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import LossIncrease
from hawqfx.ir.program import Program
from hawqfx.pass_manager.base import Analysis
from hawqfx.pass_manager.manager import run
from hawqfx.passes.fisher import Fisher
from hawqfx.passes.gauss_newton import GaussNewton
from hawqfx.passes.hawq_v1 import HawqV1
from hawqfx.passes.hawq_v2 import HawqV2
from hawqfx.passes.measured import Measured
from hawqfx.passes.mse import Mse
from hawqfx.passes.taylor import Taylor

BUDGETS = (5, 4, 3, 2.5)  # bits per weight on average
# hawq-v1 takes a product per site and step, so: five steps, and a quarter of the samples; taylor a probe per width
METRICS: dict[str, Analysis] = {
    "gauss-newton": GaussNewton(),
    "mse": Mse(),
    "hawq-v1": HawqV1(iterations=5),
    "hawq-v2": HawqV2(),
    "fisher": Fisher(),
    "taylor": Taylor(probes=8),
    "measured": Measured(),
}
SAMPLES = {"resnet20": 256, "minilm": 16, "efficientnet-lite0": 16, "yolox-nano": 4}  # to measure on
PART = {"hawq-v1": 4}


def increases(program: Program, activations: bool, most: int) -> list[float]:
    """What is predicted of every site of a kind at every width up to `most`, in the order of the sites."""
    sites = program.activations if activations else program.weights
    facts = [program.facts.get(site.key, LossIncrease).by_format for site in sites]
    return [fact[width] for fact in facts for width in sorted(fact) if width.bits <= most]


def examine(subject: Subject) -> dict[str, Any]:
    """Every metric on one network, measured from the same quantizers."""
    base = hawqfx.compile(
        subject.model,
        "weight_bits=8",
        subject.calibration,
        loss=subject.loss,
        draw=subject.draw,
        sensitivity="mse",
        samples=SAMPLES[subject.name],
    )
    found: dict[str, Any] = {}
    programs: dict[str, Program] = {}
    for name, metric in METRICS.items():
        start = time.perf_counter()
        try:
            programs[name] = run(
                pipeline.recipe(metric=metric).measure, base.session.measured, fewer(base, PART.get(name, 1))
            )
        except HawqfxError as error:
            found[name] = {"refused": str(error)}
            continue
        found[name] = {"seconds": time.perf_counter() - start}
        console.print(f"{subject.name}: {name} measured in {found[name]['seconds']:.0f} s")
    truth = programs["measured"]
    for name, program in programs.items():
        pairs = {
            what: (increases(program, activations, most), increases(truth, activations, most))
            for what, activations, most in (
                ("weights", False, 8),
                ("weights, 4 bits", False, 4),
                ("activations", True, 8),
            )
        }
        found[name]["tau"] = {what: float(kendalltau(*both).statistic) for what, both in pairs.items()}
        found[name]["scores"] = {f"{bits} bits": subject.score(at(base, program, bits).model) for bits in BUDGETS}
        console.print(f"{subject.name}: {name} {found[name]}")
    return {
        "metric": subject.metric, "samples": subject.samples, "float": subject.score(subject.model),
        "uniform": {f"{bits} bits": subject.score(base.uniform(bits).model) for bits in (8, 5, 4, 3)},
        "calibration": base.session.context.samples, "metrics": found,
    }  # fmt: skip


def fewer(base: Compiled, part: int) -> Context:
    """The context with the first of so many parts of each of its batches."""
    context = base.session.context
    return replace(context, batches=tuple(batch.first(max(1, batch.size // part)) for batch in context.batches))


def at(base: Compiled, program: Program, bits: float) -> Compiled:
    return replace(base.session, measured=program).at(f"weight_bits={bits}", against_uniform=False)


def quick() -> Subject:
    full = SUBJECTS["resnet20"]()
    images, labels = (torch.cat(part) for part in zip(*zoo.evaluation(), strict=True))

    def score(model: Any) -> float:
        with torch.no_grad():
            return float((model(images).argmax(1) == labels).double().mean())

    return replace(full, calibration=full.calibration[:1], score=score, samples=len(labels))


def show(results: dict[str, Any]) -> None:
    columns = ("tau", "tau, 4 bits", "tau, activations", *(f"{bits} bits" for bits in BUDGETS), "seconds")
    for name, result in results.items():
        title = f"{name}: {result['metric']} {result['float']:.4f} in float, n={result['samples']}"
        table = Table("metric", *columns, title=title)
        for metric, found in result["metrics"].items():
            if "refused" in found:
                table.add_row(metric, found["refused"])
                continue
            cells = [f"{value:.2f}" for value in found["tau"].values()]
            cells += [f"{value:.4f}" for value in found["scores"].values()]
            table.add_row(metric, *cells, f"{found['seconds']:.0f}")
        uniform = result["uniform"]
        table.add_row("uniform bits", "", "", "", *(f"{uniform.get(f'{b} bits', float('nan')):.4f}" for b in BUDGETS))
        console.print(table)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=SAMPLES, default=list(SAMPLES))
    args = options.parse_args()
    if args.quick:
        results = {"resnet20": examine(quick())}
    else:
        results = each_network("fidelity", args.only, lambda name: examine(SUBJECTS[name]()))
    show(results)
    claims = Claims()
    default = pipeline.DEFAULT_METRIC
    for name, result in results.items():
        taus = {m: f["tau"]["weights"] for m, f in result["metrics"].items() if "tau" in f and m != "measured"}
        if default not in taus:
            claims.add(f"{name}: the default, {default}, was measured", False, "run it again with --only")
            continue
        claims.add(
            f"{name}: the default, {default}, ranks better than the squared error alone",
            taus[default] > taus["mse"],
            ", ".join(f"{metric} {tau:.2f}" for metric, tau in taus.items()),
        )
    claims.finish("fidelity", args, {"networks": results, "seed": 0})


if __name__ == "__main__":
    main()
