"""Whether it pays to let the allocation see what the errors of two weights do together.

    python benchmarks/interactions.py [--quick] [--check]

ResNet-20 on Fashion-MNIST and EfficientNet-Lite0 with ImageNet weights (subjects.py; the extra `bench`), two tight
budgets each, activations at 8 bits: the sum of single sites against the same with the 64 strongest pairs of weights
(passes/interactions.py), by the loss of the calibration data and the score.  Seed 0.
--quick: ResNet-20 with its first 128 calibration images, one budget.
"""

import time
from dataclasses import replace
from typing import Any

from common import Claims, arguments, console
from rich.table import Table
from subjects import SUBJECTS

import hawqfx
from hawqfx.ir.facts import Account
from hawqfx.options import STRONGEST

BUDGETS = (3, 2.5)  # bits per weight on average
SAMPLES = {"resnet20": 512, "efficientnet-lite0": 32}


def compared(name: str, budgets: tuple[float, ...], samples: int) -> dict[str, Any]:
    subject = SUBJECTS[name]()
    start = time.perf_counter()
    compiled = hawqfx.compile(
        subject.model, "weight_bits=8", subject.calibration, loss=subject.loss, draw=subject.draw,
        samples=samples, interactions=True,
    )  # fmt: skip
    rules = compiled.session.allocation
    found: dict[str, Any] = {"samples": samples, "scored": subject.samples, "float": subject.score(subject.model)}
    found["seconds"] = time.perf_counter() - start
    for bits in budgets:
        for word, pairs in (("single", 0), ("pairs", STRONGEST)):
            session = replace(compiled.session, allocation=replace(rules, interactions=pairs))
            plan = session.at(f"weight_bits={bits}", against_uniform=False)
            loss, score = plan.calibration_loss()[1], subject.score(plan.model)
            account = plan.planned.about(Account)
            found[f"{bits} bits, {word}"] = {"loss": loss, "score": score, "proven": account.optimal}
    return found


def main() -> None:
    args = arguments(__doc__)
    if args.quick:
        results = {"resnet20": compared("resnet20", BUDGETS[:1], 128)}
    else:
        results = {name: compared(name, BUDGETS, samples) for name, samples in SAMPLES.items()}
    table = Table("network", "budget", "loss", "score", "proven least")
    claims = Claims()
    for name, found in results.items():
        for key, row in found.items():
            if isinstance(row, dict):
                table.add_row(name, key, f"{row['loss']:.4f}", f"{row['score']:.4f}", str(row["proven"]))
        better = [
            found[f"{bits} bits, pairs"]["loss"] < found[f"{bits} bits, single"]["loss"]
            and found[f"{bits} bits, pairs"]["score"] > found[f"{bits} bits, single"]["score"]
            for bits in BUDGETS
            if f"{bits} bits, pairs" in found
        ]
        claims.add(
            f"{name}: pairs bring a lower loss and a better score",
            all(better),
            f"at {sum(better)} budgets of {len(better)}",
        )
    console.print(table)
    claims.finish("interactions", args, {"networks": results, "pairs": STRONGEST, "seed": 0})


if __name__ == "__main__":
    main()
