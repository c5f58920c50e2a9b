"""Uniform bits, one format for all weights and one for all activations: the rival of every plan."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from hawqfx.allocation.search_space import Formats
from hawqfx.ir.facts import Quantizers
from hawqfx.ir.program import Program
from hawqfx.ir.sites import Site, WeightSite
from hawqfx.maths.formats import FLOAT, Format, format_of
from hawqfx.passes.allocation import Allocation
from hawqfx.session.planner import Candidate, Planner, Rival

log = logging.getLogger(__name__)


def uniform_formats(program: Program, weight: Format, activation: Format) -> dict[str, Format]:
    """Site -> its format, when all weights have one and all activations have one."""
    return {site.key: weight if isinstance(site, WeightSite) else activation for site in program.sites}


def calibrated_uniform(program: Program, weight: Format, activation: Format) -> dict[str, Format]:
    """`uniform_formats` as far as they were calibrated: a weight that has such bits in blocks alone takes the longest,
    and then activations stay in float, as in weight-only networks.

    Args:
        program: with Quantizers.
        weight: a static format, or float.
        activation: likewise.
    """
    in_blocks: dict[str, Format] = {}
    for site in program.weights:
        known = program.facts.get(site.key, Quantizers).by_format
        blocks = [width for width in known if width.is_blockwise and width.bits == weight.bits]
        if blocks and weight not in known:
            in_blocks[site.key] = min(blocks)
    floats = dict.fromkeys((site.key for site in program.activations), FLOAT) if in_blocks else {}
    return uniform_formats(program, weight, activation) | in_blocks | floats


def plan_or_uniform(
    planner: Planner, planned: Candidate, allocation: Allocation, improve: Callable[[Candidate], Candidate]
) -> Candidate:
    """The plan, or uniform bits within the same limits where these lose less on the calibration data.

    Both are judged sample by sample, or by batches where the loss does not part by samples; a difference below two
    standard errors decides nothing, and the plan stays.

    Args:
        planner: of the measured network.
        planned: the plan.
        allocation: its limits and rules.
        improve: from either of the two to a better network within the limits, or to itself.
    """
    formats = _widest(planner.measured, allocation)
    if formats is None:
        return improve(planned)
    if formats == planned.planned.formats():
        uniform = planned
    else:
        uniform = planner.quiet.lower(planner.explain(allocation, formats), str(allocation.budget))
    start = _better(planner, planned, uniform)
    found = improve(start)
    if found.planned is not start.planned:
        found = _better(planner, found, uniform)
    rival = found.rival
    if rival is None or not rival.chosen:
        return found
    log.warning(
        "uniform bits (weights %s, activations %s) keep the budget %s too and lose less on the calibration data, by %s "
        "%s by %s, at a loss of %.4g: they are returned; more calibration data or probes may tell the sites "
        "apart",
        rival.weights, rival.activations, allocation.budget, rival.behind, rival.unit, rival.unit, rival.loss,
    )  # fmt: skip
    return replace(planner.lower(found.planned, found.budget), rival=rival, refinements=found.refinements)


def _better(planner: Planner, candidate: Candidate, uniform: Candidate) -> Candidate:
    """The candidate, or uniform bits where these lose less, with the comparison; a candidate that is uniform itself has
    no rival."""
    formats = uniform.planned.formats()
    if formats == candidate.planned.formats():
        return candidate
    loss, its_loss = planner.losses(candidate.program, uniform.program)
    behind = loss.minus(its_loss)
    rival = Rival(
        _listed(formats, planner.measured.weights), _listed(formats, planner.measured.activations), its_loss.mean,
        behind, chosen=behind.mean > 0 and behind.is_significant, unit=loss.unit,
    )  # fmt: skip
    return replace(uniform if rival.chosen else candidate, rival=rival)


def _widest(program: Program, allocation: Allocation) -> dict[str, Format] | None:
    """The widest weights, then activations, that are within the limits, one format for all of a kind but for sites
    that are fixed; None if there are none."""
    formats, fixed = allocation.rules.formats(program), allocation.rules.fixed(program)
    for weight in _common(formats, program.weights, fixed):
        for activation in _common(formats, program.activations, fixed):
            chosen = uniform_formats(program, weight, activation) | fixed
            if allocation.task(program, chosen).admits(chosen):
                return chosen
    # convolutions have no blocks: where other weights have nothing else, one number of bits stands for one format
    for bits in sorted({width.bits for site in program.weights for width in formats[site.key]}, reverse=True):
        chosen = calibrated_uniform(program, format_of(bits), FLOAT) | fixed
        allowed = all(chosen[key] in known for key, known in formats.items())
        if allowed and allocation.task(program, chosen).admits(chosen):
            return chosen
    return None


def _common(formats: Mapping[str, Sequence[Format]], sites: Sequence[Site], fixed: Formats) -> list[Format]:
    """The formats that all sites may take but for fixed ones, widest first."""
    every = [set(formats[site.key]) for site in sites if site.key not in fixed]
    return sorted(set.intersection(*every), reverse=True) if every else [FLOAT]


def _listed(chosen: Formats, sites: Sequence[Site]) -> str:
    return "/".join(str(width).removesuffix(" bits") for width in sorted({chosen[site.key] for site in sites}))
