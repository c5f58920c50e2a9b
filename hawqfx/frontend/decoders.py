"""Causal language models of transformers with their cache as inputs and outputs, so that one graph generates text.

A decoder of transformers takes an object that holds the keys and values of past tokens, and returns it longer.  Here
the object's tensors are inputs and outputs of the network, named past_key_values_0_key, present_0_key and so on, and in
a file with points, as transformers.js and optimum have them (past_key_values.0.key):

    input_ids        (batch, sequence) int64, the new tokens
    attention_mask   (batch, past + sequence) int64, zero where a text is padded on the left
    past_key_values  (batch, heads, past, head_dim) of each layer; past is zero at the start of a text
    logits           (batch, sequence, words)
    present          (batch, heads, past + sequence, head_dim) of each layer: the next past

The network calibrates on each text twice: from its start, without a past, and as the continuation of its first half.
Each token is to predict the next one of the text, or of the labels that are given; padding predicts and is predicted by
nothing.
"""

import copy
import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from hawqfx.errors import CaptureError, DataError, UsageError
from hawqfx.frontend.criteria import IGNORED_LABEL
from hawqfx.frontend.data import Batch, gather
from hawqfx.frontend.dimensions import Names

TOKENS, MASK = "input_ids", "attention_mask"
_SHORTEST = 4  # tokens of a text, of which half are a past: torch.export takes sizes of 0 and 1 for constants


def past_name(layer: int, part: str) -> str:
    """The input that holds the past "key" or "value" of a layer."""
    return f"past_key_values_{layer}_{part}"


def present_name(layer: int, part: str) -> str:
    """The output that is the next past of a layer."""
    return f"present_{layer}_{part}"


def name_in_file(name: str) -> str:
    """The name that an input or output of a network has in a file: of a past and a present, that of transformers."""
    return re.sub(r"^(past_key_values|present)_(\d+)_(key|value)$", r"\1.\2.\3", name)


class _Decoder:
    """The forward of a model with its cache as tensors, beside the model's own class."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **past: Tensor) -> dict[str, Tensor]:
        layers = len(past) // 2
        given = [(past[past_name(layer, "key")], past[past_name(layer, "value")]) for layer in range(layers)]
        output = self.with_past(input_ids, attention_mask, _cache(given))
        found = {"logits": output["logits"]}
        for layer, held in enumerate(output["past_key_values"].layers):
            found[present_name(layer, "key")], found[present_name(layer, "value")] = held.keys, held.values
        return found

    def with_past(self, tokens: Tensor, mask: Tensor, cache: Any) -> Any:
        """What the model's own class answers; padding on the left has no position of its own."""
        kwargs: dict[str, Any] = {}
        if self.takes_positions:  # type: ignore[attr-defined]
            kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, mask.shape[1] - tokens.shape[1] :]
        return super().forward(  # type: ignore[misc]
            input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **kwargs
        )


