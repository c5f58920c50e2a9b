"""The errors that hawqfx raises on purpose.  Every message names the fault and the next thing to do."""


class HawqfxError(Exception):
    """The base class of all errors of hawqfx; raised itself where the user's own code or checkpoint fails.

    To do: Mend what the message names, or install the package that it names.
    """


class UsageError(HawqfxError, ValueError):
    """An argument is wrong, or arguments cannot be used together; the command line ends with the exit code 2.

    To do: What the message says of the argument that it names.
    """


class CaptureError(HawqfxError):
    """The model cannot be captured: it is in train mode, torch.export refuses it, or its tensors are not finite.

    To do: Call `eval()`; take control flow, printing and sizes that depend on values out of forward; check the
    checkpoint for NaN. The message names the operator or the input, and `keep_float=` does not help here.
    """


class NothingToQuantize(HawqfxError):
    """The graph has no layer whose weights hawqfx can quantize.

    To do: Give the module that has the convolutions, linear layers or tables, and look whether `keep_float=` names
    them all.
    """


class DataError(HawqfxError, ValueError):
    """The calibration data are empty, of the wrong shape, not finite, or their labels are out of range.

    To do: Give batches as the model takes them: tensors, pairs (inputs, target) or mappings, all of one shape but
    for the batch, unless `dynamic_shapes=` says what varies.
    """


class LossError(HawqfxError, ValueError):
    """The loss or the metric is not a finite scalar, or cannot be computed from the model's output, or the quantized
    network is not finite.

    To do: Return the mean over the batch as a finite scalar of the model's output; look at the tensor that the
    message names, which is the first that overflows. Leave activations in float that the network divides by.
    """


class DerivativeError(HawqfxError):
    """An operator of the graph cannot be differentiated as often as the metric needs.

    To do: Take a metric of fewer derivatives: `sensitivity="gauss-newton"` or `"fisher"` needs one, `"measured"`
    and `"mse"` none.
    """


class WorkerError(HawqfxError):
    """The processes that share a measurement have different models, data, losses or seeds.

    To do: Start all processes with the same model, data, loss and seed, and the same version of hawqfx and torch.
    """


class CacheError(HawqfxError):
    """The cache folder cannot be read or written, or the cache cannot tell the loss from other losses.

    To do: Give a folder that can be written; name a loss of your own by a function of a module, not by a lambda.
    """


class BudgetError(UsageError):
    """The text of a budget does not parse, or the network cannot take the shape that a latency is for.

    To do: Write limits as "size=12.5%, bops=2%"; the message names what is not understood and what there is.
    """


class InfeasibleBudget(HawqfxError, ValueError):
    """No choice of formats keeps the budget.

    To do: Raise the limit to the least that the message names, or allow what stands in the way: more widths, fewer
    layers in `keep_float=`, fewer rules in `fix=`.

    Args:
        message: names the limit, and the least amount that it could be met with.
        limit: name of the limit.
        least: the least amount, in the limit's unit; NaN if it is not known.
        reasons: what stands in the way of less; it ends the message.
    """

    def __init__(self, message: str, limit: str = "", least: float = float("nan"), reasons: str = "") -> None:
        super().__init__(message + reasons)
        self.limit, self.least, self.reasons = limit, least, reasons


class PlanError(HawqfxError, ValueError):
    """A saved plan does not belong to this model, or is damaged.

    To do: Give the model and weights that the plan was made for, or `reround=True` to take its bits for others.
    """


class BackendError(HawqfxError, ValueError):
    """A backend is not installed, or cannot run the network that it was given.

    To do: Install what the message names, or choose another backend; `hawqfx bench --help` lists them.
    """


class PassError(HawqfxError):
    """A pass breaks its promise, or leaves a graph that breaks the law of the graph (hawqfx.pass_manager.verify).

    To do: In a pass of your own, keep to what it declares: see `passes/README.md`. From a pass of hawqfx it is a
    defect: report it with the message.
    """


class ExportError(HawqfxError):
    """The file cannot be made or written.  An older file at the same path is still there, unchanged.

    To do: Free the disk or give a folder that can be written; for a limit on size, a larger one or the portable
    packing. A file that computes something else than the graph is a defect: report it with the message.
    """
