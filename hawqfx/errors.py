"""The errors that hawqfx raises on purpose.  Every message names the fault and the next thing to do."""


class HawqfxError(Exception):
    """The base class of all errors of hawqfx."""


class CaptureError(HawqfxError):
    """The model cannot be captured: it is in train mode, torch.export refuses it, or its tensors are not finite."""


class NothingToQuantize(HawqfxError):
    """The graph has no layer whose weights hawqfx can quantize."""


class DataError(HawqfxError, ValueError):
    """The calibration data are empty, of the wrong shape, not finite, or their labels are out of range."""


class LossError(HawqfxError, ValueError):
    """The loss is not a finite scalar, or cannot be computed from the model's output."""


class DerivativeError(HawqfxError):
    """An operator of the graph cannot be differentiated as often as the metric needs."""


class WorkerError(HawqfxError):
    """The processes that share a measurement have different models, data, losses or seeds."""


class CacheError(HawqfxError):
    """The cache folder cannot be read or written, or the cache cannot tell the loss from other losses."""


class BudgetError(HawqfxError, ValueError):
    """The text of a budget does not parse."""


class InfeasibleBudget(HawqfxError, ValueError):
    """No choice of formats keeps the budget.

    Args:
        message: names the limit, and the least amount that it could be met with.
        limit: name of the limit.
        least: the least amount, in the limit's unit; NaN if it is not known.
    """

    def __init__(self, message: str, limit: str = "", least: float = float("nan")) -> None:
        super().__init__(message)
        self.limit, self.least = limit, least


class PlanError(HawqfxError, ValueError):
    """A saved plan does not belong to this model, or is damaged."""


class BackendError(HawqfxError, ValueError):
    """A backend does not exist, is not installed, or cannot run the network that it was given."""


class PassError(HawqfxError):
    """A pass breaks its promise, or leaves a graph that breaks the law of the graph (hawqfx.pass_manager.verify)."""


class ExportError(HawqfxError):
    """The file cannot be made or written.  An older file at the same path is still there, unchanged."""
