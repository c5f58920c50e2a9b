"""The default loss: chosen by the last operators of the network, and by the shapes of its output and the targets."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hawqfx.errors import DataError
from hawqfx.frontend.criteria import (
    IGNORED_LABEL,
    Bernoulli,
    Categorical,
    Criterion,
    Form,
    SquaredError,
    are_distributions,
    lies_in_unit_interval,
    same_but_for_ones,
)
from hawqfx.frontend.data import Batch
from hawqfx.frontend.endings import Ending, class_axis, run_with_endings
from hawqfx.frontend.outputs import counted, entries, is_structured, targets_by_output, tensor_of, written
from hawqfx.frontend.several import Part, Several
from hawqfx.ir.program import Program

FORMS: Mapping[Ending, Form] = {"softmax": "probabilities", "log_softmax": "log-probabilities"}


@torch.no_grad()
def default_criterion(program: Program, batches: Sequence[Batch]) -> tuple[Criterion, str]:
    """The criterion that a captured network and its data ask for, and the reason in words.

    A tensor, or the one named `logits` in what the network returns, is judged alone.  Of a tuple, list or mapping
    without logits every floating-point tensor counts.  The squared error of one among several is divided by the
    variance of the float output on the first batch, which makes it a part of that output; cross-entropies are in nats.

    Raises:
        LossError: if the output has no tensor that a default loss looks at.
        DataError: if no default loss fits the targets; the message has both shapes.
    """
    output, made = run_with_endings(program, batches[0])

    def chosen(scores: Tensor, targets: Sequence[Any]) -> tuple[Criterion, str]:
        made_by = next((ending for tensor, ending in made if tensor is scores), None)
        return criterion_for(scores, made_by, targets, batches)

    if not is_structured(output):
        return chosen(tensor_of(output), [batch.target for batch in batches])
    outputs, keys = counted(output), tuple(entries(output))
    targets = [targets_by_output(batch.target, keys, list(outputs)) for batch in batches]
    parts, reasons = [], []
    for key, scores in outputs.items():
        criterion, reason = chosen(scores, [target[key] for target in targets])
        scale = 1.0
        if isinstance(criterion, SquaredError) and len(outputs) > 1:
            scale, reason = 1 / _variance(scores), f"{reason}, over the output's variance"
        parts.append(Part(key, criterion, scale))
        reasons.append(f"{key}: {reason}")
    left = [str(key) for key in keys if key not in outputs]
    head = [f"the sum over {len(parts)} outputs"] if len(parts) > 1 else []
    tail = [f"without {', '.join(left)}"] if left else []
    return Several(tuple(parts), keys), "; ".join([*head, *reasons, *tail])


def criterion_for(
    scores: Tensor, made_by: Ending | None, targets: Sequence[Any], batches: Sequence[Batch]
) -> tuple[Criterion, str]:
    """The criterion that one output asks for, and the reason in words.

    Args:
        scores: the output of the float network on the first batch.
        made_by: the function that makes it.
        targets: of it in each batch, None where there is none.
        batches: the data.

    Raises:
        DataError: if no default loss fits the targets; the message has both shapes.
    """
    ends = f" that ends in a {made_by}" if made_by else ""
    known = f"output {written(scores)}{ends}"
    target = next((target for target in targets if target is not None), None)
    if target is None:
        return _without_targets(scores, made_by, known, batches[0])
    if not isinstance(target, Tensor):
        raise DataError(f"no default loss fits targets that are a {type(target).__name__}: give loss=")
    known += f" and targets {written(target)}"
    if made_by == "sigmoid" and same_but_for_ones(scores, target):
        if all(lies_in_unit_interval(given) for given in targets if given is not None):
            return Bernoulli(), f"{_sigmoids(scores)}, for {known}"
        known += " beyond 0 and 1"
    if (soft := _soft_axis(scores, made_by, [each for each in targets if each is not None])) is not None:
        criterion = _categorical(soft, made_by, scores.ndim)
        return criterion, f"{_cross_entropy(criterion)}, for {known} that are distributions"
    if target.is_floating_point():
        if target.shape == scores.shape:
            return SquaredError(), f"squared error, for {known}"
    elif made_by != "sigmoid" and (axis := _axis(scores, made_by, target)) is not None:
        tokens = axis == 2 and scores.ndim == 3
        causal = tokens and _labels_are_inputs(targets, batches)
        criterion = _categorical(axis, made_by, scores.ndim, causal)
        shift = "; labels equal the inputs: each token predicts the next" if causal else "; labels are not shifted"
        return criterion, f"{_cross_entropy(criterion)}, for {known}{shift if tokens else ''}"
    if made_by == "sigmoid":
        wanted = "those of sigmoids are from 0 to 1 in the shape of the output"
    else:
        wanted = "labels are integers, one for each distribution over classes"
    raise DataError(
        f"no default loss fits {known}: {wanted}; targets of a squared error are floats in the shape of the output; "
        "give loss= for others"
    )


def _without_targets(scores: Tensor, made_by: Ending | None, known: str, batch: Batch) -> tuple[Criterion, str]:
    if made_by == "sigmoid":
        return Bernoulli(), f"{_sigmoids(scores)}, for {known}, without targets"
    tokens = any(not tensor.is_floating_point() and tensor.ndim >= 2 for tensor in batch.tensors)
    if made_by is not None:
        axis = class_axis(scores, made_by)
    elif scores.ndim == 3 and tokens:
        axis, known = 2, f"{known} of tokens"
    else:
        axis = 1 if scores.ndim == 2 and scores.shape[1] > 1 else None
    if axis is None:
        return SquaredError(), f"squared error to the float output, for {known}, without targets"
    criterion = _categorical(axis, made_by, scores.ndim)
    return criterion, f"{_cross_entropy(criterion)}, for {known}, without targets"


def _axis(scores: Tensor, made_by: Ending | None, labels: Tensor) -> int | None:
    """The dimension of the classes that labels of this shape belong to."""
    if made_by is None:
        wanted = [axis for axis in ((2, 1) if scores.ndim == 3 else (1,)) if axis < scores.ndim]
    else:
        wanted = [axis for axis in [class_axis(scores, made_by)] if axis is not None]
    fits = [axis for axis in wanted if labels.shape == scores.shape[:axis] + scores.shape[axis + 1 :]]
    return fits[0] if fits else None


def _soft_axis(scores: Tensor, made_by: Ending | None, targets: Sequence[Any]) -> int | None:
    """The dimension along which targets in the shape of the output are distributions over classes, one-hot or soft."""
    if made_by == "sigmoid" or scores.ndim < 2 or any(target.ndim != scores.ndim for target in targets):
        return None
    if targets[0].shape != scores.shape or targets[0].dtype == torch.bool:
        return None
    if made_by is not None:
        axes = [axis for axis in [class_axis(scores, made_by)] if axis is not None]
    else:
        axes = [2, 1] if scores.ndim == 3 else [1]
    found = (axis for axis in axes if scores.shape[axis] > 1 and all(are_distributions(each, axis) for each in targets))
    return next(found, None)


def _categorical(axis: int, made_by: Ending | None, dimensions: int, causal: bool = False) -> Categorical:
    behind_all = axis > 1 and axis == dimensions - 1  # such as those of tokens; -1 says so whatever the rank
    return Categorical(-1 if behind_all else axis, "logits" if made_by is None else FORMS[made_by], causal)


def _cross_entropy(criterion: Categorical) -> str:
    over = "the last dimension" if criterion.axis == -1 else f"dimension {criterion.axis}"
    of = "" if criterion.form == "logits" else f" of {criterion.form}"
    return f"cross-entropy (nats){of} over {over}"


def _sigmoids(scores: Tensor) -> str:
    return f"binary cross-entropy (nats) of the {scores[0].numel()} sigmoids"


def _labels_are_inputs(targets: Sequence[Any], batches: Sequence[Batch]) -> bool:
    """Whether labels repeat the tokens of the input wherever they count, as users of transformers give them."""
    for labels, batch in zip(targets, batches, strict=True):
        if labels is None:
            continue
        ids = batch.kwargs.get("input_ids", next((x for x in batch.tensors if _is_tokens(x)), None))
        if ids is None or ids.shape != labels.shape or not bool(((labels == ids) | (labels == IGNORED_LABEL)).all()):
            return False
    return True


def _is_tokens(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and not tensor.is_floating_point() and tensor.dtype != torch.bool


def _variance(scores: Tensor) -> float:
    """That of all elements; 1 for an output that is constant but for rounding, whose error nothing compares with."""
    values = scores.detach().double()
    variance, square = float(values.var(correction=0)), float(values.square().mean())
    return variance if variance > torch.finfo(scores.dtype).eps * square else 1.0
