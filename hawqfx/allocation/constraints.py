"""The resources that the limits of a budget bound, as integer terms over the choices of formats."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from hawqfx.allocation.budget import Limit
from hawqfx.allocation.search_space import SearchSpace
from hawqfx.allocation.solver.problem import LinearConstraint, Terms
from hawqfx.analysis.liveness import live, stored_bytes
from hawqfx.ir.facts import ByteCost, FileText
from hawqfx.ir.program import KEPT_IN_FLOAT, Program
from hawqfx.ir.sites import WeightSite
from hawqfx.maths.formats import FLOAT, FLOAT_BITS, Format, bit_operations, kernel_bits
from hawqfx.maths.packing import packed_bytes


@dataclass(frozen=True)
class Resource:
    """The amount that a limit bounds: the largest of several parts.

    A part is a constant plus a sum of terms.  Both count in integers, of which 1 stands for `unit_size` units.

    Args:
        name: of the limit.
        unit: of amounts, such as "bytes".
        unit_size: units that the integer 1 stands for.
        reference: the amount of the float32 network, in units.
        parts: pairs of a constant and terms.
        where: names of the parts, if there are several.
        shape: of the run that a latency is for: the size of each dimension that varies, by its name.
    """

    name: str
    unit: str
    unit_size: float
    reference: float
    parts: Sequence[tuple[int, Terms]]
    where: Sequence[str] = ()
    shape: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def _pairs_of(self) -> list[dict[int, list[tuple[int, int]]]]:
        """For every part: item -> the pairs of terms that contain it."""
        by_part: list[dict[int, list[tuple[int, int]]]] = []
        for _, terms in self.parts:
            pairs: dict[int, list[tuple[int, int]]] = {}
            for pair in terms.pairs:
                for item in pair:
                    pairs.setdefault(item, []).append(pair)
            by_part.append(pairs)
        return by_part

    def totals(self, picks: Sequence[int]) -> list[float]:
        """The sums of all parts, as integers, at a choice.

        Args:
            picks: the option of every item.
        """
        return [fixed + terms.total(picks) for fixed, terms in self.parts]

    def amount(self, picks: Sequence[int]) -> float:
        """The amount in units at a choice, the option of every item."""
        return self.unit_size * max(self.totals(picks))

    def own(self, part: int, items: Collection[int], picks: Sequence[int]) -> float:
        """The contribution of some items to a part.

        Args:
            part: number of the part.
            items: numbers of the items.
            picks: the option of every item.

        Returns:
            The sum, as an integer, of the terms that contain at least one of the items.
        """
        terms = self.parts[part][1]
        pairs = {pair for item in items for pair in self._pairs_of[part].get(item, ())}
        own = sum(terms.single[item][picks[item]] for item in items if item in terms.single)
        return own + sum(terms.pairs[i, j][picks[i]][picks[j]] for i, j in pairs)

    def share(self, item: int, picks: Sequence[int], totals: Sequence[float]) -> float:
        """The share of an item in the amount.

        Args:
            item: number of the item.
            picks: the option of every item.
            totals: the sums of all parts at `picks`.

        Returns:
            The contribution of the item to the largest part, as a fraction of that part; 0 if the part is 0.
        """
        part = max(range(len(totals)), key=totals.__getitem__)
        return self.own(part, [item], picks) / totals[part] if totals[part] else 0.0

    def change(
        self, items: Collection[int], picks: Sequence[int], moved: Sequence[int], totals: Sequence[float]
    ) -> float:
        """The rise of the amount between two choices.

        Args:
            items: numbers of the items that differ.
            picks: the option of every item before.
            moved: the option of every item after.
            totals: the sums of all parts at `picks`.

        Returns:
            The rise in units; a fall is negative.
        """
        after = (
            total + self.own(part, items, moved) - self.own(part, items, picks) for part, total in enumerate(totals)
        )
        return self.unit_size * (max(after) - max(totals))

    def constraints(self, limit: Limit) -> list[LinearConstraint]:
        """A linear constraint for every part, which keeps the part within the limit."""
        # the tolerance absorbs floating-point rounding: 12.5% of 8 must allow 1
        bound = math.floor(limit.of(self.reference) / self.unit_size * (1 + 1e-12))
        return [
            LinearConstraint(self._named(number), bound - fixed, terms, self.name)
            for number, (fixed, terms) in enumerate(self.parts)
        ]

    def part(self, constraint: str) -> int | None:
        """The number of the part that a constraint belongs to; None if it belongs to another resource."""
        return next((number for number in range(len(self.parts)) if self._named(number) == constraint), None)

    def _named(self, number: int) -> str:
        """The name of a part's constraint."""
        return self.name if not self.where else f"{self.name} at {self.where[number]}"

    def written(self, amount: float) -> str:
        """An amount in units as text, with the unit."""
        if self.unit == "s":
            return f"{1e3 * amount:.4g} ms"
        return f"{amount:.4g} {self.unit}" if isinstance(amount, float) and amount % 1 else f"{int(amount)} {self.unit}"


