"""What each limit of a budget counts, as integer terms over the choices of bits.

The items of the integer program are the sites, each with the widths that it may take, and what follows from them: for
a latency, whether a kernel is an integer one and whether a tensor is converted (hawqfx.maths.latency_model).
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property

from hawqfx.allocation.budget import Budget, Limit
from hawqfx.allocation.solver.search import LinearConstraint, Nogood, Terms
from hawqfx.analysis.liveness import live
from hawqfx.ir.facts import ByteCost
from hawqfx.ir.program import Program, WeightSite
from hawqfx.maths.formats import BLOCKWISE, DYNAMIC, bits_of, is_static
from hawqfx.maths.latency_model import KERNELS, KernelTimes, LatencyModel
from hawqfx.maths.packing import packed_bytes
from hawqfx.maths.pricing import FLOAT_BITS, bops

Bits = Mapping[str, int]
NANO = 1e-9  # latencies are counted in nanoseconds


@dataclass(frozen=True)
class Derived:
    """An item whose option follows from the widths of the sites."""

    option: Callable[[Bits], int]
    options: int


@dataclass
class SearchSpace:
    """The items: sites in order, each with its widths, then what is derived from them, tied by nogoods."""

    widths: Mapping[str, Sequence[int]]
    derived: list[Derived] = field(default_factory=list)
    nogoods: list[Nogood] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.item = {key: number for number, key in enumerate(self.widths)}

    def add(self, option: Callable[[Bits], int], options: int) -> int:
        self.derived.append(Derived(option, options))
        return len(self.widths) + len(self.derived) - 1

    def picks(self, bits: Bits) -> tuple[int, ...]:
        """The option of every item at these widths."""
        sites = (list(widths).index(bits[key]) for key, widths in self.widths.items())
        return (*sites, *(derived.option(bits) for derived in self.derived))

    def moved(self, key: str, width: int, bits: Bits, picks: Sequence[int]) -> tuple[Sequence[int], list[int]]:
        """The options when one site has another width, and which items differ."""
        changed = list(picks)
        changed[self.item[key]] = list(self.widths[key]).index(width)
        if self.derived:
            changed[len(self.widths) :] = [derived.option({**bits, key: width}) for derived in self.derived]
        return changed, [item for item, pair in enumerate(zip(picks, changed, strict=True)) if pair[0] != pair[1]]

    def bits(self, picks: Sequence[int]) -> dict[str, int]:
        """The widths of the sites that these options are."""
        return {key: widths[pick] for (key, widths), pick in zip(self.widths.items(), picks, strict=False)}

    def options(self, key: str, wanted: Callable[[int], bool]) -> frozenset[int]:
        return frozenset(number for number, bits in enumerate(self.widths[key]) if wanted(bits))


@dataclass(frozen=True)
class Resource:
    """What a limit counts: the largest of `parts`, each a sum of terms and what no choice changes.

    Integers, of which one is `unit_size` of the unit that an amount is given in.  `reference`: what float32 takes, in
    that unit.  `where` names the parts, if there are several."""

    name: str
    unit: str
    unit_size: float
    reference: float
    parts: Sequence[tuple[int, Terms]]
    where: Sequence[str] = ()

    @cached_property
    def _pairs_of(self) -> list[dict[int, list[tuple[int, int]]]]:
        """For each part, the pairs that an item is in."""
        found: list[dict[int, list[tuple[int, int]]]] = []
        for _, terms in self.parts:
            pairs: dict[int, list[tuple[int, int]]] = {}
            for pair in terms.pairs:
                for item in pair:
                    pairs.setdefault(item, []).append(pair)
            found.append(pairs)
        return found

    def totals(self, picks: Sequence[int]) -> list[float]:
        """What each part comes to."""
        return [fixed + terms.total(picks) for fixed, terms in self.parts]

    def amount(self, picks: Sequence[int]) -> float:
        return self.unit_size * max(self.totals(picks))

    def own(self, part: int, items: Collection[int], picks: Sequence[int]) -> float:
        """What the terms that have one of the items in them come to."""
        terms = self.parts[part][1]
        pairs = {pair for item in items for pair in self._pairs_of[part].get(item, ())}
        own = sum(terms.single[item][picks[item]] for item in items if item in terms.single)
        return own + sum(terms.pairs[i, j][picks[i]][picks[j]] for i, j in pairs)

    def share(self, item: int, picks: Sequence[int], totals: Sequence[float]) -> float:
        """Which fraction of the amount the item has a part in, where the amount is largest."""
        part = max(range(len(totals)), key=totals.__getitem__)
        return self.own(part, [item], picks) / totals[part] if totals[part] else 0.0

    def change(
        self, items: Collection[int], picks: Sequence[int], moved: Sequence[int], totals: Sequence[float]
    ) -> float:
        """By how much the amount rises when the picks of these items become those of `moved`."""
        after = (
            total + self.own(part, items, moved) - self.own(part, items, picks) for part, total in enumerate(totals)
        )
        return self.unit_size * (max(after) - max(totals))

    def rows(self, limit: Limit) -> list[LinearConstraint]:
        bound = math.floor(
            limit.of(self.reference) / self.unit_size * (1 + 1e-12)
        )  # 12.5% of 8 is 1, whatever rounding
        return [
            LinearConstraint(self._row(number), bound - fixed, terms)
            for number, (fixed, terms) in enumerate(self.parts)
        ]

    def part(self, row: str) -> int | None:
        """The number of the part that a row is of; None: of another measure."""
        return next((number for number in range(len(self.parts)) if self._row(number) == row), None)

    def _row(self, number: int) -> str:
        return self.name if not self.where else f"{self.name} at {self.where[number]}"

    def written(self, amount: float) -> str:
        if self.unit == "s":
            return f"{1e3 * amount:.4g} ms"
        return f"{amount:.4g} {self.unit}" if isinstance(amount, float) and amount % 1 else f"{int(amount)} {self.unit}"


def resources(program: Program, budget: Budget, space: SearchSpace) -> dict[str, Resource]:
    """What the budget's limits count; a latency adds items to the space.  Needs the facts Cost, and for a latency the
    program's timetable."""
    return {name: _KNOWN[name](program, space) for name in budget.limits if name in _KNOWN}


