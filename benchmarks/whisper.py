"""The encoder of Whisper tiny.en (Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision").

A log-mel spectrogram of 30 s (N, 80, 3000) goes to 1,500 vectors of 384 numbers.  The weights, of 16 bits, are in a
file of CTranslate2.
"""

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

LAYERS = 4
DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)  # by their number in the file


class WhisperEncoder(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, features: Tensor) -> Tensor:
        return self.encoder(features).last_hidden_state


def load(path: Path) -> WhisperEncoder:
    """The trained encoder in eval mode."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder as Encoder

    config = WhisperConfig(
        d_model=384, encoder_layers=LAYERS, encoder_attention_heads=6, encoder_ffn_dim=1536, num_mel_bins=80,
        max_source_positions=1500,
    )  # fmt: skip
    encoder: nn.Module = Encoder(config)
    encoder.load_state_dict(_state(_tensors(path)))
    return WhisperEncoder(encoder).eval()


def _state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors by their names in transformers."""
    names = {"embed_positions.weight": "position_encodings/encodings", **_pair("layer_norm", "layer_norm")}
    for conv in ("conv1", "conv2"):
        names |= {f"{conv}.{kind}": f"{conv}/{kind}" for kind in ("weight", "bias")}
    fused: dict[str, Tensor] = {}
    for number in range(LAYERS):
        ours, theirs = f"layers.{number}", f"layer_{number}"
        names |= _pair(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
        names |= _pair(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
        for layer, linear in (
            ("self_attn.out_proj", "self_attention/linear_1"), ("fc1", "ffn/linear_0"), ("fc2", "ffn/linear_1"),
        ):  # fmt: skip
            names |= {f"{ours}.{layer}.{kind}": f"{theirs}/{linear}/{kind}" for kind in ("weight", "bias")}
        for kind in ("weight", "bias"):  # queries, keys and values are one layer there; keys have no bias here
            parts = tensors[f"encoder/{theirs}/self_attention/linear_0/{kind}"].chunk(3)
            for letter, part in zip("qkv", parts, strict=True):
                if (letter, kind) != ("k", "bias"):
                    fused[f"{ours}.self_attn.{letter}_proj.{kind}"] = part
    return {name: tensors[f"encoder/{theirs}"] for name, theirs in names.items()} | fused


def _pair(ours: str, theirs: str) -> dict[str, str]:
    """The two tensors of a normalization."""
    return {f"{ours}.weight": f"{theirs}/gamma", f"{ours}.bias": f"{theirs}/beta"}


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
