"""The latency of hawqfx.maths.latency_model as integer terms over the choices of formats."""

import math
from collections.abc import Callable, Mapping, Sequence, Set

from hawqfx.allocation.constraints import Resource
from hawqfx.allocation.search_space import Formats, SearchSpace
from hawqfx.allocation.solver.problem import Terms
from hawqfx.ir.program import Program
from hawqfx.maths.formats import DYNAMIC, FLOAT, Format
from hawqfx.maths.latency_model import KERNELS, KernelTimes, LatencyModel

NANO = 1e-9  # latencies are counted in nanoseconds


def latency(program: Program, space: SearchSpace) -> Resource:
    """The resource that a limit on latency bounds.

    Args:
        program: with a LatencyModel.
        space: the items of the allocation; derived items and nogoods are added to it.

    Returns:
        The latency, in seconds.

    Raises:
        PassError: if the program has no LatencyModel.
    """
    model = program.about(LatencyModel)
    encoder = _Encoder(model, space)
    reference = model.seconds({site.key: FLOAT for site in program.sites})
    return Resource("latency", "s", NANO, reference, [encoder.encoded()], shape=model.shape)


def _nanoseconds(seconds: float) -> int:
    return round(seconds / NANO)


class _Encoder:
    """Writes LatencyModel.seconds as terms, in nanoseconds.

    A kernel whose way to run depends on formats is a derived item, whose options are the members of KERNELS.  A
    conversion that depends on such kernels is a derived item with the options no and yes.  Nogoods tie derived items to
    the sites.

    Args:
        model: the latency model.
        space: takes the derived items and the nogoods.
    """

    def __init__(self, model: LatencyModel, space: SearchSpace) -> None:
        self.model, self.space = model, space
        self.timed = {timed.node: timed for timed in model.timed}
        self.single: dict[int, list[int]] = {}
        self.fixed = _nanoseconds(model.rest)
        self.kernels: dict[str, int | bool] = {}  # the kernel's item, or whether it is integer in all formats

    def encoded(self) -> tuple[int, Terms]:
        """The nanoseconds that no format changes, and the terms that add up to the others."""
        for timed in self.model.timed:
            self.kernels[timed.node] = self._kernel(timed)
        for tensor in self.model.converted:
            self._add_clip(tensor.site, tensor.clip)
            self._conversion(tensor.site, [tensor.maker], tensor.quantize)
            self._conversion(tensor.site, tensor.readers, tensor.dequantize)
        return self.fixed, Terms(self.single, {})

    def _add(self, site: str, cost: Callable[[Format], int]) -> None:
        """Add a cost in nanoseconds to the formats of a site."""
        row = self.single.setdefault(self.space.item[site], [0] * len(self.space.formats[site]))
        for number, width in enumerate(self.space.formats[site]):
            row[number] += cost(width)

    def _add_clip(self, site: str, seconds: float) -> None:
        self._add(site, lambda width: _nanoseconds(seconds) if width.is_static and width.bits < 8 else 0)

    def _static(self, site: str) -> frozenset[int]:
        """The options of a site that are static formats."""
        return self.space.options(site, lambda width: width.is_static)

    def _others(self, site: str) -> frozenset[int]:
        """The options of a site that are not static formats."""
        return self.space.options(site, lambda width: not width.is_static)

    def _kernel(self, timed: KernelTimes) -> int | bool:
        """Add the seconds of a kernel.

        Returns:
            The number of the kernel's item; or, if formats do not change how it runs, whether it runs in integers.
        """
        if not any(map(self._others, timed.sites)):
            self.fixed += _nanoseconds(timed.integer)
            return True
        if timed.weight is None and not all(map(self._static, timed.sites)):
            self.fixed += _nanoseconds(timed.floating)
            return False
        item = self.space.add(lambda formats: KERNELS.index(timed.kernel(formats)), len(KERNELS))
        # those of the kernel "blockwise" are in the formats of the weight, which choose it
        seconds = [0.0 if kernel == "blockwise" else getattr(timed, kernel) for kernel in KERNELS]
        # a kernel that does not exist takes infinite time, and nogoods below forbid it; the largest finite time stands
        # in, so that no relaxation without these nogoods takes such a kernel for cheap
        worst = max(time for time in seconds if math.isfinite(time))
        self.single[item] = [_nanoseconds(min(time, worst)) for time in seconds]
        self._forbid({self.space.item[site]: self._static(site) for site in timed.sites} | _all_but("integer", item))
        for site in timed.sites:
            self._forbid({self.space.item[site]: self._others(site)} | _only(item, "integer"))
        if timed.weight is None:
            self._forbid(_only(item, "unpacking", "dynamic", "blockwise"))
            return item
        weight, read = self.space.item[timed.weight], self.space.item[timed.sites[0]]

        def of(site: str, width: Format) -> frozenset[int]:
            return self.space.options(site, lambda option: option == width)

        static, dynamic = self._static(timed.weight), of(timed.sites[0], DYNAMIC)
        self._forbid({weight: of(timed.weight, FLOAT)} | _all_but("floating", item))
        blocks = self.space.options(timed.weight, lambda option: option.is_blockwise)
        self._forbid({weight: blocks} | _all_but("blockwise", item))
        times = dict(timed.blockwise)
        self._add(timed.weight, lambda option: _nanoseconds(times[option]) if option.is_blockwise else 0)
        self._forbid({weight: static} | _only(item, "floating", "blockwise"))
        self._forbid({weight: static, read: dynamic} | _all_but("dynamic", item))
        not_dynamic = self.space.options(timed.sites[0], lambda option: option != DYNAMIC)
        self._forbid({read: not_dynamic} | _only(item, "dynamic"))
        return item

    def _forbid(self, nogood: Mapping[int, Set[int]]) -> None:
        """Add a nogood, item -> options; an item without options makes it void."""
        if all(nogood.values()):
            self.space.nogoods.append({item: frozenset(options) for item, options in nogood.items()})

    def _conversion(self, site: str, ends: Sequence[str | None], seconds: float) -> None:
        """Add the seconds of a conversion, which runs if the site is static and a kernel at the other end is in float.

        Args:
            site: key of the activation site.
            ends: nodes of the kernels at the other end; None stands for a kernel that is always in float.
            seconds: of the conversion.
        """
        kernels = [False if end is None else self.kernels[end] for end in ends]
        if any(kernel is False for kernel in kernels):
            self._add(site, lambda width: _nanoseconds(seconds) if width.is_static else 0)
            return
        undecided = [kernel for kernel in kernels if kernel is not True]
        if not undecided or not self._static(site):
            return
        needs = [self.timed[end] for end in ends if end is not None]

        def needed(formats: Formats) -> int:
            return int(formats[site].is_static and not all(timed.is_integer(formats) for timed in needs))

        item = self.space.add(needed, 2)
        self.single[item] = [0, _nanoseconds(seconds)]
        for kernel in undecided:
            self._forbid({self.space.item[site]: self._static(site), item: {0}} | _all_but("integer", kernel))


def _only(item: int, *kernels: str) -> dict[int, Set[int]]:
    """The options of a kernel's item that stand for `kernels`, as a part of a nogood."""
    return {item: frozenset(map(KERNELS.index, kernels))}


def _all_but(kernel: str, item: int) -> dict[int, Set[int]]:
    """The options of a kernel's item that do not stand for `kernel`, as a part of a nogood."""
    return {item: frozenset(range(len(KERNELS))) - {KERNELS.index(kernel)}}
