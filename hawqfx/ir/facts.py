"""What passes learn about sites: frozen facts, and the typed table that holds them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from torch import Tensor

from hawqfx.errors import PassError
from hawqfx.maths.formats import Scheme, width_of

SIGNIFICANT = 2.0  # standard errors: an estimate below this many is not told from zero


@dataclass(frozen=True)
class Sensitivity:
    """The curvature of the loss at a site, per element squared of the site's tensor: its average Hessian trace
    Tr(H)/n, or what a metric has in its place.

    `stderr` is the standard error over the probes, for the batches at hand.  `probes`: the fewest on a batch.  An
    estimate may be negative; it is kept as it is.
    """

    curvature: float
    stderr: float
    probes: int

    def times(self, squared_error: Mapping[int, float]) -> "LossIncrease":
        """Omega(b) = Tr(H)/n ||Q_b(x) - x||^2 (HAWQ-V2, equation 8; the Taylor expansion's 1/2 is dropped there)."""
        return LossIncrease(
            {bits: self.curvature * error for bits, error in squared_error.items()},
            {bits: self.stderr * error for bits, error in squared_error.items()},
        )


@dataclass(frozen=True)
class QuantParams:
    """One affine quantizer: code = clip(round(x / scale) + zero_point, low, high).

    One scale for the whole tensor, or one per index of dimension 0 (per-channel), or in the scheme "weight-only" one
    per block of each row, row by row.  A dynamic one has no scale: it comes from the values.
    """

    bits: int
    scale: tuple[float, ...]
    zero_point: int
    low: int
    high: int
    per_channel: bool
    scheme: Scheme = "static"
    blocks: int = 1  # of a row

    @property
    def width(self) -> int:
        return width_of(self.bits, self.scheme)


@dataclass(frozen=True)
class Quantizers:
    """The quantizer of a site at each bit width that it may take."""

    by_bits: Mapping[int, QuantParams]


@dataclass(frozen=True, eq=False)
class RoundedWeights:
    """The int8 codes of a weight at each bit width, and the squared error that they leave (hawqfx.maths.rounding)."""

    codes: Mapping[int, Tensor]
    squared_error: Mapping[int, float]


@dataclass(frozen=True)
class QuantizationError:
    """||Q_b(x) - x||^2 at each bit width: the sum of squares over a weight, or over one sample of an activation."""

    squared_error: Mapping[int, float]


@dataclass(frozen=True)
class LossIncrease:
    """By how much the loss is predicted to rise when the site has so many bits, and the standard error of that.

    In the unit of the metric that predicts it: Omega for traces and eigenvalues, the loss itself for `taylor` and
    `measured`, the squared error for `mse`.
    """

    by_bits: Mapping[int, float]
    stderr: Mapping[int, float]

    def upper(self, bits: int) -> float:
        """What the allocation uses: the estimate, or its upper confidence bound where noise hides its sign."""
        mean, noise = self.by_bits[bits], SIGNIFICANT * self.stderr[bits]
        return mean if mean > noise else max(0.0, mean + noise)


@dataclass(frozen=True)
class ErrorProducts:
    """d_i^T F d_j for the errors d of every two choices, each a weight's name and its width; F: Fisher matrix."""

    choices: tuple[tuple[str, int], ...]
    gram: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class ByteCost:
    """Bytes that a site takes at each bit width: in the exported file (weight), or live for one sample (activation)."""

    bytes: Mapping[int, int]


@dataclass(frozen=True)
class Move:
    """What it would do to change the width of one site alone: the rise of the predicted loss, and of what each limit
    counts, in its unit.  A fall is negative."""

    bits: int
    loss: float
    amounts: Mapping[str, float]


@dataclass(frozen=True)
class Reason:
    """A site's part in a plan: its fraction of the predicted loss (NaN if that is zero), the fraction of what each
    limit counts that it has a part in (bops count for a weight and for its input), and the moves to its next widths.
    """

    loss_share: float
    shares: Mapping[str, float]
    wider: Move | None
    narrower: Move | None


@dataclass(frozen=True)
class ChosenFormat:
    """The width that the allocation chose (hawqfx.maths.formats), the loss increase that is predicted for the site, and
    why."""

    bits: int
    increase: float
    why: Reason | None = None


@dataclass(frozen=True)
class LimitUse:
    """What a plan takes of a limit: `amount` of `bound`, in `unit`; float32 takes `reference`.

    `price`: by how much the predicted loss would fall per further unit, by the linear relaxation; zero where the limit
    does not bind.  `measured`: what the finished network takes, where that was measured."""

    unit: str
    amount: float
    bound: float
    reference: float
    price: float
    measured: float | None = None


@dataclass(frozen=True)
class Account:
    """A plan as a whole: what it takes of each limit, its predicted loss increase, a proven lower bound on that of any
    plan within the limits (-infinity where nothing was proven), and whether it is proven to be the least."""

    limits: Mapping[str, LimitUse]
    loss: float
    bound: float
    optimal: bool


Fact = Sensitivity | Quantizers | RoundedWeights | QuantizationError | LossIncrease | ByteCost | ChosenFormat
F = TypeVar("F", Sensitivity, Quantizers, RoundedWeights, QuantizationError, LossIncrease, ByteCost, ChosenFormat)


class FactTable:
    """An immutable map from (site key, fact class) to a fact."""

    def __init__(self, facts: Mapping[tuple[str, type], Fact] = MappingProxyType({})) -> None:
        self._facts = dict(facts)

    def with_facts(self, learned: Mapping[str, Fact]) -> "FactTable":
        """A new table that also holds `learned`, a map from site key to fact."""
        return FactTable(self._facts | {(key, type(fact)): fact for key, fact in learned.items()})

    def get(self, key: str, kind: type[F]) -> F:
        fact = self._facts.get((key, kind))
        if not isinstance(fact, kind):
            raise PassError(f"nothing is known about the {kind.__name__} of {key!r}: run the pass that gives it first")
        return fact

    def has(self, key: str, kind: type[Fact]) -> bool:
        return (key, kind) in self._facts

    def __iter__(self) -> Iterator[tuple[str, type]]:
        return iter(self._facts)
