"""One bit width per site, by integer programming: the least predicted loss increase within the budget.

The total is the sum over the sites (HAWQ-V2, equation 8, for Omega).  An increase that noise does not tell from zero
enters by its upper confidence bound.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hawqfx.budget import Budget
from hawqfx.contract import Analysis, Kind
from hawqfx.errors import InfeasibleBudget, PassError
from hawqfx.facts import Bits, Cost, LossIncrease
from hawqfx.maths.knapsack import Infeasible, LinearLimit, choose
from hawqfx.maths.pricing import FLOAT_BITS, bops
from hawqfx.program import ActivationSite, Program, Site
from hawqfx.study import Study

log = logging.getLogger(__name__)


def increases(program: Program, site: Site) -> dict[int, float]:
    """The predicted loss increase of a site at every width, lowest first."""
    predicted = program.facts.get(site.key, LossIncrease)
    if not all(map(math.isfinite, (*predicted.by_bits.values(), *predicted.stderr.values()))):
        raise PassError(f"the sensitivity of {site.key!r} is not finite: {predicted}")
    return {bits: predicted.upper(bits) for bits in sorted(predicted.by_bits)}


@dataclass(frozen=True)
class _Measure:
    """What a limit counts: integer costs, what float32 takes of it, and how an amount of it is written."""

    limit: LinearLimit
    reference: int
    unit: str


def _size(program: Program, widths: list[list[int]], fixed: int) -> _Measure:
    costs = {}
    for i, site in enumerate(program.sites):
        if not isinstance(site, ActivationSite):
            by_bits = program.facts.get(site.key, Cost).bytes
            costs[i] = [by_bits[bits] for bits in widths[i]]
    return _Measure(LinearLimit("size", -fixed, costs), program.float_bytes(), "bytes")


def _weight_bits(program: Program, widths: list[list[int]]) -> _Measure:
    weights = {i: site.numel for i, site in enumerate(program.sites) if not isinstance(site, ActivationSite)}
    costs = {i: [bits * numel for bits in widths[i]] for i, numel in weights.items()}
    return _Measure(LinearLimit("weight_bits", 0, costs), FLOAT_BITS * sum(weights.values()), "bits in all")


def _bops(program: Program, widths: list[list[int]]) -> _Measure:
    number = {site.key: i for i, site in enumerate(program.sites)}
    pairs: dict[tuple[int, int], list[list[int]]] = {}
    for layer in program.layers:
        i, j = number[layer.weight], number[layer.input]
        table = [[bops(layer.macs, w, a) for a in widths[j]] for w in widths[i]]
        before = pairs.get((i, j))
        pairs[i, j] = (
            table
            if before is None
            else [[one + other for one, other in zip(*rows, strict=True)] for rows in zip(before, table, strict=True)]
        )
    reference = sum(bops(layer.macs, FLOAT_BITS, FLOAT_BITS) for layer in program.layers)
    return _Measure(LinearLimit("bops", 0, pairs=pairs), reference, "bit operations")


def _limits(program: Program, budget: Budget, widths: list[list[int]]) -> dict[str, _Measure]:
    """The limits of the budget, each with its bound in its own unit."""
    count = sum(site.numel for site in program.weights)
    known = {
        "size": _size(program, widths, program.fixed_bytes()),
        "weight_bits": _weight_bits(program, widths),
        "bops": _bops(program, widths),
    }
    bounded = {}
    for name, limit in budget.limits.items():
        measure = known[name]
        amount = limit.of(measure.reference)
        if name == "weight_bits" and not limit.relative:
            amount *= count  # an average over the weights
        bound = measure.limit.bound + math.floor(amount * (1 + 1e-12))  # 12.5% of 8 is 1, whatever the rounding
        bounded[name] = _Measure(
            LinearLimit(name, bound, measure.limit.single, measure.limit.pairs), measure.reference, measure.unit
        )
    return bounded


def _refusal(program: Program, budget: Budget, measures: Mapping[str, _Measure], found: Infeasible) -> InfeasibleBudget:
    measure = measures[found.name]
    least = found.least + (program.fixed_bytes() if found.name == "size" else 0)
    percent = math.ceil(1e4 * least / measure.reference) / 100
    amount = f"{least} {measure.unit}"
    if found.name == "weight_bits":
        amount = f"{least / sum(site.numel for site in program.weights):.4g} bits on average"
    others = "" if found.alone else " together with the other limits"
    return InfeasibleBudget(
        f"{found.name}={budget.limits[found.name]} cannot be met{others}: the least is {amount}, {percent}% of float32"
    )


def _undominated(losses: Mapping[int, float]) -> list[int]:
    """Widths, lowest first, each of which predicts a smaller loss than every narrower one: ties go to fewer bits."""
    kept: list[int] = []
    for bits, loss in losses.items():
        if not kept or loss < losses[kept[-1]]:
            kept.append(bits)
    return kept


@dataclass(frozen=True)
class Allocation(Analysis):
    """`budget`: the limits.  `seconds`: when the solver stops with the best choice so far, and says so."""

    budget: Budget
    seconds: float = 60.0
    needs: ClassVar[tuple[Kind, ...]] = (LossIncrease, Cost)
    gives: ClassVar[tuple[Kind, ...]] = (Bits,)

    def learn(self, program: Program, study: Study) -> Mapping[str, Bits]:
        predicted = [increases(program, site) for site in program.sites]
        widths = [_undominated(losses) for losses in predicted]
        losses = [[by_bits[bits] for bits in kept] for by_bits, kept in zip(predicted, widths, strict=True)]
        measures = _limits(program, self.budget, widths)
        answer = choose(losses, [measure.limit for measure in measures.values()], self.seconds)
        if isinstance(answer, Infeasible):
            raise _refusal(program, self.budget, measures, answer)
        if not answer.optimal:
            log.warning(
                "the allocation was stopped after %.0f s: predicted loss %.4g, at best %.4g",
                self.seconds,
                answer.loss,
                answer.bound,
            )
        picked = [kept[pick] for kept, pick in zip(widths, answer.picks, strict=True)]
        return {
            site.key: Bits(bits, by_bits[bits])
            for site, bits, by_bits in zip(program.sites, picked, predicted, strict=True)
        }
