"""Files that onnxruntime's own tool makes: quantize_static of the float file, after its own preprocessing, on the same
calibration data; QDQ, weights signed and per channel, activations uint8, everything else as it comes."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hawqfx.frontend.data import Batch
from hawqfx.runtime import ort

THEIRS = ("static int8", "static INT4")


class Reader:
    """Calibration data as onnxruntime's tool takes it, one sample at a time."""

    def __init__(self, path: Path, batches: tuple[Batch, ...]) -> None:
        names = [value.name for value in ort.session(path).get_inputs()]
        self.rows = self._rows(names, batches)

    def _rows(self, names: list[str], batches: tuple[Batch, ...]) -> Iterator[dict[str, Any]]:
        for batch in batches:
            for part in batch.split(1):
                yield {name: tensor.numpy() for name, tensor in zip(names, part.tensors, strict=True)}

    def get_next(self) -> dict[str, Any] | None:
        return next(self.rows, None)


def their_files(original: Path, batches: tuple[Batch, ...], folder: Path) -> dict[str, Path | str]:
    """What onnxruntime's tool makes of a float file; the error, where it makes nothing."""
    with contextlib.chdir(folder):  # its scratch files go to where it runs
        return _made(original, batches, folder)


def _made(original: Path, batches: tuple[Batch, ...], folder: Path) -> dict[str, Path | str]:
    from onnxruntime import quantization  # noqa: TID251  (the other tool)
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: TID251

    prepared = folder / "prepared.onnx"
    try:
        quant_pre_process(str(original), str(prepared))
    except Exception:  # its symbolic shapes fail on some transformers: then without them
        quant_pre_process(str(original), str(prepared), skip_symbolic_shape=True)
    found: dict[str, Path | str] = {}
    kinds = (quantization.QuantType.QInt8, quantization.QuantType.QInt4)
    for name, weights in zip(THEIRS, kinds, strict=True):
        path = folder / f"{name}.onnx"
        try:
            quantization.quantize_static(
                str(prepared), str(path), Reader(prepared, batches), per_channel=True, weight_type=weights,
                activation_type=quantization.QuantType.QUInt8,
            )  # fmt: skip
            ort.session(path)
            found[name] = path
        except Exception as error:  # whatever that tool and its file raise
            found[name] = f"{type(error).__name__}: {error}"[:200]
    return found
