"""A compiled network in words and tables."""

import io

from rich.console import Console
from rich.table import Table

from hawqfx.ir.facts import ByteCost, ChosenFormat, Sensitivity
from hawqfx.ir.program import Program
from hawqfx.session.plan import Plan


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


def summary(planned: Program, budget: str, samples: int, losses: tuple[float, float]) -> str:
    """The table as text, the cost in bytes and in loss, and the nodes in float with their reasons.

    Args:
        planned: the float program with the chosen formats.
        budget: the text that the plan is for.
        samples: number of calibration samples.
        losses: the mean loss on them, of the float network and of the compiled one.
    """
    text = io.StringIO()
    console = Console(file=text, width=110)
    console.print(site_table(planned, budget))
    console.print(Plan.of(planned, budget).explain())
    size, reference, (float_loss, loss) = weight_bytes(planned), planned.float_bytes(), losses
    console.print(f"weights {size} bytes, {size / reference:.2%} of float32's {reference}")
    console.print(
        f"loss on {samples} calibration samples {loss:.4f}, float32 {float_loss:.4f}; "
        f"predicted increase, in the unit of the metric, {predicted_loss(planned):.4g}"
    )
    for node, reason in planned.left_float.items():
        console.print(f"in float: {node}: {reason}")
    return text.getvalue()
