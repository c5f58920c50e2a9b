"""A compiled network in words and tables."""

import io
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from hawqfx.ir.facts import ByteCost, ChosenFormat, Sensitivity
from hawqfx.ir.program import Program
from hawqfx.session.plan import Plan
from hawqfx.session.planner import Rival


def site_table(planned: Program, budget: str) -> Table:
    """A row per site: kind, shape, mean trace and its standard error, bits, bytes, predicted loss increase."""
    columns = ("site", "kind", "shape", "mean trace", "+-", "bits", "bytes", "loss increase")
    table = Table(*columns, title=f"budget {budget}")
    for site in planned.sites:
        choice = planned.facts.get(site.key, ChosenFormat)
        trace = error = size = "-"
        if planned.facts.has(site.key, Sensitivity):
            fact = planned.facts.get(site.key, Sensitivity)
            trace, error = f"{fact.curvature:.2e}", f"{fact.stderr:.0e}"
        if planned.facts.has(site.key, ByteCost):
            size = str(planned.facts.get(site.key, ByteCost).bytes[choice.format])
        shape, bits = "x".join(map(str, site.shape)), str(choice.format).removesuffix(" bits")
        table.add_row(site.key, site.kind, shape, trace, error, bits, size, f"{choice.increase:.1e}")
    return table


def weight_bytes(planned: Program) -> int:
    """The size that a plan promises: bytes of the exported file that belong to weights."""
    chosen = planned.formats()
    sites = sum(planned.facts.get(site.key, ByteCost).bytes[chosen[site.key]] for site in planned.weights)
    return planned.fixed_bytes() + sites


def predicted_loss(planned: Program) -> float:
    """The sum of the predicted loss increases over the sites."""
    return sum(planned.facts.get(site.key, ChosenFormat).increase for site in planned.sites)


def summary(
    planned: Program,
    budget: str,
    samples: int,
    losses: tuple[float, float],
    rival: Rival | None,
    scores: Mapping[str, tuple[float, float]],
    loss_reason: str,
) -> str:
    """The loss and its reason, the table, the cost in bytes and in loss, and the nodes in float with their reasons.

    Args:
        planned: the float program with the chosen formats.
        budget: the text that the plan is for.
        samples: number of calibration samples.
        losses: the mean loss on them, of the float network and of the compiled one.
        rival: uniform bits within the same limits, if they were tried.
        loss_reason: the name of the loss and why it is taken.
        scores: the metric of the float network and of the compiled one, by the name of the data.
    """
    text = io.StringIO()
    console = Console(file=text, width=110)
    console.print(f"loss: {loss_reason}", soft_wrap=True)
    console.print(f"calibrated on {samples} samples")
    console.print(site_table(planned, budget))
    console.print(Plan.of(planned, budget).explain())
    size, reference, (float_loss, loss) = weight_bytes(planned), planned.float_bytes(), losses
    console.print(f"weights {size} bytes, {size / reference:.2%} of float32's {reference}")
    console.print(
        f"loss on the calibration samples {loss:.5g}, float32 {float_loss:.5g}; "
        f"predicted increase, in the unit of the metric, {predicted_loss(planned):.4g}"
    )
    if rival is not None:
        uniform = f"uniform bits within the same limits (weights {rival.weights}, activations {rival.activations})"
        verdict = "they are returned" if rival.chosen else "the plan is returned"
        difference = f"the plan's loss less theirs {rival.behind}"
        console.print(f"{uniform}: loss {rival.loss:.4g}; {difference}, paired by sample: {verdict}")
    for data, (float_score, score) in scores.items():
        console.print(f"metric on the {data} {score:.4g}, float32 {float_score:.4g}")
    for key in (key for key, width in planned.formats().items() if width.is_float):
        console.print(f"in float: {key}: chosen by the plan")
    for node, reason in planned.left_float.items():
        console.print(f"in float: {node}: {reason}")
    return text.getvalue()
