"""Files of weights of other frameworks are read as they were written, and anything else is refused."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import upconv
import whisper
from torch import nn


def ncnn_file(model: nn.Sequential) -> bytes:
    """The weights as ncnn writes them: of 16 bits after a flag, channels out first; biases of 32 bits."""
    parts = []
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            weight = layer.weight.detach()
            if isinstance(layer, nn.ConvTranspose2d):
                weight = weight.transpose(0, 1)
            assert layer.bias is not None
            parts += [struct.pack("<I", 0x01306B47), weight.numpy().astype(np.float16).tobytes()]
            parts.append(layer.bias.detach().numpy().tobytes())
    return b"".join(parts)


def test_ncnn_weights_are_read_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    written = upconv.build().half().float()  # biases too, for short
    path = tmp_path / "model.bin"
    path.write_bytes(ncnn_file(written))
    read = upconv.load(path)
    for name, tensor in written.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    assert read(torch.rand(1, 3, 20, 20)).shape == (1, 3, 2 * 20 - 2 * upconv.EDGE, 2 * 20 - 2 * upconv.EDGE)


def test_ncnn_files_of_other_lengths_or_precision_are_refused(tmp_path: Path) -> None:
    content = ncnn_file(upconv.build())
    path = tmp_path / "model.bin"
    path.write_bytes(content + b"\0\0\0\0")
    with pytest.raises(RuntimeError, match=f"has {len(content) + 4} bytes, and the network {len(content)}"):
        upconv.load(path)
    path.write_bytes(struct.pack("<I", 0) + content[4:])
    with pytest.raises(RuntimeError, match="no weights of 16 bits at 0"):
        upconv.load(path)


def test_ctranslate2_tensors_are_read_back(tmp_path: Path) -> None:
    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    half, whole = np.arange(6, dtype=np.float16).reshape(2, 3), np.array([7, -8], np.int8)
    content = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, 2)
    content += text("encoder/a") + struct.pack("<BIIBI", 2, 2, 3, 4, half.nbytes) + half.tobytes()
    content += text("encoder/b") + struct.pack("<BIBI", 1, 2, 1, whole.nbytes) + whole.tobytes()
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    read = whisper._tensors(path)
    assert read["encoder/a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read["encoder/b"].tolist() == [7, -8]
