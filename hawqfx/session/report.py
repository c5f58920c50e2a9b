"""A compiled network in words and tables."""

import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hawqfx.ir.facts import Account, ByteCost, ChosenFormat, FileText, Quantizers, RoundedWeights, Sensitivity
from hawqfx.ir.names import names_of
from hawqfx.ir.program import KEPT_IN_FLOAT, Program
from hawqfx.maths.formats import FLOAT_BITS
from hawqfx.maths.rounding import STRONGEST_DAMPING
from hawqfx.session.plan import Plan
from hawqfx.session.record import Calibrated, Trials

if TYPE_CHECKING:
    from rich.table import Table


def site_table(planned: Program, budget: str) -> "Table":
    """A row per site: kind, shape, mean trace and its standard error, bits, bytes, predicted loss increase."""
    from hawqfx.session.fitting_table import FittingTable  # loads rich, without which `import hawqfx` does

    columns = ("site", "kind", "shape", "mean trace", "+-", "bits", "bytes", "loss increase")
    # what the plan says of a site stays; the rest is in explain() and in the report
    table = FittingTable(*columns, spare=("kind", "+-", "shape", "mean trace"), title=f"budget {budget}")
    for site in planned.sites:
        choice = planned.facts.get(site.key, ChosenFormat)
        trace = error = size = "-"
        if planned.facts.has(site.key, Sensitivity):
            fact = planned.facts.get(site.key, Sensitivity)
            trace, error = f"{fact.curvature:.2e}", f"{fact.stderr:.0e}"
        if planned.facts.has(site.key, ByteCost):
            size = str(planned.facts.get(site.key, ByteCost).bytes[choice.format])
        shape, bits = "x".join(map(str, site.shape)), str(choice.format).removesuffix(" bits")
        table.add_row(site.name, site.kind, shape, trace, error, bits, size, f"{choice.increase:.1e}")
    return table


def file_bytes(planned: Program) -> int | None:
    """The size of the exported file, in the portable packing, that a plan promises.

    Returns:
        Bytes; None for a plan without a limit on size whose file was not weighed.
    """
    use = planned.about(Account).limits.get("size") if planned.knows(Account) else None
    if use is not None:
        return round(use.amount if use.measured is None else use.measured)
    weights = {site.key for site in planned.weights}
    if planned.knows(FileText) and planned.about(FileText).holds_for(planned.formats(), weights):
        return planned.about(FileText).bytes + planned.weight_bytes()
    return None


def float_file_bytes(planned: Program) -> int | None:
    """The size of the float32 file, which a limit on size is relative to; None where no such file was weighed."""
    use = planned.about(Account).limits.get("size") if planned.knows(Account) else None
    if use is not None:
        return round(use.reference)
    return planned.about(FileText).float_bytes if planned.knows(FileText) else None


def _sizes(planned: Program) -> str:
    """The sizes of the file and of the weights in words."""
    size, reference, promised = planned.weight_bytes(), planned.float_bytes(), file_bytes(planned)
    weights = f"weights {size:,} bytes, {size / reference:.2%} of float32's {reference:,}"
    if promised is None:
        return weights
    use = planned.about(Account).limits.get("size") if planned.knows(Account) else None
    float_file = float_file_bytes(planned)
    assert float_file is not None
    allowed = "" if use is None else f" of {math.floor(use.bound):,} allowed"
    return (
        f"file {promised:,} bytes{allowed}, {promised / float_file:.2%} of the float32 file's {float_file:,}; {weights}"
    )


def _average_bits(planned: Program) -> str:
    """The average bits of a weight, and the weights that are no part of the average."""
    formats, floats = planned.formats(), planned.float_weights()
    numel = {name: planned.tensor(name).numel() for name in floats}
    kept = sum(numel[name] for name, reason in floats.items() if reason == KEPT_IN_FLOAT)
    others = sum(numel.values()) - kept
    quantized = sum(site.numel for site in planned.weights)
    bits = sum(site.numel * formats[site.key].bits for site in planned.weights) + FLOAT_BITS * others
    text = f"{bits / (quantized + others):.4g} bits on average over the {'quantized ' * bool(kept)}weights"
    if others:
        text += f", {others:,} of them in float, which no integer kernel takes"
    if kept:
        text += f"; {kept:,} weights ({kept / (quantized + others + kept):.1%} of all) stay in float by keep_float"
    return text


