"""How well each metric predicts what quantization does to networks, and what its allocations are worth.

    python benchmarks/fidelity.py [--quick] [--check] [--only SUBJECT ...]

On six trained networks (subjects.py; the extra `bench`).  The truth is the mean divergence from the float network on
data held out from calibration, with one site quantized at a time:

* Kendall's tau of the predicted loss increase against it, over all pairs of a weight and a width, over those of 4 bits
  and fewer, and over activations; without weights that every width holds exactly, as those of a batch-norm with one
  number for a channel, which has a scale of its own: their truth is the rounding of float32;
* the divergence and the agreement with float, on the same data, of what an allocation of every metric chooses at five
  budgets (average bits per weight; activations at 8 bits), by the fake-quantized graph;
* seconds to measure.

The default rounding, seed 0.  `gauss-newton`, `fisher` and `mse` see all calibration data, slow metrics a part (PART).
Results are written after each network, so a run may be stopped and gone on with --only.
--quick: ResNet-20 with its first 128 calibration images and 256 that are held out.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from common import Claims, console, each_network, parser
from rich.table import Table
from scipy.stats import kendalltau
from subjects import SUBJECTS, Subject, outputs

import hawqfx
from hawqfx import Compiled, pipeline
from hawqfx.errors import HawqfxError
from hawqfx.frontend.context import Context
from hawqfx.frontend.data import gather
from hawqfx.ir.facts import LossIncrease, RoundedWeights
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

GOAL = 0.9  # Kendall's tau
EXACT = 1e-12  # of the sum of squares of a weight: the square of a few units in the last place of float32
BUDGETS = (6, 5, 4, 3, 2.5)  # bits per weight on average
METRICS: dict[str, Analysis] = {
    "gauss-newton": GaussNewton(),
    "mse": Mse(),
    "hawq-v1": HawqV1(iterations=5),  # a product per site and step
    "hawq-v2": HawqV2(),
    "fisher": Fisher(),
    "taylor": Taylor(probes=8),  # a probe per width
    "measured": Measured(),
}
PART = {"hawq-v1": 16, "hawq-v2": 4, "taylor": 4, "measured": 4}  # which part of the samples slow metrics see
# batches of held-out data for the truth: a forward pass per site and width
TRUTH = {"resnet20": 4, "efficientnet-lite0": 2, "yolox-nano": 2, "minilm": 2, "upconv": 2, "crepe-tiny": 2}
KINDS = (("weights", False, 8), ("weights, 4 bits", False, 4), ("activations", True, 8))


def increases(program: Program, activations: bool, most: int) -> list[float]:
    """What is predicted of every site of a kind at every width up to `most`, in the order of the sites."""
    sites = program.activations if activations else [site for site in program.weights if errs(program, site.key)]
    facts = [program.facts.get(site.key, LossIncrease).by_format for site in sites]
    return [fact[width] for fact in facts for width in sorted(fact) if width.bits <= most]


def errs(program: Program, key: str) -> bool:
    """Whether any width leaves an error of a weight beyond that of float32."""
    errors = program.facts.get(key, RoundedWeights).squared_error.values()
    return max(errors) > EXACT * float(program.tensor(key).detach().square().sum())


def truth(subject: Subject, base: Compiled, batches: int) -> Program:
    """The program whose loss increases are mean divergences on held-out data."""
    program = base.session.measured
    rounded = {site.key: program.facts.get(site.key, RoundedWeights) for site in program.weights}
    exact = {key: replace(known, optimism=dict.fromkeys(known.codes, 1.0)) for key, known in rounded.items()}
    held_out = gather([(batch, outputs(subject.model, [batch])) for batch in subject.held_out[:batches]])
    context = Context(held_out, lambda output, wanted: subject.divergence(output, wanted).mean())
    return run([Measured()], program.learn(exact), context)


def examine(subject: Subject) -> dict[str, Any]:
    """Every metric on one network, from the same quantizers."""
    base = hawqfx.compile(
        subject.model, "weight_bits=8", subject.calibration, loss=subject.loss, draw=subject.draw, sensitivity="mse"
    )
    start = time.perf_counter()
    batches = TRUTH[subject.name]
    true = truth(subject, base, batches)
    console.print(f"{subject.name}: truth measured in {time.perf_counter() - start:.0f} s")
    found = {name: predicted(subject, base, name, metric, true) for name, metric in METRICS.items()}
    return {
        "held out": len(subject.held_out_float), "truth": len(outputs(subject.model, subject.held_out[:batches])),
        "calibration": base.session.context.samples,
        "uniform": {str(bits): answered(subject, base.uniform(bits)) for bits in (6, 5, 4, 3, 2)},
        "true": {str(bits): answered(subject, at(base, true, bits)) for bits in BUDGETS}, "metrics": found,
    }  # fmt: skip


def predicted(subject: Subject, base: Compiled, name: str, metric: Analysis, true: Program) -> dict[str, Any]:
    """One metric on one network: its time, its agreement with the truth, and its plans."""
    start = time.perf_counter()
    try:
        program = run(pipeline.recipe(metric=metric).measure, base.session.measured, fewer(base, PART.get(name, 1)))
    except HawqfxError as error:
        return {"refused": str(error)}
    seconds = time.perf_counter() - start
    tau = {
        what: float(kendalltau(increases(program, activations, most), increases(true, activations, most)).statistic)
        for what, activations, most in KINDS
    }
    plans = {str(bits): answered(subject, at(base, program, bits)) for bits in BUDGETS}
    console.print(f"{subject.name}: {name} in {seconds:.0f} s, tau {tau}, {plans}")
    return {"seconds": seconds, "tau": tau, "plans": plans}


def answered(subject: Subject, compiled: Compiled) -> dict[str, float]:
    """How far a network is from float on the held-out data."""
    answers = outputs(compiled.model, subject.held_out)
    found = {"divergence": float(subject.divergence(answers, subject.held_out_float).mean())}
    if subject.classes:
        found["agreement"] = float((answers.argmax(-1) == subject.held_out_float.argmax(-1)).double().mean())
    return found


def fewer(base: Compiled, part: int) -> Context:
    """The context with the first of so many parts of each of its batches."""
    context = base.session.context
    return replace(context, batches=tuple(batch.first(max(1, batch.size // part)) for batch in context.batches))


def at(base: Compiled, program: Program, bits: float) -> Compiled:
    return replace(base.session, measured=program).at(f"weight_bits={bits}", against_uniform=False)


def quick() -> Subject:
    full = SUBJECTS["resnet20"]()
    return replace(full, calibration=full.calibration[:1], held_out=full.held_out[:1])


def show(results: dict[str, Any]) -> None:
    columns = ("tau", "tau, 4 bits", "tau, activations", *(f"{bits} bits" for bits in BUDGETS), "seconds")
    for name, result in results.items():
        title = (
            f"{name}: mean divergence from float and agreement, n={result['held out']}; tau over n={result['truth']}; "
            f"calibrated on {result['calibration']}"
        )
        table = Table("metric", *columns, title=title)
        for metric, found in result["metrics"].items():
            if "refused" in found:
                table.add_row(metric, found["refused"])
                continue
            taus = [f"{value:.3f}" for value in found["tau"].values()]
            table.add_row(metric, *taus, *cells(found["plans"], BUDGETS), f"{found['seconds']:.0f}")
        table.add_row("one site at a time, held out", "", "", "", *cells(result["true"], BUDGETS))
        table.add_row("uniform bits, rounded down", "", "", "", *cells(result["uniform"], map(math.floor, BUDGETS)))
        console.print(table)


def cells(plans: dict[str, Any], budgets: Iterable[float]) -> list[str]:
    return [
        f"{plans[str(bits)]['divergence']:.4g}"
        + (f" {plans[str(bits)]['agreement']:.3f}" if "agreement" in plans[str(bits)] else "")
        for bits in budgets
    ]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=TRUTH, default=list(TRUTH))
    args = options.parse_args()
    if args.quick:
        results = {"resnet20": examine(quick())}
    else:
        results = each_network("fidelity", args.only, lambda name: examine(SUBJECTS[name]()))
    show(results)
    claims = Claims()
    default = pipeline.DEFAULT_METRIC
    for name, result in results.items():
        tau = result["metrics"][default]["tau"]["weights"]
        claims.add(f"{name}: tau of the default, {default}, over weights is at least {GOAL}", tau >= GOAL, f"{tau:.3f}")
    claims.finish("fidelity", args, {"networks": results, "seed": 0})


if __name__ == "__main__":
    main()
