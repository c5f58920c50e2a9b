"""The rules that a choice of formats keeps to besides the budget: which formats each site may take."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from hawqfx.allocation.budget import Budget
from hawqfx.allocation.search_space import SearchSpace
from hawqfx.allocation.solver.problem import Nogood
from hawqfx.errors import UsageError
from hawqfx.ir.facts import LossIncrease
from hawqfx.ir.names import matches, some_of
from hawqfx.ir.program import Program
from hawqfx.ir.sites import Site, WeightSite
from hawqfx.maths.formats import DYNAMIC, FLOAT, FLOAT_BITS, Format, Scheme

Order = Literal["exact", "hawq-v2"]


# the schemes of quantized layers
QUANTIZED: tuple[Scheme, ...] = ("static", "dynamic", "weight-only")


def known_schemes(wanted: Sequence[Scheme]) -> tuple[Scheme, ...]:
    """The schemes that a user names, in a fixed order.

    Raises:
        UsageError: if there are none, or one is no scheme of a quantized layer.
    """
    if not wanted or any(scheme not in QUANTIZED for scheme in wanted):
        raise UsageError(f"schemes={tuple(wanted)}: must be some of {', '.join(QUANTIZED)}")
    return tuple(scheme for scheme in QUANTIZED if scheme in wanted)


def default_schemes(budget: Budget | None) -> tuple[Scheme, ...]:
    """All schemes where the budget weighs time or the memory of weights, else the static one alone."""
    weighs = budget is not None and (budget.latency is not None or budget.weight_memory is not None)
    return QUANTIZED if weighs else ("static",)


@dataclass(frozen=True)
class Rules:
    """Which formats each site may take.

    Args:
        weight_bits: bits that weights may have, 32 being float; None: all that were measured.
        activation_bits: bits that activations may have, likewise.
        schemes: the schemes by which layers may compute.
        fix: pairs of a pattern of site names, as in a shell, and the bits that those sites have.
    """

    weight_bits: tuple[int, ...] | None
    activation_bits: tuple[int, ...] | None
    schemes: tuple[Scheme, ...]
    fix: tuple[tuple[str, int], ...]

    def fixed(self, program: Program) -> dict[str, Format]:
        """The sites whose format `fix` names, and that format.

        Raises:
            UsageError: if a pattern matches no site, or two patterns disagree.
        """
        fixed: dict[str, tuple[int, str]] = {}
        for pattern, bits in self.fix:
            matched = [site for site in program.sites if matches(pattern, site.key, site.name)]
            if not matched:
                known = some_of(site.name for site in program.sites)
                raise UsageError(f"fix {pattern!r}: no site has such a name; sites are {known}")
            for site in matched:
                before, by = fixed.setdefault(site.key, (bits, pattern))
                if before != bits:
                    raise UsageError(f"fix: {site.name!r} is to have {before} bits by {by!r} and {bits} by {pattern!r}")
        return {key: FLOAT if bits == FLOAT_BITS else Format(bits) for key, (bits, _) in fixed.items()}

    def formats(self, program: Program) -> dict[str, list[Format]]:
        """The formats that each site may take, lowest first.

        Raises:
            UsageError: if a site has none.
        """
        fixed, may_be_float = self.fixed(program), self._may_be_float(program)
        allowed = {}
        for site in program.sites:
            measured = [*sorted(program.facts.get(site.key, LossIncrease).by_format), FLOAT]
            if site.key in fixed:
                wanted: Sequence[int] = [fixed[site.key].bits]
                allowed[site.key] = [width for width in measured if width == fixed[site.key]]
            else:
                bits = self.weight_bits if isinstance(site, WeightSite) else self.activation_bits
                wanted = bits or ()
                static = [width for width in measured if width.is_static and (bits is None or width.bits in bits)]
                floats = [FLOAT] * (FLOAT_BITS in wanted or site.key in may_be_float)
                allowed[site.key] = [*self._in_schemes(site, static, measured), *floats]
            if not allowed[site.key]:
                raise UsageError(
                    f"{site.name!r} may take {_listed(wanted)} bits, and was measured at {_listed(measured)}"
                )
        return allowed

    def nogoods(self, program: Program, space: SearchSpace) -> list[Nogood]:
        """Pairs of formats that exclude each other: a weight in blocks is multiplied by floats alone, and another
        weight by no float that nobody asked for."""
        nogoods: list[Nogood] = []
        asked = FLOAT_BITS in (self.activation_bits or ())
        for layer in program.layers:
            weight, read = space.item[layer.weight], space.item[layer.input]
            blocks = space.options(layer.weight, lambda width: width.is_blockwise)
            quantized = space.options(layer.input, lambda width: not width.is_float)
            if blocks and quantized:
                nogoods.append({weight: blocks, read: quantized})
            static = space.options(layer.weight, lambda width: width.is_static)
            floats = space.options(layer.input, lambda width: width.is_float)
            if blocks and static and floats and not asked:
                nogoods.append({weight: static, read: floats})
        return nogoods

    def _in_schemes(self, site: Site, static: Sequence[Format], measured: Sequence[Format]) -> list[Format]:
        """The quantized formats of a site in the schemes that are allowed."""
        weight = isinstance(site, WeightSite)
        # a dynamic layer has a static weight, and so has a layer whose weight has no blocks
        in_blocks = [width for width in measured if width.is_blockwise]
        takes_static = "static" in self.schemes or (weight and ("dynamic" in self.schemes or not in_blocks))
        others = [width for width in (*in_blocks, DYNAMIC) if width.scheme in self.schemes and width in measured]
        return [*(static if takes_static else ()), *others]

    def _may_be_float(self, program: Program) -> set[str]:
        """The activations that may have no quantizer: inputs of weight-only layers; where nothing is static, all that
        have no dynamic format."""
        known = {site.key: program.facts.get(site.key, LossIncrease).by_format for site in program.sites}
        keys = set()
        if "weight-only" in self.schemes:
            keys = {layer.input for layer in program.layers if any(w.is_blockwise for w in known[layer.weight])}
        if "static" not in self.schemes:
            dynamic = {key for key, formats in known.items() if "dynamic" in self.schemes and DYNAMIC in formats}
            keys |= {site.key for site in program.activations} - dynamic
        return keys


def _listed(widths: Iterable[Format | int]) -> str:
    """Formats as a user writes them where that is a number of bits, else in words."""
    bits = (width if isinstance(width, int) else _written(width) for width in widths)
    return ", ".join(map(str, bits))


def _written(width: Format) -> str:
    return str(width.bits) if width.is_static or width.is_float else str(width)
