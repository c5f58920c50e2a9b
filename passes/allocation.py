"""One bit width per site, by integer programming: the least predicted loss increase within the budget.

The total is the sum over the sites (HAWQ-V2, equation 8, for Omega).  An increase that noise does not tell from zero
enters by its upper confidence bound.  The rule "hawq-v2" is the paper's own, to compare with: among the settings whose
bits fall with the average trace, the least Omega (HAWQ-V2, section 3.2); weights and activations each have their order.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property
from itertools import combinations, pairwise
from typing import ClassVar, Literal

from hawqfx.allocation.budget import Budget
from hawqfx.allocation.constraints import Resource, SearchSpace, resources
from hawqfx.allocation.solver.search import Choice, Infeasible, LinearConstraint, Nogood, Problem, Terms, choose
from hawqfx.errors import HawqfxError, InfeasibleBudget, PassError
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import Account, ByteCost, ChosenFormat, LimitUse, LossIncrease, Move, Reason, Sensitivity
from hawqfx.ir.program import ActivationSite, Program, Site, WeightSite
from hawqfx.maths.formats import BLOCKWISE, DYNAMIC, Scheme, described, is_static
from hawqfx.maths.pricing import FLOAT_BITS
from hawqfx.pass_manager.base import Analysis, Kind

log = logging.getLogger(__name__)

Rule = Literal["exact", "hawq-v2"]
_Totals = Mapping[str, Sequence[float]]


def increases(program: Program, site: Site) -> dict[int, float]:
    """The predicted loss increase of a site at every width, lowest first; none in float."""
    predicted = program.facts.get(site.key, LossIncrease)
    if not all(map(math.isfinite, (*predicted.by_bits.values(), *predicted.stderr.values()))):
        raise PassError(f"the sensitivity of {site.key!r} is not finite: {predicted}")
    return {bits: predicted.upper(bits) for bits in sorted(predicted.by_bits)} | {FLOAT_BITS: 0.0}


@dataclass(frozen=True)
class Allocation(Analysis):
    """budget: the limits.  weight_bits, activation_bits: widths to choose from, 32 being float; None: those measured.
    schemes: how layers may compute, of what was measured; None: by all schemes where latency or the memory of weights
    is limited, else by the static one alone.
    fix: pairs of a pattern of site names, as in a shell, and the width that those sites have.  interactions: so many
    pairs of weights, the strongest, enter with what their errors do together.  start: pairs of a site and a width, a
    plan to begin the search from.  gap: accept a plan proven to be so near to the least loss, relatively.  seconds:
    when the solver stops with the best plan so far, and says so."""

    budget: Budget
    weight_bits: tuple[int, ...] | None = None
    activation_bits: tuple[int, ...] | None = None
    schemes: tuple[Scheme, ...] | None = None
    fix: tuple[tuple[str, int], ...] = ()
    rule: Rule = "exact"
    interactions: int = 0
    start: tuple[tuple[str, int], ...] = ()
    gap: float = 0.0
    seconds: float = 60.0
    needs: ClassVar[tuple[Kind, ...]] = (LossIncrease, ByteCost)
    gives: ClassVar[tuple[Kind, ...]] = (ChosenFormat,)

    def __post_init__(self) -> None:
        if self.rule not in ("exact", "hawq-v2"):
            raise HawqfxError(f"rule={self.rule!r}: must be 'exact' or 'hawq-v2'")

    def learn(self, program: Program, context: Context) -> Program:
        task = AllocationTask.of(program, self)
        answer = task.solve()
        if isinstance(answer, Infeasible):
            raise task.refusal(answer)
        if not answer.optimal:
            log.warning(
                "the allocation was stopped: its predicted loss is %.6g, and no plan has less than %.6g",
                answer.loss, answer.bound,
            )  # fmt: skip
        return task.explained(task.space.bits(answer.picks), answer)

    def admits(self, program: Program, bits: Mapping[str, int]) -> bool:
        """Whether a plan keeps every limit, and has only widths that may be chosen."""
        allowed = self.widths(program)
        if any(width not in allowed[key] for key, width in bits.items()):
            return False
        task = AllocationTask.of(program, self, bits)
        picks = task.space.picks(bits)
        barred = any(all(picks[item] in options for item, options in nogood.items()) for nogood in task.space.nogoods)
        return not barred and all(row.terms.total(picks) <= row.bound for row in task.rows)

    def given(self, program: Program, bits: Mapping[str, int]) -> Program:
        """The program with a plan that was found elsewhere, explained."""
        return AllocationTask.of(program, self, bits).explained(bits, None)

    def fixed(self, program: Program) -> dict[str, int]:
        """The sites whose width `fix` says, and that width."""
        fixed: dict[str, tuple[int, str]] = {}
        for pattern, bits in self.fix:
            matched = [site.key for site in program.sites if fnmatch(site.key, pattern)]
            if not matched:
                names = ", ".join(site.key for site in program.sites[:5])
                raise HawqfxError(f"fix {pattern!r}: no site has such a name; sites are {names}, ...")
            for key in matched:
                before, by = fixed.setdefault(key, (bits, pattern))
                if before != bits:
                    raise HawqfxError(f"fix: {key!r} is to have {before} bits by {by!r} and {bits} by {pattern!r}")
        return {key: bits for key, (bits, _) in fixed.items()}

    def widths(self, program: Program) -> dict[str, list[int]]:
        """The widths that each site may take, lowest first.  Raises HawqfxError if a site has none."""
        fixed = self.fixed(program)
        found = {}
        read_in_float = self._read_in_float(program)
        for site in program.sites:
            measured = [*sorted(program.facts.get(site.key, LossIncrease).by_bits), FLOAT_BITS]
            wanted: Sequence[int] | None = self.weight_bits if isinstance(site, WeightSite) else self.activation_bits
            if site.key in fixed:
                wanted = [fixed[site.key]]
                found[site.key] = [bits for bits in measured if bits in wanted]
            else:
                static = [bits for bits in measured if is_static(bits) and (wanted is None or bits in wanted)]
                floats = [FLOAT_BITS] * (FLOAT_BITS in (wanted or ()) or site.key in read_in_float)
                found[site.key] = [*self._in_schemes(site, static, measured), *floats]
            if not found[site.key]:
                raise HawqfxError(
                    f"{site.key!r} may take {_listed(wanted or ())} bits, and was measured at {_listed(measured)}"
                )
        return found

    @property
    def _schemes(self) -> tuple[Scheme, ...]:
        weighs = self.budget.latency is not None or self.budget.weight_memory is not None
        every: tuple[Scheme, ...] = ("static", "dynamic", "weight-only") if weighs else ("static",)
        return every if self.schemes is None else self.schemes

    def _in_schemes(self, site: Site, static: Sequence[int], measured: Sequence[int]) -> list[int]:
        """The widths of a site in the schemes that are allowed.  A weight has static ones if it has no block."""
        weight = isinstance(site, WeightSite)
        takes_static = "static" in self._schemes or (
            weight and ("dynamic" in self._schemes or BLOCKWISE not in measured)
        )
        more = [("dynamic", DYNAMIC), ("weight-only", BLOCKWISE)]
        others = sorted(width for scheme, width in more if scheme in self._schemes and width in measured)
        return [*(static if takes_static else ()), *others]

    def _read_in_float(self, program: Program) -> set[str]:
        """The activations that may have no quantizer: what weight-only layers read; without static ones, all others."""
        known = {site.key: program.facts.get(site.key, LossIncrease).by_bits for site in program.sites}
        found = set()
        if "weight-only" in self._schemes:
            found = {layer.input for layer in program.layers if BLOCKWISE in known[layer.weight]}
        if "static" not in self._schemes:
            dynamic = {key for key, widths in known.items() if "dynamic" in self._schemes and DYNAMIC in widths}
            found |= {site.key for site in program.activations} - dynamic
        return found

    def nogoods(self, program: Program, space: SearchSpace) -> list[Nogood]:
        """A weight in blocks is multiplied by floats alone, and floats that nobody asked for by no other weight."""
        found: list[Nogood] = []
        asked = FLOAT_BITS in (self.activation_bits or ())
        for layer in program.layers:
            weight, read = space.item[layer.weight], space.item[layer.input]
            blocks = space.options(layer.weight, lambda width: width == BLOCKWISE)
            quantized = space.options(layer.input, lambda width: width != FLOAT_BITS)
            if blocks and quantized:
                found.append({weight: blocks, read: quantized})
            static, floats = space.options(layer.weight, is_static), space.options(layer.input, _is_float)
            if blocks and static and floats and not asked:
                found.append({weight: static, read: floats})
        return found


def _is_float(width: int) -> bool:
    return width == FLOAT_BITS


@dataclass(frozen=True)
class AllocationTask:
    """An allocation as an integer program."""

    program: Program
    allocation: Allocation
    losses: Mapping[str, Mapping[int, float]]
    space: SearchSpace
    resources: Mapping[str, Resource]

    @staticmethod
    def of(program: Program, allocation: Allocation, bits: Mapping[str, int] = {}) -> "AllocationTask":
        """`bits`: widths that the program must know, be they worth choosing or not."""
        losses = {site.key: increases(program, site) for site in program.sites}
        widths = allocation.widths(program)
        # fewer bits never cost more of a limit but latency, but an error may make up for another
        if allocation.budget.latency is None and not allocation.interactions:
            widths = {key: _undominated(losses[key], kept) for key, kept in widths.items()}
        space = SearchSpace({key: sorted({*kept, bits.get(key, kept[0])}) for key, kept in widths.items()})
        space.nogoods.extend(allocation.nogoods(program, space))
        counted = resources(program, allocation.budget, space)
        if allocation.rule == "hawq-v2":
            space.nogoods.extend(_monotone(program, space))
        return AllocationTask(program, allocation, losses, space, counted)

    @property
    def rows(self) -> list[LinearConstraint]:
        limits = self.allocation.budget.limits
        return [row for name, resource in self.resources.items() for row in resource.rows(limits[name])]

    @cached_property
    def loss(self) -> Resource:
        """The predicted loss increase, as terms."""
        single = {self.space.item[key]: [self.losses[key][b] for b in kept] for key, kept in self.space.widths.items()}
        return Resource("loss", "", 1, 1, [(0, Terms(single, self._interactions()))])

    def solve(self) -> Choice | Infeasible:
        (_, terms), *_ = self.loss.parts
        by_item = [*terms.single.values(), *([0.0] * derived.options for derived in self.space.derived)]
        problem = Problem(by_item, self.rows, self.space.nogoods, terms.pairs)
        start = dict(self.allocation.start)
        near = {key: _nearest(kept, start[key]) for key, kept in self.space.widths.items()} if start else None
        picks = None if near is None else self.space.picks(near)
        return choose(problem, start=picks, gap=self.allocation.gap, seconds=self.allocation.seconds)

    def _interactions(self) -> dict[tuple[int, int], list[list[float]]]:
        """The strongest pairs: twice d_i^T F d_j at every two widths, zero in float."""
        known = self.program.interactions
        if not self.allocation.interactions:
            return {}
        if known is None:
            raise HawqfxError("interactions were asked for and not measured: give interactions=True to compile()")
        number = {choice: row for row, choice in enumerate(known.choices)}

        def term(one: str, bits: int, other: str, others: int) -> float:
            if FLOAT_BITS in (bits, others):
                return 0.0
            return 2 * known.gram[number[one, bits]][number[other, others]]

        tables = {
            (one.key, other.key): [
                [term(one.key, bits, other.key, others) for others in self.space.widths[other.key]]
                for bits in self.space.widths[one.key]
            ]
            for one, other in combinations(self.program.weights, 2)
        }
        ranked = sorted(tables, key=lambda pair: -max(abs(value) for row in tables[pair] for value in row))
        strongest = ranked[: self.allocation.interactions]
        return {(self.space.item[one], self.space.item[other]): tables[one, other] for one, other in strongest}

    def refusal(self, found: Infeasible) -> InfeasibleBudget:
        """Which limit, the least it could be, and which rules stand in the way."""
        name = next(name for name, resource in self.resources.items() if resource.part(found.name) is not None)
        resource = self.resources[name]
        others = "" if found.alone else " together with the other limits"
        text = f"{name}={self.allocation.budget.limits[name]} cannot be met{others}: the least is "
        text += self._least(resource, found)
        for pattern, bits in self.allocation.fix:
            rest = tuple(pair for pair in self.allocation.fix if pair != (pattern, bits))
            freed = AllocationTask.of(self.program, replace(self.allocation, fix=rest, start=()))
            answer = freed.solve()
            if not isinstance(answer, Infeasible):
                text += f"; fix {pattern!r}: {bits} stands in the way, without it the budget can be met"
            elif answer.name == found.name and answer.least < found.least:
                text += f"; fix {pattern!r}: {bits} stands in the way, without it the least is "
                text += freed._least(freed.resources[name], answer)
        kept = [node for node, reason in self.program.left_float.items() if "by the user" in reason]
        if name == "size" and kept:
            text += f"; keep_float leaves {', '.join(kept[:3])} in float"
        if self.allocation.rule != "exact":
            text += f"; the rule {self.allocation.rule} allows no other"
        return InfeasibleBudget(text, name, self._amount(resource, found))

    def _amount(self, resource: Resource, found: Infeasible) -> float:
        number = resource.part(found.name)
        assert number is not None
        return (resource.parts[number][0] + found.least) * resource.unit_size

    def _least(self, resource: Resource, found: Infeasible) -> str:
        number, least = resource.part(found.name), self._amount(resource, found)
        assert number is not None
        percent = math.ceil(1e4 * least / resource.reference) / 100
        at = f" at {resource.where[number]}" if resource.where else ""
        return f"{resource.written(least)}{at}, {percent}% of float32"

    def explained(self, bits: Mapping[str, int], answer: Choice | None) -> Program:
        """The program with these bits, the reason for each, and the account of all."""
        picks = self.space.picks(bits)
        totals = {name: resource.totals(picks) for name, resource in self.resources.items()}
        totals["loss"] = self.loss.totals(picks)
        facts = {
            key: ChosenFormat(width, self.losses[key][width], self._why(key, bits, picks, totals))
            for key, width in bits.items()
        }
        limits = {}
        for name, resource in self.resources.items():
            limit = self.allocation.budget.limits[name]
            prices = {} if answer is None else answer.prices
            price = sum(value for row, value in prices.items() if resource.part(row) is not None) / resource.unit_size
            bound = limit.of(resource.reference)
            limits[name] = LimitUse(resource.unit, resource.amount(picks), bound, resource.reference, price)
        proven = (-math.inf, False) if answer is None else (answer.bound, answer.optimal)
        return replace(self.program.learn(facts), account=Account(limits, totals["loss"][0], *proven))

    def _why(self, key: str, bits: Mapping[str, int], picks: Sequence[int], totals: _Totals) -> Reason:
        widths = self.space.widths[key]
        at = list(widths).index(bits[key])
        item = self.space.item[key]
        shares = {name: resource.share(item, picks, totals[name]) for name, resource in self.resources.items()}
        return Reason(
            self.losses[key][bits[key]] / totals["loss"][0] if totals["loss"][0] else math.nan,
            shares,
            self._move(key, widths[at + 1], bits, picks, totals) if at + 1 < len(widths) else None,
            self._move(key, widths[at - 1], bits, picks, totals) if at else None,
        )

    def _move(self, key: str, width: int, bits: Mapping[str, int], picks: Sequence[int], totals: _Totals) -> Move:
        moved, items = self.space.moved(key, width, bits, picks)
        amounts = {n: resource.change(items, picks, moved, totals[n]) for n, resource in self.resources.items()}
        return Move(width, self.loss.change(items, picks, moved, totals["loss"]), amounts)


def _undominated(losses: Mapping[int, float], widths: Sequence[int]) -> list[int]:
    """Widths, lowest first, each static one of which predicts a smaller loss than every narrower one: ties go to fewer
    bits."""
    kept: list[int] = []
    for bits in widths:
        if not kept or losses[bits] < losses[kept[-1]] or (not is_static(bits) and bits != FLOAT_BITS):
            kept.append(bits)
    return kept


def _listed(widths: Iterable[int]) -> str:
    return ", ".join(str(width) if is_static(width) or _is_float(width) else described(width) for width in widths)


def _nearest(widths: Sequence[int], wanted: int) -> int:
    return min(widths, key=lambda bits: abs(bits - wanted))


def _monotone(program: Program, space: SearchSpace) -> list[Nogood]:
    """A site never has fewer bits than one of its kind with a smaller trace, as far as their widths allow."""
    nogoods: list[Nogood] = []
    for kind in (WeightSite, ActivationSite):
        sites = [site for site in program.sites if isinstance(site, kind)]
        missing = next((site.key for site in sites if not program.facts.has(site.key, Sensitivity)), None)
        if missing is not None:
            raise HawqfxError("rule='hawq-v2' orders by the trace, which only hawq-v2, fisher and hawq-v1 measure")
        ranked = sorted(sites, key=lambda site: -program.facts.get(site.key, Sensitivity).curvature)
        for above, below in pairwise(ranked):
            for option, bits in enumerate(space.widths[above.key]):
                wider = space.options(below.key, lambda other, bits=bits: other > bits)  # type: ignore[misc]
                if wider and bits < max(space.widths[above.key]):
                    nogoods.append({space.item[above.key]: frozenset([option]), space.item[below.key]: wider})
    return nogoods
