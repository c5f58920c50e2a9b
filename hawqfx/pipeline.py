"""The recipe: how a captured network becomes an integer one, read from top to bottom."""

from collections.abc import Callable, Mapping, Sequence

from hawqfx.allocation.budget import Budget
from hawqfx.errors import HawqfxError
from hawqfx.pass_manager.base import Analysis, Pass
from hawqfx.passes.allocation import Allocation
from hawqfx.passes.calibration import Calibration
from hawqfx.passes.cost import Cost
from hawqfx.passes.decompose import Decompose
from hawqfx.passes.equalize import Equalize
from hawqfx.passes.find_sites import FindSites
from hawqfx.passes.fisher import Fisher
from hawqfx.passes.fold_batchnorm import FoldBatchnorm
from hawqfx.passes.fold_constants import FoldConstants
from hawqfx.passes.hawq_v1 import HawqV1
from hawqfx.passes.hawq_v2 import HawqV2
from hawqfx.passes.insert_copies import InsertCopies
from hawqfx.passes.interactions import Interactions
from hawqfx.passes.lowering import Lowering
from hawqfx.passes.measured import Measured
from hawqfx.passes.mse import Mse
from hawqfx.passes.perturbation import Perturbation
from hawqfx.passes.rounding import Rounding
from hawqfx.passes.taylor import Taylor


def folding() -> Sequence[Pass]:
    """The float network that the integer one is compared with."""
    return [FoldConstants(), FoldBatchnorm()]


def finding(keep_float: tuple[str, ...] = ()) -> Sequence[Pass]:
    """Operators that have integer kernels, and where bits are chosen."""
    return [Decompose(), Equalize(keep_float=keep_float), InsertCopies(keep_float), FindSites(keep_float)]


def quantizing(calibration: Calibration) -> Sequence[Pass]:
    """The quantizer of each site at each width."""
    return [calibration]


def pricing(rounding: Rounding) -> Sequence[Pass]:
    """What each quantizer leaves of a tensor, and what it costs."""
    return [rounding, Perturbation(), Cost()]


# how the loss increase of a site at a width is predicted, by name on the command line
METRICS: Mapping[str, Callable[[], Analysis]] = {
    "hawq-v2": HawqV2,
    "fisher": Fisher,
    "taylor": Taylor,
    "measured": Measured,
    "mse": Mse,
    "hawq-v1": HawqV1,
}


# steps that compile() takes when asked to
OPTIONAL: Sequence[Callable[[], Pass]] = (Interactions,)

# what ranks best and costs least in benchmarks/fidelity.py; it draws targets from the model's own distribution
DEFAULT_METRIC = "fisher"
# for losses of which no distribution is known
GENERAL_METRIC = "hawq-v2"


def metric(name: str | Analysis | None, *, drawn: bool = True) -> Analysis:
    """The pass of this name, with default options; a pass stays as it is.  None: the default, where targets can be
    `drawn`, else the one that every loss has.  Raises HawqfxError."""
    if name is None:
        name = DEFAULT_METRIC if drawn else GENERAL_METRIC
    if not isinstance(name, str):
        return name
    if name not in METRICS:
        raise HawqfxError(f"sensitivity={name!r}: must be one of {', '.join(METRICS)}, or such a pass")
    return METRICS[name]()


def measuring(metric: Analysis, interactions: bool = False) -> Sequence[Pass]:
    """What each quantizer does to the loss, alone and with others."""
    return [metric, *[Interactions()] * interactions]


def deciding(allocation: Allocation) -> Sequence[Pass]:
    """One width per site, within the budget."""
    return [allocation]


def lowering() -> Sequence[Pass]:
    """The chosen quantizers, in the graph."""
    return [Lowering()]


def recipe(budget: Budget) -> Sequence[Pass]:
    """All of it, with default options."""
    return [
        *folding(),
        *finding(),
        *quantizing(Calibration()),
        *pricing(Rounding()),
        *measuring(metric(DEFAULT_METRIC)),
        *deciding(Allocation(budget)),
        *lowering(),
    ]