def _size(program: Program, space: SearchSpace) -> Resource:
    single = {}
    for site in program.weights:
        by_format = program.facts.get(site.key, ByteCost).bytes
        single[space.item[site.key]] = [by_format[width] for width in space.formats[site.key]]
    text = program.about(FileText)
    fixed = text.bytes + program.fixed_bytes()
    return Resource("size", "bytes", 1, text.float_bytes, [(fixed, Terms(single, {}))])


def _weight_bits(program: Program, space: SearchSpace) -> Resource:
    single = {
        space.item[site.key]: [width.bits * site.numel for width in space.formats[site.key]] for site in program.weights
    }
    # what keep_float= names is no part of the average, and the summary says so
    floats = sum(
        program.tensor(name).numel() for name, reason in program.float_weights().items() if reason != KEPT_IN_FLOAT
    )
    weights = sum(site.numel for site in program.weights) + floats
    return Resource(
        "weight_bits", "bits on average", 1 / weights, FLOAT_BITS, [(FLOAT_BITS * floats, Terms(single, {}))]
    )


def _bops(program: Program, space: SearchSpace) -> Resource:
    single: dict[int, list[int]] = {}
    pairs: dict[tuple[int, int], list[list[int]]] = {}
    multiplied = [(layer.weight, layer.input, layer.macs) for layer in program.layers]
    multiplied += [(*product.inputs, product.macs) for product in program.products]
    for left, right, macs in multiplied:
        rows, columns = ([width.bits for width in space.formats[site]] for site in (left, right))
        if left == right:  # a product of a tensor with itself
            row = single.setdefault(space.item[left], [0] * len(rows))
            for number, bits in enumerate(rows):
                row[number] += bit_operations(macs, bits, bits)
            continue
        key = space.item[left], space.item[right]
        table = [[bit_operations(macs, left_bits, right_bits) for right_bits in columns] for left_bits in rows]
        before = pairs.get(key, [[0] * len(columns)] * len(rows))
        pairs[key] = [[a + b for a, b in zip(*both, strict=True)] for both in zip(before, table, strict=True)]
    reference = sum(bit_operations(macs, FLOAT_BITS, FLOAT_BITS) for _, _, macs in multiplied)
    return Resource("bops", "bit operations", 1, reference, [(0, Terms(single, pairs))])


def _activation_memory(program: Program, space: SearchSpace) -> Resource:
    steps = live(program)
    parts = []
    for step in steps:
        single = {
            space.item[key]: [stored_bytes(elements, width) for width in space.formats[key]]
            for key, elements in step.elements.items()
        }
        parts.append((step.fixed, Terms(single, {})))
    floats = (step.bytes(dict.fromkeys(step.elements, FLOAT)) for step in steps)
    return Resource("activation_memory", "bytes", 1, max(floats), parts, [step.node for step in steps])


def _weight_memory(program: Program, space: SearchSpace) -> Resource:
    """Bytes of the weights in memory: 1 byte for an element of a static weight or table, however the file stores it, 4
    bytes in float, and the bytes of the file for those in blocks, whose kernels read the packed bits."""

    def taken(site: WeightSite, width: Format) -> int:
        if width.is_blockwise:  # 3 bits in those of the kernel
            return program.facts.get(site.key, ByteCost).bytes[width] * kernel_bits(width.bits) // width.bits
        return packed_bytes(site.numel, FLOAT_BITS) if width.is_float else site.numel

    single = {space.item[s.key]: [taken(s, width) for width in space.formats[s.key]] for s in program.weights}
    reference = sum(taken(site, FLOAT) for site in program.weights)
    return Resource("weight_memory", "bytes", 1, reference, [(0, Terms(single, {}))])


COUNTED: Mapping[str, Callable[[Program, SearchSpace], Resource]] = {
    "size": _size,
    "weight_bits": _weight_bits,
    "bops": _bops,
    "activation_memory": _activation_memory,
    "weight_memory": _weight_memory,
}
