"""Facts that passes learn, about a site or about the whole network, and the typed table that holds them."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeVar

from torch import Tensor, fx

from hawqfx.errors import PassError
from hawqfx.maths.formats import Format, Scheme
from hawqfx.maths.latency_model import LatencyModel
from hawqfx.maths.paired import SIGNIFICANT

NETWORK = ""  # the key of facts about the whole network; no site has it


@dataclass(frozen=True)
class Sensitivity:
    """The curvature of the loss at a site, per squared element of the site's tensor: Tr(H)/n, or a metric's substitute.

    Args:
        curvature: the estimate, which may be negative; it is kept with its sign.
        stderr: its standard error over the probes, for the batches at hand.
        probes: the smallest number of probes on a batch.
    """

    curvature: float
    stderr: float
    probes: int

    def times(self, squared_error: Mapping[Format, float]) -> "LossIncrease":
        """Omega(b) = Tr(H)/n ||Q_b(x) - x||^2 (HAWQ-V2, equation 8; the Taylor expansion's 1/2 is dropped there)."""
        return LossIncrease(
            {width: self.curvature * error for width, error in squared_error.items()},
            {width: self.stderr * error for width, error in squared_error.items()},
        )


@dataclass(frozen=True)
class QuantParams:
    """One affine quantizer: code = clip(round(x / scale) + zero_point, low, high).

    Args:
        bits: bits of a code; where rows differ, their mean.
        scale: one for the whole tensor, one per index of dimension 0 (per-channel), one per block of each row, row by
            row (scheme "weight-only"), or none (scheme "dynamic").  Those of blocks, and of channels below 8 bits, may
            be negative.
        zero_point: the code of the value 0.
        low: the lowest code; of rows that differ, of the widest.
        high: the highest code, likewise.
        per_channel: whether there is more than one scale.
        scheme: see hawqfx.maths.formats.
        blocks: blocks in a row.
        block: inputs of a block, in the scheme "weight-only".
        rows: bits of the codes of each index of dimension 0, where they differ; else none.
    """

    bits: int
    scale: tuple[float, ...]
    zero_point: int
    low: int
    high: int
    per_channel: bool
    scheme: Scheme = "static"
    blocks: int = 1
    block: int = 0
    rows: tuple[int, ...] = ()

    @property
    def format(self) -> Format:
        return Format(self.bits, self.scheme, self.block)


@dataclass(frozen=True, eq=False)
class ActivationHistogram:
    """The values of an activation's tensors over the calibration data.

    Args:
        values: (B,) float64, the mean of each bin, ascending.
        counts: (B,) float64, the number of values in each bin.
    """

    values: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Quantizers:
    """The quantizer of a site in each format that it may take."""

    by_format: Mapping[Format, QuantParams]


@dataclass(frozen=True)
class Compensated:
    """How the codes of a weight were compensated.

    Args:
        width: the most columns that were compensated together.
        blocks: parts of the columns that were compensated each by itself.
        damping: what was added to the second moment of the inputs, in units of the mean of its diagonal; the most, over
            blocks and groups.
        chosen: the damping that few samples ask for, of the first block of columns; where a group's moment was still
            not positive definite it got more.
        sequential: whether the codes were made anew from quantized inputs.
    """

    width: int
    blocks: int
    damping: float
    chosen: float = 0.0
    sequential: bool = False


@dataclass(frozen=True, eq=False)
class RoundedWeights:
    """The codes of a weight in each format.

    Args:
        codes: int8, in the weight's shape.
        squared_error: that such codes leave on samples which they are not fitted to.
        optimism: the ratio of that error to the one on the calibration samples, at least 1; what is measured on the
            calibration samples is too small by this factor.
        biases: (C,), of the layer that the weight belongs to, where a format's codes have one of their own.
        compensation: how the codes were compensated; None for the nearest.
    """

    codes: Mapping[Format, Tensor]
    squared_error: Mapping[Format, float]
    optimism: Mapping[Format, float]
    biases: Mapping[Format, Tensor] = field(default_factory=dict)
    compensation: Compensated | None = None


@dataclass(frozen=True)
class QuantizationError:
    """||Q(x) - x||^2 in each format: the sum of squares over a weight, or over one sample of an activation."""

    squared_error: Mapping[Format, float]


@dataclass(frozen=True)
class LossIncrease:
    """The predicted rise of the loss when a site has a format, and its standard error.

    The unit is that of the metric that predicts it: Omega for traces and eigenvalues, the loss itself for `taylor` and
    `measured`, the squared error for `mse`.
    """

    by_format: Mapping[Format, float]
    stderr: Mapping[Format, float]

    def upper(self, width: Format) -> float:
        """The increase that the allocation uses: the estimate, or where noise hides its sign an upper bound that falls
        with the bits: the largest confidence bound of this format and of those with more bits in its scheme."""
        mean, noise = self.by_format[width], SIGNIFICANT * self.stderr[width]
        if mean > noise:
            return mean
        wider = [other for other in self.by_format if other.scheme == width.scheme and other.bits >= width.bits]
        return max(0.0, *(self.by_format[other] + SIGNIFICANT * self.stderr[other] for other in wider))


@dataclass(frozen=True)
class ByteCost:
    """Bytes of a site in each format: in the exported file (weight), or live for one sample (activation)."""

    bytes: Mapping[Format, int]


@dataclass(frozen=True)
class Move:
    """The effect of another format for one site alone: the rise of the predicted loss, and of the amount of each limit
    in its unit.  A fall is negative."""

    format: Format
    loss: float
    amounts: Mapping[str, float]


@dataclass(frozen=True)
class Reason:
    """A site's part in a plan.

    Args:
        loss_share: the site's fraction of the predicted loss; NaN if that is zero.
        shares: by limit, the fraction of its amount that the site has a part in (a weight and its input both have a
            part in bit operations).
        wider: the move to the next format that loses less, if there is one.
        narrower: the move to the next format that loses more, if there is one.
    """

    loss_share: float
    shares: Mapping[str, float]
    wider: Move | None
    narrower: Move | None


@dataclass(frozen=True)
class ChosenFormat:
    """The format that the allocation chose for a site, the loss increase predicted for it, and the reason."""

    format: Format
    increase: float
    reason: Reason | None = None


@dataclass(frozen=True)
class LimitUse:
    """The amount of a limit that a plan takes.

    Args:
        unit: of the amounts.
        amount: taken by the plan.
        bound: allowed by the budget.
        reference: taken by the float32 network.
        price: the fall of the predicted loss per further unit, by the linear relaxation; zero where the limit does not
            bind.
        measured: taken by the finished network, where that was measured.
        shape: of the run that a latency is for: the size of each dimension that varies, by its name.
    """

    unit: str
    amount: float
    bound: float
    reference: float
    price: float
    measured: float | None = None
    shape: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Account:
    """A plan as a whole.

    Args:
        limits: by name, the amount that the plan takes.
        loss: the predicted loss increase.
        bound: a proven lower bound on the loss of every plan within the limits; -infinity where nothing was proven.
        optimal: whether the plan is proven to have the least loss.
    """

    limits: Mapping[str, LimitUse]
    loss: float
    bound: float
    optimal: bool


@dataclass(frozen=True)
class ErrorProducts:
    """d_i^T F d_j for the rounding errors d of every two choices; F is the Fisher matrix.

    Args:
        choices: pairs of a weight's name and a format.
        gram: the products, (choices, choices).
    """

    choices: tuple[tuple[str, Format], ...]
    gram: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, eq=False)
