"""An allocation as an integer program: the least predicted loss increase within the budget.

The total is the sum over the sites (HAWQ-V2, equation 8, for Omega).  An increase that noise does not tell from zero
enters by its upper confidence bound.  No site has fewer bits than the limits demand: of formats that predict the same
loss the wider wins, by a preference that is far below the noise of any prediction.  The order "hawq-v2" is the paper's
own rule, to compare with: among the settings whose bits fall with the average trace, the least Omega (HAWQ-V2, section
3.2); weights and activations each have their order.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, pairwise

from hawqfx.allocation.budget import Budget
from hawqfx.allocation.constraints import COUNTED, Resource
from hawqfx.allocation.latency_constraint import latency
from hawqfx.allocation.rules import Order, Rules
from hawqfx.allocation.search_space import NO_FORMATS, Formats, SearchSpace
from hawqfx.allocation.solver.problem import Choice, Infeasible, LinearConstraint, Nogood, Problem, Terms
from hawqfx.allocation.solver.search import choose
from hawqfx.errors import PassError, UsageError
from hawqfx.ir.facts import ErrorProducts, LossIncrease, Sensitivity
from hawqfx.ir.program import Program
from hawqfx.ir.sites import ActivationSite, Site, WeightSite
from hawqfx.maths.formats import FLOAT, Format


@dataclass(frozen=True)
class Effort:
    """How the solver works.

    Args:
        start: pairs of a site and a format, a plan to begin the search from.
        gap: accept a plan proven to be so near to the least loss, relatively.
        seconds: time after which the solver stops with its best plan, and says so.
    """

    start: tuple[tuple[str, Format], ...] = ()
    gap: float = 0.0
    seconds: float = 60.0


@dataclass(frozen=True)
class Preference:
    """A preference for wide formats, in the unit of the predicted loss: unit x 2^-bits."""

    unit: float

    @staticmethod
    def among(losses: Mapping[str, Mapping[Format, float]]) -> "Preference":
        """A millionth of the average site's largest loss; of 1 where no loss is predicted at all."""
        largest = [max(by_format.values()) for by_format in losses.values()]
        return Preference(1e-6 * (sum(largest) / len(largest) or 1.0))

    def of(self, width: Format) -> float:
        return 0.0 if width.is_float else self.unit * 2.0**-width.bits


@dataclass(frozen=True)
class AllocationTask:
    """An allocation as an integer program.

    Args:
        program: with the facts LossIncrease and ByteCost.
        budget: the limits.
        rules: the formats that sites may take.
        order: "exact", or "hawq-v2" for the paper's rule.
        interactions: number of pairs of weights, the strongest, whose joint error enters the loss.
        losses: site -> format -> predicted loss increase.
        space: the items of the integer program.
        resources: by limit, the amount that it bounds.
    """

    program: Program
    budget: Budget
    rules: Rules
    order: Order
    interactions: int
    losses: Mapping[str, Mapping[Format, float]]
    space: SearchSpace
    resources: Mapping[str, Resource]

    @staticmethod
    def of(
        program: Program,
        budget: Budget,
        rules: Rules,
        order: Order = "exact",
        interactions: int = 0,
        also: Formats = NO_FORMATS,
    ) -> "AllocationTask":
        """The task for a program and a budget; `also`: formats that the space holds although nobody would choose them.

        Raises:
            UsageError: if the rules leave a site without a format, or name sites that are not there.
            PassError: if a predicted increase is not finite.
        """
        losses = {site.key: increases(program, site) for site in program.sites}
        formats = rules.formats(program)
        # fewer bits never cost more of a limit but latency, but an error may make up for another
        if budget.latency is None and not interactions:
            preference = Preference.among(losses)
            formats = {key: _undominated(losses[key], kept, preference) for key, kept in formats.items()}
        space = SearchSpace({key: sorted({*kept, also.get(key, kept[0])}) for key, kept in formats.items()})
        space.nogoods.extend(rules.nogoods(program, space))
        counted = _resources(program, budget, space)
        if order == "hawq-v2":
            space.nogoods.extend(_monotone(program, space))
        return AllocationTask(program, budget, rules, order, interactions, losses, space, counted)

    @property
    def constraints(self) -> list[LinearConstraint]:
        """The linear constraints of all limits."""
        limits = self.budget.limits
        return [row for name, resource in self.resources.items() for row in resource.constraints(limits[name])]

    @cached_property
    def loss(self) -> Resource:
        """The predicted loss increase, as terms."""
        single = {self.space.item[key]: [self.losses[key][w] for w in kept] for key, kept in self.space.formats.items()}
        return Resource("loss", "", 1, 1, [(0, Terms(single, self._pairs()))])

    @property
    def preference(self) -> "Preference":
        return Preference.among(self.losses)

    def solve(self, effort: Effort) -> Choice | Infeasible:
        """The best choice, or the limit that stands in its way; see hawqfx.allocation.solver.search.choose."""
        (_, terms), *_ = self.loss.parts
        by_item: list[list[float]] = [
            [self.losses[key][width] + self.preference.of(width) for width in kept]
            for key, kept in self.space.formats.items()
        ]
        by_item += [[0.0] * derived.options for derived in self.space.derived]
        problem = Problem(by_item, self.constraints, self.space.nogoods, terms.pairs)
        start = dict(effort.start)
        near = {key: _nearest(kept, start[key]) for key, kept in self.space.formats.items()} if start else None
        picks = None if near is None else self.space.picks(near)
        answer = choose(problem, start=picks, gap=effort.gap, seconds=effort.seconds)
        if isinstance(answer, Infeasible):
            return answer
        # without the preference, of which a plan has at most that of the narrowest formats
        loss, most = terms.total(answer.picks), sum(self.preference.of(kept[0]) for kept in self.space.formats.values())
        return replace(answer, loss=loss, bound=min(loss, answer.bound - most))

    def admits(self, chosen: Formats) -> bool:
        """Whether a plan, whose formats the space holds, keeps every limit and every rule."""
        allowed = self.rules.formats(self.program)
        if any(width not in allowed[key] for key, width in chosen.items()):
            return False
        picks = self.space.picks(chosen)
        barred = any(all(picks[item] in options for item, options in nogood.items()) for nogood in self.space.nogoods)
        return not barred and all(row.terms.total(picks) <= row.bound for row in self.constraints)

    def _pairs(self) -> dict[tuple[int, int], list[list[float]]]:
        """The strongest pairs of weights: twice d_i^T F d_j in every two formats, zero in float."""
        if not self.interactions:
            return {}
        if not self.program.knows(ErrorProducts):
            raise UsageError("interactions were asked for and not measured: give interactions=True to compile()")
        known = self.program.about(ErrorProducts)
        number = {choice: row for row, choice in enumerate(known.choices)}

        def term(one: str, width: Format, other: str, its: Format) -> float:
            if width.is_float or its.is_float:
                return 0.0
            return 2 * known.gram[number[one, width]][number[other, its]]

        tables = {
            (one.key, other.key): [
                [term(one.key, width, other.key, its) for its in self.space.formats[other.key]]
                for width in self.space.formats[one.key]
            ]
            for one, other in combinations(self.program.weights, 2)
        }
        ranked = sorted(tables, key=lambda pair: -max(abs(value) for row in tables[pair] for value in row))
        strongest = ranked[: self.interactions]
        return {(self.space.item[one], self.space.item[other]): tables[one, other] for one, other in strongest}