def causal_decoder(model: nn.Module) -> nn.Module:
    """The model with its cache as inputs and outputs.  It shares all tensors with the model, under the same names.

    Raises:
        CaptureError: if the model has no such cache, or an encoder.
    """
    if isinstance(model, _Decoder):
        return model
    names = inspect.signature(model.forward).parameters if isinstance(model, nn.Module) else {}
    if not {TOKENS, MASK, "past_key_values", "use_cache"} <= names.keys():
        raise CaptureError(
            f'tokens="causal" is for causal language models of transformers, which take {TOKENS}, {MASK} and '
            f"past_key_values: {type(model).__name__} does not"
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise CaptureError(
            f'tokens="causal" is for models that only write: {type(model).__name__} encodes its input first. Compile '
            "two modules: the encoder with what the decoder attends to, and the decoder with its past"
        )
    decoder = copy.copy(model)
    decoder.__class__ = type(f"{type(model).__name__}WithCache", (_Decoder, type(model)), {})
    decoder.takes_positions = "position_ids" in names  # type: ignore[assignment]
    return decoder


def inputs(
    model: Any, data: Iterable[Any], holdout: Iterable[Any] | None, tokens: str, samples: int | None, shapes: Any
) -> tuple[nn.Module, list[Mapping[str, Any]], list[Mapping[str, Any]] | None, Any]:
    """What compile() captures in place of a causal language model and of texts: the decoder, its batches, those held
    out, and its `dynamic_shapes`.

    Raises:
        UsageError: if `tokens` is no kind of a model, or `shapes` are given beside it.
        CaptureError: if the model has no cache of keys and values.
        DataError: if the data are no texts.
    """
    if tokens != "causal":
        raise UsageError(f'tokens={tokens!r}: must be "causal", or left out')
    if shapes is not None:
        raise UsageError("dynamic_shapes= beside tokens=: a decoder's sequence, past and batch vary already")
    decoder = causal_decoder(model)
    batches = decoder_batches(decoder, data, samples)
    held = None if holdout is None else decoder_batches(decoder, holdout)
    return decoder, batches, held, shapes_of_decoder(_layers_of(batches[0]))


def as_captured(model: Any, example: Batch, shapes: Any) -> tuple[Any, Any]:
    """A model and `dynamic_shapes` as they were captured for an example: the decoder, where a past is in it."""
    layers = _layers_of(example.kwargs)
    return (causal_decoder(model), shapes_of_decoder(layers)) if layers else (model, shapes)


def shapes_of_decoder(layers: int) -> dict[str, dict[int, Any]]:
    """The `dynamic_shapes` of torch.export for a decoder of so many layers."""
    past = Dim("past")
    sizes: dict[str, dict[int, Any]] = {TOKENS: {1: Dim("sequence")}, MASK: {1: Dim("total", min=_SHORTEST)}}
    return sizes | {past_name(layer, part): {2: past} for layer in range(layers) for part in ("key", "value")}


def sums(dimensions: Names) -> dict[str, tuple[str, ...]]:
    """The dimensions of a decoder's inputs that are sums of others: name -> the names of the parts.

    Args:
        dimensions: that vary, of any network or file; those of no decoder have none.
    """
    named = {name_in_file(name): own for name, own in dimensions.items()}
    places = ((MASK, 1), (name_in_file(past_name(0, "key")), 2), (TOKENS, 1))
    total, *parts = (named.get(name, {}).get(axis, "") for name, axis in places)
    return {total: tuple(parts)} if total and all(parts) and total not in parts else {}


def _layers_of(batch: Mapping[str, Any]) -> int:
    """The layers whose past is among the inputs of a batch."""
    return sum(name.startswith("past_key_values_") for name in batch) // 2


@dataclass(frozen=True)
class _Text:
    """Tokens (N, L), their mask (N, L), and what each is to predict (N, L), IGNORED_LABEL where that is nothing."""

    tokens: Tensor
    mask: Tensor
    following: Tensor

    @staticmethod
    def of(batch: Batch, index: int) -> "_Text":
        given = dict(batch.kwargs)
        if batch.args:
            given[TOKENS] = batch.args[0]
        strangers = given.keys() - {TOKENS, MASK, "token_type_ids", "position_ids"}
        tokens = given.get(TOKENS)
        if len(batch.args) > 1 or strangers or not isinstance(tokens, Tensor) or tokens.ndim != 2:
            raise DataError(
                f'batch {index}: with tokens="causal" a batch is tokens (N, L), or a mapping of {TOKENS}, {MASK} and '
                "labels"
            )
        if tokens.is_floating_point() or tokens.shape[1] < _SHORTEST:
            raise DataError(
                f"batch {index} has {TOKENS} of shape {tuple(tokens.shape)} and type {tokens.dtype}: texts are whole "
                f"numbers, at least {_SHORTEST} of each"
            )
        mask = given.get(MASK, torch.ones_like(tokens))
        labels = tokens if batch.target is None else batch.target
        if not isinstance(labels, Tensor) or labels.shape != tokens.shape or mask.shape != tokens.shape:
            shapes = [tuple(getattr(each, "shape", ())) for each in (tokens, mask, labels)]
            raise DataError(f"batch {index}: tokens, mask and labels have one shape (N, L), here {shapes}")
        following = torch.full_like(tokens, IGNORED_LABEL)
        following[:, :-1] = torch.where((mask[:, 1:] != 0) & (mask[:, :-1] != 0), labels[:, 1:], IGNORED_LABEL)
        return _Text(tokens, mask, following)

    def rows(self, start: int) -> Tensor:
        """The texts, (N,) bool, whose tokens from `start` predict anything."""
        return (self.following[:, start:] != IGNORED_LABEL).any(1)


@torch.no_grad()
def decoder_batches(decoder: nn.Module, data: Iterable[Any], samples: int | None = None) -> list[Mapping[str, Any]]:
    """Batches of texts as a decoder takes them: each text from its start, and the second half after the first.

    Args:
        decoder: of `causal_decoder`, in eval mode.
        data: tokens (N, L), or mappings with input_ids, and with or without attention_mask and labels.
        samples: the number of texts to take from the start; None takes all.

    Raises:
        DataError: if the data are no such batches.
        CaptureError: if the model's cache holds other than keys and values.
    """
    found: list[Mapping[str, Any]] = []
    for index, batch in enumerate(gather(data, samples, varying=True)):
        text = _Text.of(batch, index)
        half = text.tokens.shape[1] // 2
        past = _past(decoder, text.tokens[:, :half], text.mask[:, :half])
        none = {name: tensor[:, :, :0] for name, tensor in past.items()}
        for start, held in ((half, past), (0, none)):
            rows = text.rows(start)
            if not rows.any():
                raise DataError(f"batch {index}: the texts are padded so far that nothing is left to predict")
            whole = {TOKENS: text.tokens[:, start:], MASK: text.mask, **held, "labels": text.following[:, start:]}
            found.append({name: tensor[rows] for name, tensor in whole.items()})
    return found


def _past(decoder: nn.Module, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The keys and values of tokens, by the names of inputs."""
    if decoder.training:
        raise CaptureError(f"the model is in train mode ({type(decoder).__name__}): call model.eval() first")
    assert isinstance(decoder, _Decoder)
    own = type(decoder).__bases__[1].__name__
    held = decoder.with_past(tokens, mask, _cache([]))["past_key_values"]  # of whole texts, whatever the windows
    found = {}
    for number, layer in enumerate(getattr(held, "layers", ())):
        for part in ("key", "value"):
            tensor = getattr(layer, f"{part}s", None)
            if not isinstance(tensor, Tensor) or tensor.ndim != 4 or tensor.shape[2] != tokens.shape[1]:
                raise CaptureError(
                    f"layer {number} of {own} caches other than the keys and values of all tokens, "
                    f"{type(layer).__name__}: only those go in and out of a file"
                )
            found[past_name(number, part)] = tensor
    if not found:
        raise CaptureError(f"{own} returns no cache of layers: {type(held).__name__}")
    return found


def _cache(given: list[tuple[Tensor, Tensor]]) -> Any:
    """A cache that holds tensors as they are; its own constructor copies them, by operators that a graph would keep."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for key, value in given:
        layer = DynamicLayer()
        layer.keys, layer.values, layer.dtype, layer.device = key, value, key.dtype, key.device
        layer.is_initialized = True
        cache.layers.append(layer)
    return cache