def _size(program: Program, space: SearchSpace) -> Resource:
    single = {}
    for site in program.weights:
        by_bits = program.facts.get(site.key, ByteCost).bytes
        single[space.item[site.key]] = [by_bits[bits] for bits in space.widths[site.key]]
    return Resource("size", "bytes", 1, program.float_bytes(), [(program.fixed_bytes(), Terms(single, {}))])


def _weight_bits(program: Program, space: SearchSpace) -> Resource:
    single = {
        space.item[site.key]: [bits_of(bits) * site.numel for bits in space.widths[site.key]]
        for site in program.weights
    }
    weights = sum(site.numel for site in program.weights)
    return Resource("weight_bits", "bits on average", 1 / weights, FLOAT_BITS, [(0, Terms(single, {}))])


def _bops(program: Program, space: SearchSpace) -> Resource:
    single: dict[int, list[int]] = {}
    pairs: dict[tuple[int, int], list[list[int]]] = {}
    multiplied = [(layer.weight, layer.input, layer.macs) for layer in program.layers]
    multiplied += [(*product.inputs, product.macs) for product in program.products]
    for one, other, macs in multiplied:
        rows, columns = (list(map(bits_of, space.widths[site])) for site in (one, other))
        if one == other:  # a product of a tensor with itself
            row = single.setdefault(space.item[one], [0] * len(rows))
            for number, bits in enumerate(rows):
                row[number] += bops(macs, bits, bits)
            continue
        key = space.item[one], space.item[other]
        table = [[bops(macs, mine, its) for its in columns] for mine in rows]
        before = pairs.get(key, [[0] * len(columns)] * len(rows))
        pairs[key] = [[a + b for a, b in zip(*both, strict=True)] for both in zip(before, table, strict=True)]
    reference = sum(bops(macs, FLOAT_BITS, FLOAT_BITS) for _, _, macs in multiplied)
    return Resource("bops", "bit operations", 1, reference, [(0, Terms(single, pairs))])


def _activation_memory(program: Program, space: SearchSpace) -> Resource:
    steps = live(program)

    def taken(elements: Sequence[int], width: int) -> int:
        bits = width if is_static(width) else FLOAT_BITS  # what is quantized in each run lives as floats
        return sum(packed_bytes(count, bits) for count in elements)

    parts = []
    for step in steps:
        single = {
            space.item[key]: [taken(elements, bits) for bits in space.widths[key]]
            for key, elements in step.elements.items()
        }
        parts.append((step.fixed, Terms(single, {})))
    floats = (step.fixed + sum(taken(elements, FLOAT_BITS) for elements in step.elements.values()) for step in steps)
    return Resource("activation_memory", "bytes", 1, max(floats), parts, [step.node for step in steps])


def _weight_memory(program: Program, space: SearchSpace) -> Resource:
    """On integer kernels every weight takes a byte, however it is stored; weight-only kernels read what is stored, and
    so do tables."""

    def taken(site: WeightSite, width: int) -> int:
        if width == FLOAT_BITS or (is_static(width) and site.kind != "embedding"):
            return site.numel * (packed_bytes(1, FLOAT_BITS) if width == FLOAT_BITS else 1)
        return program.facts.get(site.key, ByteCost).bytes[width] if width == BLOCKWISE else site.numel

    single = {space.item[s.key]: [taken(s, width) for width in space.widths[s.key]] for s in program.weights}
    reference = sum(taken(site, FLOAT_BITS) for site in program.weights)
    return Resource("weight_memory", "bytes", 1, reference, [(0, Terms(single, {}))])


def _latency(program: Program, space: SearchSpace) -> Resource:
    assert program.latency_model is not None, "a latency was asked for and none was measured"
    encoder = _Encoder(program.latency_model, space)
    reference = program.latency_model.seconds({site.key: FLOAT_BITS for site in program.sites})
    return Resource("latency", "s", NANO, reference, [encoder.encoded()])


def _nanoseconds(seconds: float) -> int:
    return round(seconds / NANO)


