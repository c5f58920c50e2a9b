"""The facts for the report of a compiled network."""

import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version

from hawqfx.allocation.budget import Budget, Limit
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import Account, LossIncrease, Quantizers
from hawqfx.ir.names import sizes_in_words
from hawqfx.ir.program import Program
from hawqfx.maths.formats import FLOAT, FLOAT_BITS, STATIC_BITS, Format
from hawqfx.maths.latency_model import LatencyModel
from hawqfx.passes.allocation import Allocation
from hawqfx.report.facts import Curve, Facts, Figure, Point
from hawqfx.report.gather import kernel_rows, memory_rows, node_rows, noise_of, site_rows
from hawqfx.session import report
from hawqfx.session.frontier import LIMITS, Frontier
from hawqfx.session.plan import Plan
from hawqfx.session.planner import Planner
from hawqfx.session.record import Calibrated, Trials
from hawqfx.session.uniform import uniform_formats

PACKAGES = ("hawqfx", "torch", "onnx", "onnxruntime", "ortools", "numpy")


def limit_of(planned: Program) -> str:
    """The limit along which a plan is shown beside others: the first of its own that a frontier goes along, or the
    average bits of weights."""
    own = planned.about(Account).limits if planned.knows(Account) else {}
    return next((name for name in own if name in LIMITS), "weight_bits")


def can_plan(measured: Program) -> bool:
    """Whether other plans of the network can be made: it was measured, and does not follow a plan."""
    return all(measured.facts.has(site.key, LossIncrease) for site in measured.sites)


def curve_of(frontier: Frontier, planner: Planner, allocation: Allocation, planned: Program) -> Curve:
    """The frontier with this network and uniform bits beside it, all by the same limit.

    Args:
        frontier: along a limit.
        planner: of the measured network.
        allocation: the rules that the plans keep to.
        planned: this network.
    """
    whole = replace(allocation, budget=Budget(**{frontier.limit: Limit(1.0, relative=True)}))
    measured = planner.measured

    def point(kind: str, name: str, account: Account) -> Point:
        use = account.limits[frontier.limit]
        return Point(kind, name, use.amount, account.loss, use.amount / use.reference)

    points = [point("mixed precision", each.budget, each.account) for each in frontier.points]
    for bits in STATIC_BITS:
        formats = uniform_formats(measured, Format(bits), Format(max(STATIC_BITS)))
        if all(width in measured.facts.get(key, Quantizers).by_format for key, width in formats.items()):
            account = planner.explain(whole, formats).about(Account)
            points.append(point("uniform bits", f"{bits} bits", account))
    points.append(point("this network", "this network", planner.explain(whole, planned.formats()).about(Account)))
    return Curve(frontier.limit, frontier.points[0].account.limits[frontier.limit].unit, tuple(points))


def facts_of(
    planned: Program,
    lowered: Program,
    plan: Plan,
    context: Context,
    calibrated: Calibrated,
    trials: Trials,
    curve: Curve | None,
    target: str,
    summary: str,
    loaded: bool,
) -> Facts:
    """All that the page of a network shows.

    Args:
        planned: the float program with the chosen formats.
        lowered: made of it.
        plan: its plan.
        context: the calibration data, or the example of a loaded network.
        calibrated: the data and the losses there.
        trials: what was tried beside the plan.
        curve: plans beside this one, if they can be made.
        target: the processors that files are made for.
        summary: the text of Compiled.summary().
        loaded: whether the network is from a file, which holds an example and no seed.
    """
    batch = context.batches[0]
    noise = noise_of(planned, lowered, batch)
    reasons = {key: plan.explain(key) for key in plan.chosen}
    sites = site_rows(planned, noise, reasons)
    kernels = kernel_rows(planned)
    absent = {}
    if curve is None:
        absent["frontier"] = (
            "No other plans are known: this network follows a plan or was loaded from a file. compile() it with a "
            "budget for the frontier."
        )
    if all(row.curvature is None for row in sites):
        absent["sensitivities"] = (
            "No sensitivities are known: this network follows a plan, or its metric measures none. compile() it with a "
            "budget and sensitivity= for them."
        )
    if not kernels:
        absent["latency"] = "No kernels were timed: compile() with a budget on latency times them."
    data = "the example in the file" if loaded else "the first calibration batch"
    return Facts(
        title=f"hawqfx: {plan.budget}",
        headline=_headline(planned, plan, calibrated, trials),
        curve=curve,
        sites=sites,
        nodes=node_rows(planned),
        memory=memory_rows(planned),
        kernels=kernels,
        noise_data=f"{data}, {batch.size} samples",
        reproduce=_reproduce(plan, context, target, loaded),
        summary=summary,
        absent=absent,
    )


