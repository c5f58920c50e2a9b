"""Writes a model to disk, whole or not at all."""

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import onnx
import onnx_ir as ir

from hawqfx.atomic_write import folder_beside, take_place, whole_file
from hawqfx.errors import ExportError, HawqfxError

LARGEST_FILE = (1 << 31) - (1 << 26)  # bytes of tensors; protobuf takes files below 2 GiB


Check = Callable[[Path], None]


def write(model: ir.Model, path: Path, most: float = math.inf, check: Check | None = None) -> int:
    """Write a model in one file, or with the tensors in a second file beside it where protobuf's limit of 2 GiB is
    near.

    Args:
        model: the model.
        path: of the file.
        most: the most bytes that both may have.
        check: looks at the file before it takes its place, and raises ExportError if it is not right.

    Returns:
        The bytes of both.

    Raises:
        ExportError: if the file cannot be written or would be too large, or the model is not valid.
    """
    tensors = (value.const_value for value in model.graph.initializers.values())
    if sum(tensor.nbytes for tensor in tensors if tensor is not None) > LARGEST_FILE:
        return _write_in_two(model, path, most, check)
    with whole_file(path) as temporary:
        ir.save(model, temporary)
        size = _checked([temporary], path, most, check)
    _delete_other_tensors(path, "")
    return size


def _write_in_two(model: ir.Model, path: Path, most: float, check: Check | None) -> int:
    """The graph names the file of its tensors, and that name their content: an older graph keeps its own tensors until
    the new graph takes its place."""
    name = f"{path.name}.{_digest(model)}.data"
    with folder_beside(path) as folder:
        whole = folder / path.name
        ir.save(model, whole, external_data=name, size_threshold_bytes=128)
        size = _checked([whole, folder / name], path, most, check)
        take_place(folder / name, path.with_name(name))
        take_place(whole, path)
    _delete_other_tensors(path, name)
    return size


def _digest(model: ir.Model) -> str:
    """A name for the content of all tensors."""
    state = hashlib.sha256()
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            state.update(f"{name} {value.const_value.nbytes};".encode())
            state.update(value.const_value.tobytes())
    return state.hexdigest()[:16]


def _delete_other_tensors(path: Path, kept: str) -> None:
    """Delete the tensors of older files at this path."""
    ours = re.compile(re.escape(path.name) + r"\.[0-9a-f]{16}\.data")
    for each in path.parent.iterdir():
        if ours.fullmatch(each.name) and each.name != kept:
            with suppress(OSError):
                each.unlink()


def _checked(written: Sequence[Path], path: Path, most: float, check: Check | None) -> int:
    """The bytes of files, the first of which has the graph.

    Raises:
        ExportError: which speaks of `path`, if they are too large or no valid model.
    """
    size = sum(part.stat().st_size for part in written)
    if size > most:
        raise ExportError(
            f"{path} was not written: it would have {size:,} bytes, and the plan's budget allows {math.floor(most):,}; "
            "compile again, since the plan was made for another network or by another version"
        )
    try:
        onnx.checker.check_model(str(written[0]))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{path} was not written: {error}") from error
    if check is not None:
        try:
            check(written[0])
        except HawqfxError as error:
            raise ExportError(f"{path} was not written: {error}") from error
    return size
