"""One call of the user's functions on the float network's output, before anything is measured."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hawqfx.errors import DerivativeError, HawqfxError, LossError
from hawqfx.frontend.context import Context
from hawqfx.frontend.data import Batch
from hawqfx.frontend.outputs import written
from hawqfx.ir.program import Program

T = TypeVar("T")


def called(name: str, function: Callable[[], T], output: Any, target: Any) -> T:
    """What a call of the user's function returns.

    Args:
        name: of the argument, for messages.
        function: calls it.
        output: what it is given, for messages.
        target: likewise.

    Raises:
        LossError: if the function raises anything but an error of hawqfx.
    """
    try:
        return function()
    except HawqfxError:
        raise
    except Exception as cause:  # the user's function may raise anything
        raise LossError(
            f"{name} raised {type(cause).__name__}: {cause}; it is called with an output {_described(output)} and a "
            f"target {_described(target)}"
        ) from cause


@torch.no_grad()
def try_loss(program: Program, context: Context, derivatives: int) -> None:
    """Compute the loss of the first batch, and differentiate it by the output as often as it will be.

    Args:
        program: the captured network.
        context: the batches and the loss.
        derivatives: 0, 1 or 2.

    Raises:
        LossError: if the loss cannot be computed, is no finite scalar, or does not depend on the output by operators
            that torch differentiates.
        DerivativeError: if it has no second derivatives, and two are needed.
    """
    batch = context.batches[0]
    output = _leaves(program.run(batch.args, batch.kwargs))
    with torch.enable_grad():
        loss = called(
            "loss= or draw=" if context.draw else "loss=", lambda: context.loss_of(output, batch, 0), output,
            batch.target,
        )  # fmt: skip
        if derivatives > 0:
            _differentiate(loss, [leaf for leaf in pytree.tree_leaves(output) if _is_float(leaf)], derivatives)


def _differentiate(loss: Tensor, leaves: list[Tensor], times: int) -> None:
    if not loss.requires_grad:
        raise LossError(
            "the loss does not depend on the model's output by operators that torch differentiates: compute it with "
            'torch from the output, without detach() or numpy, or give sensitivity="measured" or "mse"'
        )
    try:
        # once_differentiable functions refuse a second derivative only where the factor has one
        factor = torch.ones_like(loss, requires_grad=times > 1)
        gradients = torch.autograd.grad(loss, leaves, factor, create_graph=times > 1, allow_unused=True)
        curved = [gradient for gradient in gradients if gradient is not None and gradient.requires_grad]
        if any(map(_is_once_differentiable, curved)):
            raise RuntimeError("it has a function that is marked with @once_differentiable")
        if times > 1 and curved:
            torch.autograd.grad([gradient.sum() for gradient in curved], leaves, allow_unused=True)
    except RuntimeError as error:
        which = "second derivatives" if times > 1 else "derivative"
        raise DerivativeError(
            f"the loss has no {which}, which this metric of sensitivity needs ({str(error).splitlines()[0]}): write it "
            'with operators that torch differentiates, or give sensitivity="measured" or "mse"'
            + (', or draw= for sensitivity="gauss-newton", which needs first derivatives only' if times > 1 else "")
        ) from error


def _is_once_differentiable(gradient: Tensor) -> bool:
    """Whether a gradient comes from a function that refuses a second derivative: torch raises nothing where it is only
    asked for those of tensors before that function, and gives none."""
    seen, waiting = set(), [gradient.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [source for source, _ in node.next_functions]
    return any(node.name() == "torch::autograd::Error" for node in seen)


def _leaves(output: Any) -> Any:
    """The output with its floating-point tensors as leaves to differentiate by."""
    return pytree.tree_map(lambda leaf: leaf.detach().requires_grad_() if _is_float(leaf) else leaf, output)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _described(value: Any) -> str:
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    shapes = ", ".join(f"{str(tensor.dtype).removeprefix('torch.')} {written(tensor)}" for tensor in tensors[:4])
    return f"of {shapes}" if tensors else repr(value)


def score_of(score: Callable[[Any, Any], Any], output: Any, batch: Batch) -> float:
    """The score of an output on a batch.

    Raises:
        LossError: if the function raises, or returns no single number.
    """
    return called("metric=", lambda: float(score(output, batch.target)), output, batch.target)
