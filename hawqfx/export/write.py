"""Writes a model to disk, whole or not at all."""

import tempfile
from pathlib import Path

import onnx
import onnx_ir as ir

from hawqfx.atomic_write import whole_file
from hawqfx.errors import ExportError

LARGEST_FILE = (1 << 31) - (1 << 26)  # bytes of tensors; protobuf takes files below 2 GiB


def write(model: ir.Model, path: Path) -> None:
    """Write a model in one file, or with the tensors in a second file beside it where protobuf's limit of 2 GiB is
    near.

    Raises:
        ExportError: if the file cannot be written, or the model is not valid.
    """
    tensors = (value.const_value for value in model.graph.initializers.values())
    if sum(tensor.nbytes for tensor in tensors if tensor is not None) > LARGEST_FILE:
        _write_in_two(model, path)
        return
    with whole_file(path) as temporary:
        ir.save(model, temporary)
        _check(temporary, path)


def _write_in_two(model: ir.Model, path: Path) -> None:
    name = f"{path.name}.data"
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        whole = Path(folder) / path.name
        ir.save(model, whole, external_data=name, size_threshold_bytes=128)
        _check(whole, path)
        (Path(folder) / name).replace(path.with_name(name))
        whole.replace(path)


def _check(written: Path, path: Path) -> None:
    """Raises ExportError, which speaks of `path`, if the file that was written is no valid model."""
    try:
        onnx.checker.check_model(str(written))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{path} was not written: {error}") from error
