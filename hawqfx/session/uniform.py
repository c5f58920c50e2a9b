"""Uniform bits, one format for all weights and one for all activations: the rival of every plan."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from hawqfx.allocation.search_space import Formats
from hawqfx.ir.program import Program
from hawqfx.ir.sites import Site, WeightSite
from hawqfx.maths.formats import FLOAT, Format
from hawqfx.passes.allocation import Allocation
from hawqfx.session.planner import Candidate, Planner, Rival

log = logging.getLogger(__name__)


def uniform_formats(program: Program, weight: Format, activation: Format) -> dict[str, Format]:
    """Site -> its format, when all weights have one and all activations have one."""
    return {site.key: weight if isinstance(site, WeightSite) else activation for site in program.sites}


def plan_or_uniform(planner: Planner, planned: Candidate, allocation: Allocation) -> Candidate:
    """The plan, or uniform bits within the same limits where these lose less on the calibration data.

    Both are judged sample by sample; a difference below two standard errors decides nothing, and the plan stays.
    """
    uniform = _widest(planner.measured, allocation)
    if uniform is None or uniform == planned.planned.formats():
        return planned
    other = planner.quiet.lower(planner.explain(allocation, uniform), str(allocation.budget))
    loss, its_loss = planner.losses(planned.program, other.program)
    behind = loss.minus(its_loss)
    rival = Rival(
        _listed(uniform, planner.measured.weights), _listed(uniform, planner.measured.activations), its_loss.mean,
        behind, chosen=behind.mean > 0 and behind.is_significant,
    )  # fmt: skip
    if not rival.chosen:
        return replace(planned, rival=rival)
    log.warning(
        "uniform bits (weights %s, activations %s) keep the budget %s too and lose less on the calibration data, "
        "%.4g against %.4g, the difference of samples being %s: they are returned; more calibration data or probes may "
        "tell the sites apart",
        rival.weights, rival.activations, allocation.budget, its_loss.mean, loss.mean, behind,
    )  # fmt: skip
    return replace(planner.lower(other.planned, other.budget), rival=rival)


def _widest(program: Program, allocation: Allocation) -> dict[str, Format] | None:
    """The widest weights, then activations, that are within the limits, one format for all of a kind but for sites
    that are fixed; None if there are none."""
    formats, fixed = allocation.rules.formats(program), allocation.rules.fixed(program)
    for weight in _common(formats, program.weights, fixed):
        for activation in _common(formats, program.activations, fixed):
            chosen = uniform_formats(program, weight, activation) | fixed
            if allocation.task(program, chosen).admits(chosen):
                return chosen
    return None


def _common(formats: Mapping[str, Sequence[Format]], sites: Sequence[Site], fixed: Formats) -> list[Format]:
    """The formats that all sites may take but for fixed ones, widest first."""
    every = [set(formats[site.key]) for site in sites if site.key not in fixed]
    return sorted(set.intersection(*every), reverse=True) if every else [FLOAT]


def _listed(chosen: Formats, sites: Sequence[Site]) -> str:
    return "/".join(str(width).removesuffix(" bits") for width in sorted({chosen[site.key] for site in sites}))
