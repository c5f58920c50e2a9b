"""Inputs of a decoder that are made of its labels, as transformers makes them in training.

An encoder-decoder that is called with labels shifts them to the right and reads them as the decoder's inputs.  hawqfx
takes `labels` as the target, and so makes those inputs itself.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hawqfx.frontend.data import Batch

_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")


def with_decoder_inputs(model: Any, batches: Sequence[Batch]) -> tuple[Batch, ...]:
    """The batches with the decoder's inputs, where a model makes them of labels and a batch gives labels alone."""
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if make is None:
        return tuple(batches)

    def added(batch: Batch) -> Batch:
        if batch.args or batch.target is None or any(name in batch.kwargs for name in _INPUTS):
            return batch
        return replace(batch, kwargs={**batch.kwargs, _INPUTS[0]: make(labels=batch.target)})

    return tuple(map(added, batches))
