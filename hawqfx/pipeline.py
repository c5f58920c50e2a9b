"""The recipe: how a captured network becomes an integer one, read from top to bottom."""

from collections.abc import Sequence

from hawqfx.budget import Budget
from hawqfx.contract import Pass
from hawqfx.passes.allocation import Allocation
from hawqfx.passes.calibration import Calibration
from hawqfx.passes.cost import Cost
from hawqfx.passes.find_sites import FindSites
from hawqfx.passes.fold_batchnorm import FoldBatchnorm
from hawqfx.passes.lowering import Lowering
from hawqfx.passes.perturbation import Perturbation
from hawqfx.passes.rounding import Rounding
from hawqfx.passes.sensitivity import Sensitivity


def finding(keep_float: tuple[str, ...] = ()) -> Sequence[Pass]:
    """Where bits are chosen."""
    return [FoldBatchnorm(), FindSites(keep_float)]


def measuring(sensitivity: Sensitivity, calibration: Calibration) -> Sequence[Pass]:
    """How much each site matters, and its quantizer at each width."""
    return [sensitivity, calibration]


def pricing(rounding: Rounding) -> Sequence[Pass]:
    """What each quantizer leaves of a tensor, and what it costs."""
    return [rounding, Perturbation(), Cost()]


def deciding(budget: Budget) -> Sequence[Pass]:
    """One width per site, within the budget."""
    return [Allocation(budget)]


def lowering() -> Sequence[Pass]:
    """The chosen quantizers, in the graph."""
    return [Lowering()]


def recipe(budget: Budget) -> Sequence[Pass]:
    """All of it, with default options."""
    return [
        *finding(),
        *measuring(Sensitivity(), Calibration()),
        *pricing(Rounding()),
        *deciding(budget),
        *lowering(),
    ]
