"""A latency as integer terms over the choices of formats (hawqfx.maths.latency_model)."""

import math
from collections.abc import Callable, Mapping, Sequence, Set

from hawqfx.allocation.constraints import Resource
from hawqfx.allocation.search_space import Formats, SearchSpace
from hawqfx.allocation.solver.problem import Terms
from hawqfx.ir.program import Program
from hawqfx.maths.formats import BLOCKWISE, DYNAMIC, FLOAT, Format
from hawqfx.maths.latency_model import KERNELS, KernelTimes, LatencyModel

NANO = 1e-9  # latencies are counted in nanoseconds


def latency(program: Program, space: SearchSpace) -> Resource:
    model = program.about(LatencyModel)
    encoder = _Encoder(model, space)
    reference = model.seconds({site.key: FLOAT for site in program.sites})
    return Resource("latency", "s", NANO, reference, [encoder.encoded()])


def _nanoseconds(seconds: float) -> int:
    return round(seconds / NANO)


class _Encoder:
    """LatencyModel.seconds as terms: a kernel is an item with the options that it can run as, tied to its sites;
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
            self._add(tensor.site, lambda width, t=tensor: _nanoseconds(t.clip) if width.bits < 8 else 0)  # type: ignore[misc]
            self._conversion(tensor.site, [tensor.maker], tensor.quantize)
            self._conversion(tensor.site, tensor.readers, tensor.dequantize)
        return self.fixed, Terms(self.single, {})

    def _add(self, site: str, cost: Callable[[Format], int]) -> None:
        """A cost of the static widths of a site."""
        row = self.single.setdefault(self.space.item[site], [0] * len(self.space.formats[site]))
        for number, width in enumerate(self.space.formats[site]):
            row[number] += cost(width) if width.is_static else 0

    def _static(self, site: str) -> frozenset[int]:
        return self.space.options(site, lambda width: width.is_static)

    def _others(self, site: str) -> frozenset[int]:
        return self.space.options(site, lambda width: not width.is_static)

    def _kernel(self, timed: KernelTimes) -> int | bool:
        if not any(map(self._others, timed.sites)):
            self.fixed += _nanoseconds(timed.integer)
            return True
        if timed.weight is None and not all(map(self._static, timed.sites)):
            self.fixed += _nanoseconds(timed.floating)
            return False
        item = self.space.add(lambda formats: KERNELS.index(timed.kernel(formats)), len(KERNELS))
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

        def of(site: str, width: Format) -> frozenset[int]:
            return self.space.options(site, lambda each: each == width)

        static, dynamic = self._static(timed.weight), of(timed.sites[0], DYNAMIC)
        self._forbid({weight: of(timed.weight, FLOAT)} | _but("floating", item))
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
            self._add(site, lambda width: _nanoseconds(seconds))
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
            self._forbid({self.space.item[site]: self._static(site), item: {0}} | _but("integer", kernel))


def _only(item: int, *kernels: str) -> dict[int, Set[int]]:
    return {item: frozenset(map(KERNELS.index, kernels))}


def _but(kernel: str, item: int) -> dict[int, Set[int]]:
    return {item: frozenset(range(len(KERNELS))) - {KERNELS.index(kernel)}}