class FloatNetwork:
    """The float network before its operators were rewritten for integer kernels: 100% of a size, and the float file."""

    graph: fx.GraphModule


@dataclass(frozen=True)
class InputExponents:
    """The powers of two by which the channels of linear layers' inputs are divided, and their weights multiplied.

    Args:
        exponents: node that makes such an input -> index of its last dimension -> the exponent, where it is above 0.
    """

    exponents: Mapping[str, Mapping[int, int]]


@dataclass(frozen=True)
class StoredBits:
    """Bits of each weight that is stored as integer codes, by the name of the constant; of rows where they differ."""

    bits: Mapping[str, int | tuple[int, ...]]


@dataclass(frozen=True)
class FileText:
    """The exported file beside what belongs to its weights: nodes, names, functions, metadata, scales of activations.

    It depends on the schemes of weights and on the formats of activations, and not on the bits of weights.

    Args:
        bytes: where the sites have `formats`; plans of other schemes or activations take a little more or less.
        formats: site -> the format in the file that was weighed, the widest static one where there is one.
        float_bytes: of the whole float32 file.
    """

    bytes: int
    formats: Mapping[str, Format]
    float_bytes: int

    def holds_for(self, formats: Mapping[str, Format], weights: Collection[str]) -> bool:
        """Whether a file of these formats has so many bytes beside its weights.

        Args:
            formats: of all sites.
            weights: the keys among them that are weights.
        """
        return all(
            width == formats[key] or (key in weights and width.scheme == formats[key].scheme)
            for key, width in self.formats.items()
        )


SiteFact = (
    ActivationHistogram
    | Sensitivity
    | Quantizers
    | RoundedWeights
    | QuantizationError
    | LossIncrease
    | ByteCost
    | ChosenFormat
)
NetworkFact = Account | ErrorProducts | FileText | FloatNetwork | InputExponents | StoredBits | LatencyModel
Fact = SiteFact | NetworkFact
F = TypeVar(
    "F",
    ActivationHistogram, Sensitivity, Quantizers, RoundedWeights, QuantizationError, LossIncrease, ByteCost,
    ChosenFormat, Account, ErrorProducts, FileText, FloatNetwork, InputExponents, StoredBits, LatencyModel,
)  # fmt: skip
NETWORK_FACTS: tuple[type[NetworkFact], ...] = (
    Account, ErrorProducts, FileText, FloatNetwork, InputExponents, StoredBits, LatencyModel,
)  # fmt: skip


class FactTable:
    """An immutable map from (site key, fact class) to a fact; facts about the whole network have the key NETWORK."""

    def __init__(self, facts: Mapping[tuple[str, type], Fact] = MappingProxyType({})) -> None:
        self._facts = dict(facts)

    def with_facts(self, learned: Mapping[str, Fact]) -> "FactTable":
        """A new table that also holds `learned`, a map from site key to fact."""
        return FactTable(self._facts | {(key, type(fact)): fact for key, fact in learned.items()})

    def without(self, kind: type[Fact]) -> "FactTable":
        """A new table that knows nothing of this class."""
        return FactTable({(key, known): fact for (key, known), fact in self._facts.items() if known is not kind})

    def get(self, key: str, kind: type[F]) -> F:
        """The fact of this class about a site.

        Raises:
            PassError: if no pass has given it.
        """
        fact = self._facts.get((key, kind))
        if not isinstance(fact, kind):
            about = repr(key) if key else "the network"
            raise PassError(f"nothing is known about the {kind.__name__} of {about}: run the pass that gives it first")
        return fact

    def has(self, key: str, kind: type[Fact]) -> bool:
        return (key, kind) in self._facts

    def __iter__(self) -> Iterator[tuple[str, type]]:
        return iter(self._facts)
