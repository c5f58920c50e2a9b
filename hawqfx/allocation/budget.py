"""A budget: the limits that a plan must keep, and their text form."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from hawqfx.errors import BudgetError
from hawqfx.ir.names import sizes_of

_BYTES: Mapping[str, float] = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SECONDS: Mapping[str, float] = {"s": 1, "ms": 1e-3, "us": 1e-6}
_UNITS: Mapping[str, Mapping[str, float]] = {
    "size": _BYTES,
    "activation_memory": _BYTES,
    "weight_memory": _BYTES,
    "latency": _SECONDS,
}
_WRITTEN = {"b": ("GB", "MB", "kB", "B"), "s": ("s", "ms", "us"), "": ("",)}  # by the first unit of a table
_ALLOWED = {"b": "bytes: B, kB, MB, GB, KiB, MiB, GiB", "s": "a time: s, ms, us", "": "a plain number"}
_NUMBER = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z%]*)")


@dataclass(frozen=True)
class Limit:
    """The largest amount of a resource that a plan may take.

    Args:
        amount: in the unit of the limit, or a fraction.
        relative: whether `amount` is a fraction of the amount that the float32 model takes.
        shape: of a latency: the sizes of the run that it is for, by the names of dimensions that vary, such as
            {"sequence": 1}; those that are left out have the size of the first calibration batch, and one sample.
    """

    amount: float
    relative: bool = False
    shape: Mapping[str, int] = field(default_factory=dict, hash=False)

    def of(self, reference: float) -> float:
        """The limit in its unit, if the float32 model takes the amount `reference`."""
        return self.amount * reference if self.relative else self.amount

    def __str__(self) -> str:
        """The limit as text: a percentage, or a number without a unit."""
        return f"{self.amount:.10%}".rstrip("0%").rstrip(".") + "%" if self.relative else f"{self.amount:.12g}"

    @property
    def at(self) -> str:
        """The shape as it stands in the text of a budget, such as "@sequence=1@past=128"."""
        return "".join(f"@{name}={size}" for name, size in self.shape.items())


@dataclass(frozen=True)
class Budget:
    """Limits that a plan keeps all at once; None stands for no limit.

    Args:
        size: bytes of the exported file in the portable packing, of the float32 file as export_float writes it.
        weight_bits: average bits of an element of the weights of layers and tables, with 32 for those that stay in
            float; what keep_float= names is no part of it.
        bops: MACs x weight bits x activation bits of one sample, summed over layers and products of activations.
        activation_memory: bytes of the tensors of one sample that are live at once, packed in their formats, at the
            node of the graph where the sum is largest.
        weight_memory: bytes of the weights as onnxruntime holds them while it runs: 1 byte for an element on integer
            kernels, 4 bytes in float, and the packed bits in weight-only layers.
        latency: seconds of a run in onnxruntime at the limit's shape, predicted from parts that are timed on this
            machine.
        drop: the largest fall of a metric on data.  The plan is then the smallest network that keeps this limit and the
            others.

    Raises:
        BudgetError: if a limit other than latency has a shape.
    """

    size: Limit | None = None
    weight_bits: Limit | None = None
    bops: Limit | None = None
    activation_memory: Limit | None = None
    weight_memory: Limit | None = None
    latency: Limit | None = None
    drop: Limit | None = None

    def __post_init__(self) -> None:
        for name, limit in self.limits.items():
            if limit.shape and name != "latency":
                raise BudgetError(
                    f"{self.written(name)}: latency alone is for a shape, as in 'latency=20ms@sequence=1'"
                )

    @staticmethod
    def of(given: "Budget | str") -> "Budget":
        """A budget, or the one of a text.

        Raises:
            BudgetError: if it is neither, or the text does not parse.
        """
        if isinstance(given, Budget):
            return given
        if isinstance(given, str):
            return Budget.parse(given)
        raise BudgetError(f"budget={given!r}: give text, such as 'size=12.5%' or 'size=1.2MB, bops=3%', or a Budget")

    @staticmethod
    def parse(text: str) -> "Budget":
        """Read a budget from text.

        Args:
            text: such as "size=12.5%", "size=1.2MB, bops=3%" or "latency=20ms@sequence=1@past=128".

        Returns:
            The budget.

        Raises:
            BudgetError: if the text does not parse.
        """
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
        """The limits that are given, by name."""
        by_name = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: limit for name, limit in by_name.items() if limit is not None}

    def __str__(self) -> str:
        """The text that parses to the same budget."""
        return ", ".join(map(self.written, self.limits))

    def written(self, name: str) -> str:
        """The limit of a name as people write it, such as "size=1.2MB" or "latency=20ms@sequence=1"."""
        limit = self.limits[name]
        return f"{name}={limit if limit.relative else _amount_in_words(name, limit.amount)}{limit.at}"


_NAMES = tuple(field.name for field in fields(Budget))


def _amount_in_words(name: str, amount: float) -> str:
    """An amount in a unit from whose text it parses exactly: the largest of which it is at least one, or the least."""
    units = _units(name)
    written = _WRITTEN[next(iter(units))]
    texts = {unit: f"{amount / units[unit.lower()]:.12g}" for unit in written}
    exact = [unit for unit, text in texts.items() if float(text) * units[unit.lower()] == amount]
    base = next(unit for unit in written if units[unit.lower()] == 1)
    unit = next((unit for unit in exact if float(texts[unit]) >= 1), exact[-1] if exact else base)
    return texts[unit] + unit


def _units(name: str) -> Mapping[str, float]:
    """Unit of a limit, in small letters -> what it is in the limit's own unit."""
    return _UNITS.get(name, {"": 1})


def _limit(name: str, text: str) -> Limit:
    """Read the amount of the limit `name`, and its shape; raise BudgetError if the text does not parse."""
    amount, at, sizes = text.partition("@")
    return replace(_amount(name, amount.strip()), shape=sizes_of(sizes, f"{name}=...@") if at else {})


def _amount(name: str, text: str) -> Limit:
    """Read the amount of the limit `name`; raise BudgetError if the text does not parse."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise BudgetError(f"{name}={text!r}: an amount is a number with a unit or %, as in 12.5%, 300kB, 1.2MB or 3ms")
    number, unit = float(match[1]), match[2].lower()
    if number <= 0:
        raise BudgetError(f"{name}={text!r}: the amount must be above zero")
    if unit == "%":
        return Limit(number / 100, relative=True)
    units = _units(name)
    if unit in units:
        return Limit(number * units[unit])
    if unit == "" and units is _BYTES and number >= 1:
        return Limit(number)
    raise BudgetError(f"{name}={text!r}: the unit must be %, or {_ALLOWED[next(iter(units))]}")