def increases(program: Program, site: Site) -> dict[Format, float]:
    """The predicted loss increase of a site in every format, lowest first; zero in float.

    Raises:
        PassError: if it is not finite.
    """
    predicted = program.facts.get(site.key, LossIncrease)
    if not all(map(math.isfinite, (*predicted.by_format.values(), *predicted.stderr.values()))):
        raise PassError(f"the sensitivity of {site.name!r} is not finite: {predicted}")
    return {width: predicted.upper(width) for width in sorted(predicted.by_format)} | {FLOAT: 0.0}


def _resources(program: Program, budget: Budget, space: SearchSpace) -> dict[str, Resource]:
    """The resource of each limit; a latency adds items to the space."""
    counted = {**COUNTED, "latency": latency}
    return {name: counted[name](program, space) for name in budget.limits if name in counted}


def _undominated(losses: Mapping[Format, float], widths: Sequence[Format], preference: Preference) -> list[Format]:
    """Formats, lowest first, of which each static one is better than every narrower one."""
    kept: list[Format] = []

    def worth(width: Format) -> float:
        return losses[width] + preference.of(width)

    for width in widths:
        if not kept or worth(width) < worth(kept[-1]) or not (width.is_static or width.is_float):
            kept.append(width)
    return kept


def _nearest(widths: Sequence[Format], wanted: Format) -> Format:
    return min(widths, key=lambda width: (abs(width.bits - wanted.bits), width.scheme != wanted.scheme))


def _monotone(program: Program, space: SearchSpace) -> list[Nogood]:
    """A site never has fewer bits than one of its kind with a smaller trace, as far as their formats allow."""
    nogoods: list[Nogood] = []
    for kind in (WeightSite, ActivationSite):
        sites = [site for site in program.sites if isinstance(site, kind)]
        missing = next((site.key for site in sites if not program.facts.has(site.key, Sensitivity)), None)
        if missing is not None:
            raise UsageError("rule='hawq-v2' orders by the trace, which was not measured")
        ranked = sorted(sites, key=lambda site: -program.facts.get(site.key, Sensitivity).curvature)
        for above, below in pairwise(ranked):
            for option, width in enumerate(space.formats[above.key]):
                wider = space.options(below.key, lambda other, width=width: other > width)  # type: ignore[misc]
                if wider and width < max(space.formats[above.key]):
                    nogoods.append({space.item[above.key]: frozenset([option]), space.item[below.key]: wider})
    return nogoods
