"""Every error that hawqfx raises on purpose.  Each message says what was wrong and what to do next."""


class HawqfxError(Exception):
    """The base of them all."""


class CaptureError(HawqfxError):
    """The model cannot be turned into a graph as it is: in train mode, refused by torch.export, not finite."""


class NothingToQuantize(HawqfxError):
    """The graph has no layer whose weights hawqfx can quantize."""


class DataError(HawqfxError, ValueError):
    """The calibration data are empty, of the wrong shape, not finite, or their labels are out of range."""


class LossError(HawqfxError, ValueError):
    """The loss is not a finite scalar, or cannot be computed from what the model returns."""


class DerivativeError(HawqfxError):
    """An operator of the graph cannot be differentiated as often as the metric needs."""


class WorkerError(HawqfxError):
    """The processes that measure together do not agree on what to measure."""


class CacheError(HawqfxError):
    """The cache folder cannot be read or written, or the loss cannot be told from another one."""


class BudgetError(HawqfxError, ValueError):
    """The text of a budget does not parse."""


class InfeasibleBudget(HawqfxError, ValueError):
    """No choice of bits meets the budget.  The message names the limit and the least it could be; `limit` and `least`
    are these, the latter in the limit's unit."""

    def __init__(self, message: str, limit: str = "", least: float = float("nan")) -> None:
        super().__init__(message)
        self.limit, self.least = limit, least


class PlanError(HawqfxError, ValueError):
    """A saved plan does not belong to this model, or is damaged."""


class BackendError(HawqfxError, ValueError):
    """A backend is not there, or cannot run what it was given."""


class PassError(HawqfxError):
    """A pass broke its promise, or the graph after it breaks the law of the graph."""


class ExportError(HawqfxError):
    """The file could not be made or written.  What was at the path before is still there."""
