"""Random arguments of compile() and export(), which fit together."""

from typing import Any

from torch import Tensor, nn

from hawqfx.passes.fisher import Fisher
from hawqfx.passes.gauss_newton import GaussNewton
from hawqfx.passes.hawq_v1 import HawqV1
from hawqfx.passes.hawq_v2 import HawqV2
from hawqfx.passes.learned_rounding import LearnedRounding
from hawqfx.passes.taylor import Taylor
from tests.fuzz.draws import Choices
from tests.fuzz.networks import Case

# limits that most tiny networks can meet by 8 bits or a little less, and some that many cannot
BUDGETS = (
    "weight_bits=8", "weight_bits=6", "weight_bits=5.5", "weight_bits=4", "weight_bits=2.5", "size=400%", "size=200%",
    "size=95%", "bops=7%", "bops=4%", "bops=2%", "activation_memory=60%", "activation_memory=40%", "weight_memory=60%",
    "weight_memory=30%", "weight_bits=7, bops=7%", "weight_bits=5, activation_memory=50%", "size=300%, weight_bits=6",
)  # fmt: skip
WIDTHS = (range(2, 9), range(2, 9), (2, 4, 8), (3, 5), (7, 8), range(2, 6), (4,), (2, 3, 32), (2, 8, 32))


def settings(draw: Choices, case: Case) -> dict[str, Any]:
    """Random arguments of compile(), but for the model and the data."""
    target, widths = draw.one("any", "any", "x86-avx2"), draw.one(*WIDTHS)
    chosen: dict[str, Any] = {
        "budget": draw.one(*BUDGETS),
        "weight_bits": widths,
        "activation_bits": draw.one((4, 6, 8), (4, 6, 8), (8,), (6, 8), (2, 8), (8, 32)),
        "schemes": draw.one(
            None, None, None, ("static", "dynamic"), ("static", "dynamic", "weight-only"), ("dynamic",),
            ("weight-only",), ("static", "weight-only"),
        ),
        "block_sizes": draw.one((32, 64, 128), (32,), (64, 128)),
        "rounding": draw.one("sequential", "sequential", "sequential", "nearest", "compensated"),
        "target": target,
        "sensitivity": "mse",
        "dynamic_shapes": case.dynamic_shapes,
    }  # fmt: skip
    if draw.chance(8):
        chosen["rounding"] = LearnedRounding(steps=2)
    if draw.chance(25):
        chosen["sensitivity"] = draw.one(
            GaussNewton(probes=4), HawqV2(probes=2, tolerance=0), Fisher(probes=4), Taylor(), HawqV1(), "measured"
        )
    for name, percent, values in (
        ("refine", 6, (1,)), ("bias_correction", 20, (True, False)), ("interactions", 3, (True,)), ("batch", 10, (1, 2))
    ):  # fmt: skip
        if draw.chance(percent):
            chosen[name] = draw.one(*values)
    weights = [name for name, value in case.model.named_parameters() if value.ndim >= 2]
    if draw.chance(12):
        chosen["keep_float"] = [draw.one(*weights)]
    if draw.chance(12):
        chosen["fix"] = {draw.one(*weights): draw.one(*widths)}
    return chosen


def judged(draw: Choices, case: Case, answers: list[Any]) -> dict[str, Any] | None:
    """Arguments of compile() for a budget on `drop`, with the float network's answers for targets; None where it has
    several outputs."""
    if not all(isinstance(answer, Tensor) and answer.ndim == 2 and answer.shape[1] > 1 for answer in answers):
        return None
    labels = [answer.argmax(1) for answer in answers]
    data = [
        {**batch, "labels": label} if isinstance(batch, dict) else (batch, label)
        for batch, label in zip(case.batches, labels, strict=True)
    ]
    return {
        "budget": draw.one("drop=0.4", "drop=60%", "drop=10%"),
        "metric": lambda output, target: float((output.argmax(1) == target).float().mean()),
        "loss": nn.functional.cross_entropy,
        "data": data,
        "holdout": data,
    }
