"""Files that onnxruntime's own tools make of a float file, everything that is not said here as it comes.

static    quantize_static after its own preprocessing, on the same calibration data; QDQ, weights signed and per
          channel, activations uint8
dynamic   quantize_dynamic, weights signed and per channel; no data
blocks    MatMulNBitsQuantizer, weights of 4 bits with a scale for 32 of them, activations in float; no data
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hawqfx.frontend.data import Batch
from hawqfx.runtime import ort

THEIRS = ("static int8", "static INT4")
WITHOUT_DATA = ("dynamic int8", "4 bits in blocks")


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


def without_data(original: Path, folder: Path) -> dict[str, Path]:
    """What onnxruntime's tools make of a float file without data, by WITHOUT_DATA."""
    import onnx  # noqa: TID251  (the other tool takes models)
    from onnxruntime import quantization  # noqa: TID251  (the other tool)
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer  # noqa: TID251
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: TID251

    prepared = folder / f"{original.stem} prepared.onnx"
    quant_pre_process(str(original), str(prepared), skip_symbolic_shape=True)
    paths = {name: folder / f"{original.stem} {name}.onnx" for name in WITHOUT_DATA}
    dynamic, blocks = paths.values()
    quantization.quantize_dynamic(
        str(original), str(dynamic), per_channel=True, weight_type=quantization.QuantType.QInt8
    )
    tool = MatMulNBitsQuantizer(onnx.load(prepared), bits=4, block_size=32, is_symmetric=True)
    tool.process()
    tool.model.save_model_to_file(str(blocks))
    return paths
