"""A budget: the limits that a plan must keep, and the text that they are written in."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from hawqfx.errors import BudgetError

_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SECONDS = {"s": 1, "ms": 1e-3, "us": 1e-6}
_UNITS: Mapping[str, Mapping[str, float]] = {
    "size": _BYTES,
    "activation_memory": _BYTES,
    "weight_memory": _BYTES,
    "latency": _SECONDS,
}
_ALLOWED = {"b": "bytes: B, kB, MB, GB, KiB, MiB, GiB", "s": "a time: s, ms, us", "": "a plain number"}
_NUMBER = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z%]*)")


@dataclass(frozen=True)
class Limit:
    """An amount, or with `relative` a fraction of what the float32 model takes."""

    amount: float
    relative: bool = False

    def of(self, reference: float) -> float:
        return self.amount * reference if self.relative else self.amount

    def __str__(self) -> str:
        return f"{self.amount:.10%}".rstrip("0%").rstrip(".") + "%" if self.relative else f"{self.amount:.12g}"


@dataclass(frozen=True)
class Budget:
    """Several limits hold at once.

    size: bytes of the exported file that belong to weights (packed integers, scales, biases, and what stays float).
    weight_bits: average bits per quantized weight.
    bops: MACs x weight bits x activation bits, summed over the layers, for one sample.
    activation_memory: bytes of the tensors that are live at once, at their widths, where that is most, for one sample.
    weight_memory: bytes of the weights as onnxruntime holds them while it runs: one each on integer kernels, four in
        float, the bits themselves where a layer is weight-only.
    latency: seconds of a run in onnxruntime, predicted from parts that are timed on this machine.
    drop: by how much a metric on data may fall; then the smallest network that keeps it, and the other limits.
    """

    size: Limit | None = None
    weight_bits: Limit | None = None
    bops: Limit | None = None
    activation_memory: Limit | None = None
    weight_memory: Limit | None = None
    latency: Limit | None = None
    drop: Limit | None = None

    @staticmethod
    def parse(text: str) -> "Budget":
        """A budget from text such as "size=12.5%" or "size=1.2MB, bops=3%".  Raises BudgetError."""
        limits: dict[str, Limit] = {}
        for part in text.split(","):
            name, equals, amount = (piece.strip() for piece in part.partition("="))
            if not equals or name not in _NAMES:
                raise BudgetError(
                    f"{part.strip()!r} in the budget {text!r} is not understood: write NAME=AMOUNT, "
                    f"NAME one of {', '.join(_NAMES)}, as in 'size=12.5%' or 'size=1.2MB, bops=3%'"
                )
            if name in limits:
                raise BudgetError(f"{name} stands twice in the budget {text!r}")
            limits[name] = _limit(name, amount)
        return Budget(**limits)

    @property
    def limits(self) -> dict[str, Limit]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: limit for name, limit in found.items() if limit is not None}

    def __str__(self) -> str:
        """The text that parses to the same budget."""
        seconds = {"latency"} if self.latency is not None and not self.latency.relative else set()
        return ", ".join(f"{name}={limit}{'s' * (name in seconds)}" for name, limit in self.limits.items())


_NAMES = tuple(field.name for field in fields(Budget))


def _limit(name: str, text: str) -> Limit:
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise BudgetError(f"{name}={text!r}: an amount is a number with a unit or %, as in 12.5%, 300kB, 1.2MB or 3ms")
    number, unit = float(match[1]), match[2].lower()
    if number <= 0:
        raise BudgetError(f"{name}={text!r}: the amount must be above zero")
    if unit == "%":
        return Limit(number / 100, relative=True)
    units = _UNITS.get(name, {"": 1})
    if unit in units:
        return Limit(number * units[unit])
    if unit == "" and units is _BYTES and number >= 1:
        return Limit(number)
    raise BudgetError(f"{name}={text!r}: the unit must be %, or {_ALLOWED[next(iter(units))]}")
