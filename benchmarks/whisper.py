"""Whisper tiny.en (Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision"), and the two
networks that it is deployed as.

    Listener   a log-mel spectrogram of 30 s (N, 80, 3000) -> what each layer of the decoder attends to: the keys and
               values of 1,500 moments, two tensors (N, heads, 1500, head_dim) for each of its layers
    Writer     tokens (N, L), those tensors, and the keys and values of the tokens before them -> logits (N, L, words),
               and the keys and values with these tokens

The weights, of 16 bits, are in a file of CTranslate2.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

LAYERS, MOMENTS, WIDTH, HEADS = 4, 1500, 384, 6
START, ENGLISH, END = 50257, 50362, 50256  # tokens: a text begins, without time stamps, and ends
WORDS = 50257  # the tokens from here on are no text
SILENT = (220, END)  # tokens that no text begins with: a space, and the end
DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)  # by their number in the file


class WhisperEncoder(nn.Module):
    """A spectrogram (N, 80, 3000) -> 1,500 vectors of 384 numbers."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, features: Tensor) -> Tensor:
        return self.encoder(features).last_hidden_state


class Listener(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.model.encoder
        attention = [layer.encoder_attn for layer in model.model.decoder.layers]
        self.keys = nn.ModuleList(each.k_proj for each in attention)
        self.values = nn.ModuleList(each.v_proj for each in attention)
        self.heads = attention[0].num_heads

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        heard = self.encoder(features).last_hidden_state
        found: dict[str, Tensor] = {}
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            found |= {f"heard_{layer}_key": self._split(key(heard)), f"heard_{layer}_value": self._split(value(heard))}
        return found

    def _split(self, vectors: Tensor) -> Tensor:
        return vectors.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Writer(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder = model.model.decoder
        self.head = model.proj_out

    def forward(self, tokens: Tensor, **held: Tensor) -> dict[str, Tensor]:
        from transformers.cache_utils import EncoderDecoderCache

        cache = EncoderDecoderCache(_cache("past", held), _cache("heard", held))
        cache.is_updated = dict.fromkeys(range(LAYERS), True)
        # the decoder asks for what the encoder gave, and reads its keys and values from the cache
        nothing = tokens.new_zeros((1, 1, 1), dtype=torch.float32)
        answer = self.decoder(
            input_ids=tokens, encoder_hidden_states=nothing, past_key_values=cache, use_cache=True
        ).last_hidden_state
        found: dict[str, Any] = {"logits": self.head(answer)}
        kept: Any
        for layer, kept in enumerate(cache.self_attention_cache.layers):
            found |= {f"next_{layer}_key": kept.keys, f"next_{layer}_value": kept.values}
        return found


def _cache(kind: str, held: dict[str, Tensor]) -> Any:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for number in range(LAYERS):
        layer = DynamicLayer()
        layer.keys, layer.values = held[f"{kind}_{number}_key"], held[f"{kind}_{number}_value"]
        layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True
        cache.layers.append(layer)
    return cache


def no_past(batch: int) -> dict[str, Tensor]:
    """The Writer's inputs for the keys and values of no tokens."""
    return {
        f"past_{layer}_{part}": torch.zeros(batch, 6, 0, 64) for layer in range(LAYERS) for part in ("key", "value")
    }


def shapes() -> dict[str, dict[int, Any]]:
    """The Writer's `dynamic_shapes` of torch.export, without the batch."""
    found: dict[str, dict[int, Any]] = {"tokens": {1: Dim("sequence")}}
    for layer in range(LAYERS):
        for part in ("key", "value"):
            found |= {f"past_{layer}_{part}": {2: Dim("past")}, f"heard_{layer}_{part}": {}}
    return found


def build() -> Any:
    """The network without its weights, WhisperForConditionalGeneration of transformers, in eval mode."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=51864, d_model=WIDTH, encoder_layers=LAYERS, encoder_attention_heads=HEADS, encoder_ffn_dim=1536,
        decoder_layers=LAYERS, decoder_attention_heads=HEADS, decoder_ffn_dim=1536, num_mel_bins=80,
        max_source_positions=MOMENTS, max_target_positions=448, decoder_start_token_id=START, bos_token_id=END,
        eos_token_id=END, pad_token_id=END,
    )  # fmt: skip
    model: Any = WhisperForConditionalGeneration(config)
    return model.eval()


def load(path: Path) -> Any:
    """The trained network."""
    model = build()
    model.load_state_dict(_state(_tensors(path)))
    return model


def _state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names in transformers."""
    table = tensors["decoder/embeddings/weight"]
    found = {"model.decoder.embed_tokens.weight": table, "proj_out.weight": table}
    for conv in ("conv1", "conv2"):
        found |= _layer(tensors, f"model.encoder.{conv}", f"encoder/{conv}")
    for side in ("encoder", "decoder"):
        found[f"model.{side}.embed_positions.weight"] = tensors[f"{side}/position_encodings/encodings"]
        found |= _norm(tensors, f"model.{side}.layer_norm", f"{side}/layer_norm")
        for number in range(LAYERS):
            ours, theirs = f"model.{side}.layers.{number}", f"{side}/layer_{number}"
            found |= _norm(tensors, f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
            for place in (0, 1):
                found |= _layer(tensors, f"{ours}.fc{place + 1}", f"{theirs}/ffn/linear_{place}")
            found |= _attention(tensors, f"{ours}.self_attn", f"{theirs}/self_attention", ("qkv",))
            if side == "decoder":
                found |= _attention(tensors, f"{ours}.encoder_attn", f"{theirs}/attention", ("q", "kv"))
    return found


def _attention(tensors: dict[str, Tensor], ours: str, theirs: str, fused: tuple[str, ...]) -> dict[str, Tensor]:
    """Projections, of which those of several letters are one layer there; keys have no bias here."""
    found = _norm(tensors, f"{ours}_layer_norm", f"{theirs}/layer_norm")
    for place, letters in enumerate(fused):
        for kind in ("weight", "bias"):
            parts = tensors[f"{theirs}/linear_{place}/{kind}"].chunk(len(letters))
            found |= {
                f"{ours}.{letter}_proj.{kind}": part
                for letter, part in zip(letters, parts, strict=True)
                if (letter, kind) != ("k", "bias")
            }
    return found | _layer(tensors, f"{ours}.out_proj", f"{theirs}/linear_{len(fused)}")


def _layer(tensors: dict[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    return {f"{ours}.{kind}": tensors[f"{theirs}/{kind}"] for kind in ("weight", "bias")}


def _norm(tensors: dict[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    """The two tensors of a normalization."""
    return {f"{ours}.weight": tensors[f"{theirs}/gamma"], f"{ours}.bias": tensors[f"{theirs}/beta"]}


def _tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a CTranslate2 file, in float32."""
    with path.open("rb") as file:

        def number(kind: str) -> int:
            return struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))[0]

        def text() -> str:
            return file.read(number("H")).rstrip(b"\0").decode()

        number("I"), text(), number("I")  # the versions of the file and the model, and the model's kind
        tensors = {}
        for _ in range(number("I")):
            name = text()
            shape = [number("I") for _ in range(number("B"))]
            dtype = DTYPES[number("B")]
            values = np.frombuffer(file.read(number("I")), dtype).reshape(shape)
            tensors[name] = torch.from_numpy(values.astype(np.float32))
    return tensors
