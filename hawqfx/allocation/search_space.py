"""The items of the integer program: sites with their formats, and items that follow from them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from hawqfx.allocation.solver.problem import Nogood
from hawqfx.maths.formats import Format

Formats = Mapping[str, Format]
NO_FORMATS: Formats = MappingProxyType({})


@dataclass(frozen=True)
class Derived:
    """An item whose option follows from the formats of the sites."""

    option: Callable[[Formats], int]
    options: int


@dataclass
class SearchSpace:
    """The items of an allocation: sites in order, then derived items, tied to the sites by nogoods.

    Args:
        formats: site -> the formats that it may take, the options of its item.
        derived: items whose option follows from the sites.
        nogoods: options that exclude each other.
    """

    formats: Mapping[str, Sequence[Format]]
    derived: list[Derived] = field(default_factory=list)
    nogoods: list[Nogood] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.item = {key: number for number, key in enumerate(self.formats)}

    def add(self, option: Callable[[Formats], int], options: int) -> int:
        """The number of a new derived item."""
        self.derived.append(Derived(option, options))
        return len(self.formats) + len(self.derived) - 1

    def picks(self, chosen: Formats) -> tuple[int, ...]:
        """The option of every item when the sites have these formats."""
        sites = (list(formats).index(chosen[key]) for key, formats in self.formats.items())
        return (*sites, *(derived.option(chosen) for derived in self.derived))

    def moved(self, key: str, width: Format, chosen: Formats, picks: Sequence[int]) -> tuple[Sequence[int], list[int]]:
        """The options when one site has another format, and the items that differ."""
        changed = list(picks)
        changed[self.item[key]] = list(self.formats[key]).index(width)
        if self.derived:
            changed[len(self.formats) :] = [derived.option({**chosen, key: width}) for derived in self.derived]
        return changed, [item for item, pair in enumerate(zip(picks, changed, strict=True)) if pair[0] != pair[1]]

    def chosen(self, picks: Sequence[int]) -> dict[str, Format]:
        """The formats of the sites at these options."""
        return {key: formats[pick] for (key, formats), pick in zip(self.formats.items(), picks, strict=False)}

    def options(self, key: str, wanted: Callable[[Format], bool]) -> frozenset[int]:
        """The options of a site whose formats are wanted."""
        return frozenset(number for number, width in enumerate(self.formats[key]) if wanted(width))