class _Encoder:
    """Timetable.seconds as terms: a kernel is an item with the options that it can run as, tied to its sites;
    a conversion that hangs on several kernels is an item with the options no and yes."""

    def __init__(self, table: LatencyModel, space: SearchSpace) -> None:
        self.table, self.space = table, space
        self.timed = {timed.node: timed for timed in table.timed}
        self.single: dict[int, list[int]] = {}
        self.fixed = _nanoseconds(table.rest)
        self.kernels: dict[str, int | bool] = {}  # an item, or whether it is integer whatever is chosen

    def encoded(self) -> tuple[int, Terms]:
        for timed in self.table.timed:
            self.kernels[timed.node] = self._kernel(timed)
        for tensor in self.table.converted:
            self._add(tensor.site, lambda bits, t=tensor: _nanoseconds(t.clip) if bits < 8 else 0)  # type: ignore[misc]
            self._conversion(tensor.site, [tensor.maker], tensor.quantize)
            self._conversion(tensor.site, tensor.readers, tensor.dequantize)
        return self.fixed, Terms(self.single, {})

    def _add(self, site: str, cost: Callable[[int], int]) -> None:
        """A cost of the static widths of a site."""
        row = self.single.setdefault(self.space.item[site], [0] * len(self.space.widths[site]))
        for number, width in enumerate(self.space.widths[site]):
            row[number] += cost(width) if is_static(width) else 0

    def _static(self, site: str) -> frozenset[int]:
        return self.space.options(site, is_static)

    def _others(self, site: str) -> frozenset[int]:
        return self.space.options(site, lambda width: not is_static(width))

    def _kernel(self, timed: KernelTimes) -> int | bool:
        if not any(map(self._others, timed.sites)):
            self.fixed += _nanoseconds(timed.integer)
            return True
        if timed.weight is None and not all(map(self._static, timed.sites)):
            self.fixed += _nanoseconds(timed.floating)
            return False
        item = self.space.add(lambda bits: KERNELS.index(timed.kernel(bits)), len(KERNELS))
        seconds = [getattr(timed, kernel) for kernel in KERNELS]
        # what a layer has no kernel for is forbidden below, and must look cheap to no relaxation
        worst = max(each for each in seconds if math.isfinite(each))
        self.single[item] = [_nanoseconds(min(each, worst)) for each in seconds]
        self._forbid({self.space.item[site]: self._static(site) for site in timed.sites} | _but("integer", item))
        for site in timed.sites:
            self._forbid({self.space.item[site]: self._others(site)} | _only(item, "integer"))
        if timed.weight is None:
            self._forbid(_only(item, "unpacking", "dynamic", "blockwise"))
            return item
        weight, read = self.space.item[timed.weight], self.space.item[timed.sites[0]]

        def of(site: str, width: int) -> frozenset[int]:
            return self.space.options(site, lambda each: each == width)

        static, dynamic = self._static(timed.weight), of(timed.sites[0], DYNAMIC)
        self._forbid({weight: of(timed.weight, FLOAT_BITS)} | _but("floating", item))
        self._forbid({weight: of(timed.weight, BLOCKWISE)} | _but("blockwise", item))
        self._forbid({weight: static} | _only(item, "floating", "blockwise"))
        self._forbid({weight: static, read: dynamic} | _but("dynamic", item))
        not_dynamic = self.space.options(timed.sites[0], lambda each: each != DYNAMIC)
        self._forbid({read: not_dynamic} | _only(item, "dynamic"))
        return item

    def _forbid(self, nogood: Mapping[int, Set[int]]) -> None:
        if all(nogood.values()):
            self.space.nogoods.append({item: frozenset(options) for item, options in nogood.items()})

    def _conversion(self, site: str, ends: Sequence[str | None], seconds: float) -> None:
        """Needed where the site is quantized and one of the kernels at the other end, None being one, is in float."""
        kernels = [False if end is None else self.kernels[end] for end in ends]
        if any(kernel is False for kernel in kernels):
            self._add(site, lambda bits: _nanoseconds(seconds))
            return
        undecided = [kernel for kernel in kernels if kernel is not True]
        if not undecided or not self._static(site):
            return
        needs = [self.timed[end] for end in ends if end is not None]

        def needed(bits: Bits) -> int:
            return int(is_static(bits[site]) and not all(timed.is_integer(bits) for timed in needs))

        item = self.space.add(needed, 2)
        self.single[item] = [0, _nanoseconds(seconds)]
        for kernel in undecided:
            self._forbid({self.space.item[site]: self._static(site), item: {0}} | _but("integer", kernel))


def _only(item: int, *kernels: str) -> dict[int, Set[int]]:
    return {item: frozenset(map(KERNELS.index, kernels))}


def _but(kernel: str, item: int) -> dict[int, Set[int]]:
    return {item: frozenset(range(len(KERNELS))) - {KERNELS.index(kernel)}}


_KNOWN: Mapping[str, Callable[[Program, SearchSpace], Resource]] = {
    "size": _size,
    "weight_bits": _weight_bits,
    "bops": _bops,
    "activation_memory": _activation_memory,
    "weight_memory": _weight_memory,
    "latency": _latency,
}