def _roundings(planned: Program) -> list[str]:
    """How the weights were rounded before anything was learned: all of them in a line, and a line for each that was not
    compensated as it usually is."""
    formats = planned.formats()
    keys = [site.key for site in planned.weights if not formats[site.key].is_float]
    known = {key: planned.facts.get(key, RoundedWeights).compensation for key in keys}
    nearest = [key for key in keys if known[key] is None]
    anew = sum(own is not None and own.sequential for own in known.values())
    how = f", {anew} of them layer by layer from quantized ones" if anew else ""
    lines = [
        f"rounding: {len(keys) - len(nearest)} weights compensated by their inputs{how}, {len(nearest)} to the nearest"
    ]
    if 0 < len(nearest) < len(keys):
        lines[0] += f" ({', '.join(nearest)})"
    for key, own in known.items():
        rows = planned.facts.get(key, Quantizers).by_format[formats[key]].rows
        if rows:
            lines.append(
                f"rounding: {key}: rows have {min(rows)} to {max(rows)} bits, more where their errors cost more"
            )
        if own is not None and own.blocks > 1:
            lines.append(
                f"rounding: {key}: compensated in {own.blocks} blocks of {own.width:,} columns, each by itself; "
                f"rounding=Rounding(block={own.width}) does so on any machine"
            )
        if own is not None and own.damping > STRONGEST_DAMPING:
            lines.append(
                f"rounding: {key}: its inputs determine too little, so that {own.damping:.2g} times their mean square "
                f"was added to their second moment, over the usual {STRONGEST_DAMPING} at most"
            )
    return lines


def predicted_loss(planned: Program) -> float:
    """The sum of the predicted loss increases over the sites."""
    return sum(planned.facts.get(site.key, ChosenFormat).increase for site in planned.sites)


def summary(
    planned: Program,
    budget: str,
    calibrated: Calibrated,
    trials: Trials,
    checks: Mapping[str, str],
) -> str:
    """The loss and its reason, the table, the cost in bytes and in loss, and the nodes in float with their reasons.

    Args:
        planned: the float program with the chosen formats.
        budget: the text that the plan is for.
        calibrated: the data and the losses there.
        trials: what was tried beside the plan.
        checks: what was found in the files that were exported, by their names.
    """
    from rich.console import Console  # `hawqfx.compile` loads without it

    text = io.StringIO()
    console = Console(file=text, width=110)
    console.print(f"loss: {calibrated.loss_reason}", soft_wrap=True)
    held = f"; {calibrated.held} more held out for the metric" if calibrated.held else ""
    console.print(f"calibrated on {calibrated.samples} samples{held}")
    for note in planned.notes:
        console.print(note, soft_wrap=True)
    console.print(site_table(planned, budget))
    console.print(Plan.of(planned, budget).explain())
    console.print(_sizes(planned))
    console.print(_average_bits(planned))
    float_loss, loss = calibrated.losses
    console.print(
        f"loss on the calibration samples {loss:.5g}, float32 {float_loss:.5g}; "
        f"predicted increase, in the unit of the metric, {predicted_loss(planned):.4g}"
    )
    for line in _roundings(planned):
        console.print(line, soft_wrap=True)
    for refinement in trials.refinements:
        verdict = "taken" if refinement.taken else "not taken"
        console.print(
            f"measured again at the plan and {refinement.changed} sites moved: expected loss on samples that were not "
            f"measured on {refinement.gain}, {_paired(refinement.unit)}: {verdict}",
            soft_wrap=True,
        )
    rival = trials.rival
    if rival is not None:
        uniform = f"uniform bits within the same limits (weights {rival.weights}, activations {rival.activations})"
        verdict = "they are returned" if rival.chosen else "the plan is returned"
        difference = f"the plan's loss less theirs {rival.behind}"
        console.print(f"{uniform}: loss {rival.loss:.4g}; {difference}, {_paired(rival.unit)}: {verdict}")
    for data, (float_score, score) in trials.scores.items():
        console.print(f"metric on the {data} {score:.4g}, float32 {float_score:.4g}")
    why = "chosen by the plan" if planned.knows(Account) else "given, not chosen"
    formats = planned.formats()
    for name in (site.name for site in planned.sites if formats[site.key].is_float):
        console.print(f"in float: {name}: {why}", soft_wrap=True)
    names = {node.name: name for node, name in names_of(planned.graph.graph).items()}
    for node, reason in planned.left_float.items():
        share = planned.share_in_float(node)
        part = f"; {share:.1%} of the bytes of weights" if share else ""
        console.print(f"in float: {names[node]}: {reason}{part}", soft_wrap=True)
    for name, found in checks.items():
        console.print(f"file {name} in onnxruntime: {found}", soft_wrap=True)
    return text.getvalue()


def _paired(unit: str) -> str:
    if unit == "sample":
        return "paired by sample"
    return "paired by batch, since the loss is no mean over samples or fails on single ones"