def average_bits(planned: Program) -> float:
    """The average bits of all elements of weights, those in float among them."""
    formats = planned.formats()
    floats = sum(planned.tensor(name).numel() for name in planned.float_weights())
    quantized = sum(site.numel for site in planned.weights)
    bits = sum(site.numel * formats[site.key].bits for site in planned.weights) + FLOAT_BITS * floats
    return bits / (quantized + floats)


def figures(planned: Program, budget: str) -> tuple[Figure, ...]:
    """The budget, bits, bytes and predicted loss: what is known without running anything."""
    size, reference, promised = planned.weight_bytes(), planned.float_bytes(), report.file_bytes(planned)
    shown = [
        Figure("Budget", budget),
        Figure("Bits of a weight", f"{average_bits(planned):.3g}", "on average; float32 has 32"),
        Figure("Weights", f"{size:,} bytes", f"{size / reference:.1%} of float32's {reference:,}"),
    ]
    if promised is not None:
        shown.append(Figure("File", f"{promised:,} bytes", "in the portable packing"))
    predicted = report.predicted_loss(planned)
    shown.append(Figure("Predicted loss increase", f"{predicted:.3g}", "in the unit of the sensitivity's metric"))
    return tuple(shown)


def _headline(planned: Program, plan: Plan, calibrated: Calibrated, trials: Trials) -> tuple[Figure, ...]:
    floating, loss = calibrated.losses
    shown = [*figures(planned, plan.budget)]
    shown.append(
        Figure("Measured loss", f"{loss:.4g}", f"float32 {floating:.4g}, on {calibrated.samples} calibration samples")
    )
    if planned.knows(LatencyModel):
        shown.append(_latency(planned))
    rival = trials.rival
    if rival is not None:
        verdict = "returned" if rival.chosen else "not returned"
        note = f"weights {rival.weights}, activations {rival.activations}, within the same limits; {verdict}"
        shown.append(Figure("Loss of uniform bits", f"{rival.loss:.4g}", note))
        shown.append(
            Figure(
                "Loss against uniform bits",
                str(rival.behind).replace("+-", "±"),
                f"this plan's less theirs, paired by {rival.unit}",
            )
        )
    for data, (float_score, score) in trials.scores.items():
        shown.append(Figure(f"Metric, {data}", f"{score:.4g}", f"float32 {float_score:.4g}"))
    return tuple(shown)


def _latency(planned: Program) -> Figure:
    """The latency of a plan whose kernels were timed."""
    model, formats = planned.about(LatencyModel), planned.formats()
    use = planned.about(Account).limits.get("latency") if planned.knows(Account) else None
    measured = "" if use is None or use.measured is None else f"measured {1e3 * use.measured:.4g} ms; "
    floating = model.seconds(dict.fromkeys(formats, FLOAT))
    at = f", at {sizes_in_words(model.shape)}" if model.shape else ""
    return Figure(
        "Predicted latency", f"{1e3 * model.seconds(formats):.4g} ms", f"{measured}float32 {1e3 * floating:.4g} ms{at}"
    )


def _reproduce(plan: Plan, context: Context, target: str, loaded: bool) -> tuple[Figure, ...]:
    pins: Mapping[str, str] = {} if plan.pins is None else vars(plan.pins)
    return (
        Figure("Keep it", 'compiled.save("net.hawqfx")', "plan, codes and ranges in one file"),
        Figure("Make it again", 'hawqfx.load("net.hawqfx", model)', "refuses other weights"),
        Figure("Budget", plan.budget),
        Figure("Seed", "not in the file" if loaded else str(context.seed), "of every random draw"),
        Figure("Target", target, "the processors that the file is for"),
        Figure("Loss", context.loss_reason),
        *(Figure(name, version(name)) for name in PACKAGES),
        Figure("Python", platform.python_version(), platform.platform()),
        Figure("Digest of the plan", plan.digest),
        *(Figure(f"SHA-256 of the {name}", digest) for name, digest in pins.items()),
    )
