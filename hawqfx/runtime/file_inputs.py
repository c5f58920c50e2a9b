"""Inputs of a file, at any sizes of the dimensions that vary, by the names that the file gives them."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hawqfx.errors import BackendError
from hawqfx.frontend import decoders
from hawqfx.frontend.data import Batch
from hawqfx.frontend.shapes import Shape, resized, with_sums
from hawqfx.runtime import ort


def sizes_in_file(path: str | Path, asked: Shape, batch: int = 1, data: Batch | None = None) -> dict[str, int]:
    """The size of every dimension of a file's inputs that varies.

    Args:
        path: the file.
        asked: sizes by name; sizes that follow from others, as that of a decoder's mask, follow them.
        batch: the size of what is not asked for, where there are no data.
        data: inputs in the order of the file, which have the sizes that are not asked for.

    Raises:
        BudgetError: if nothing of the name varies in the file, if it follows from others, or if a size is no whole
            number.
        BackendError: if the data have another number of tensors than the file has inputs.
    """
    inputs = ort.inputs(path)
    tensors = [None] * len(inputs) if data is None else data.tensors
    names = {name: _varying(shape) for name, shape, _ in inputs}
    if len(tensors) != len(inputs):
        of_texts = '; tokens="causal" makes them of texts' if decoders.sums(names) else ""
        raise BackendError(f"{path} takes {', '.join(names)}; the data have {len(tensors)} tensors{of_texts}")
    known: dict[str, int] = {}
    for own, tensor in zip(names.values(), tensors, strict=True):
        for axis, name in own.items():
            known.setdefault(name, batch if tensor is None else tensor.shape[axis])
    return known | with_sums(asked, known, decoders.sums(names))


def random_inputs(path: str | Path, sizes: Shape, batch: int = 1, seed: int = 0) -> list[NDArray[Any]]:
    """Random inputs for a file.

    Args:
        path: the file.
        sizes: of the dimensions that vary, by name.
        batch: the size of those without a name, which files of other tools may have.
        seed: of the random numbers.

    Returns:
        An array for each input: normal floats, or integers 0 and 1.

    Raises:
        BackendError: if the file has an input of another type.
    """
    random = np.random.default_rng(seed)
    arrays: list[NDArray[Any]] = []
    for name, shape, kind in ort.inputs(path):
        whole = [size if isinstance(size, int) else sizes.get(size, batch) for size in shape]
        if "float" in kind:
            arrays.append(random.standard_normal(whole).astype(np.float32))
        elif "int64" in kind or "int32" in kind or "bool" in kind:
            arrays.append(random.integers(0, 2, whole).astype(kind.removeprefix("tensor(").removesuffix(")")))
        else:
            raise BackendError(f"input {name!r} is a {kind}: give data")
    return arrays


def at_sizes(path: str | Path, data: Batch, sizes: Shape) -> Batch:
    """Data that are cut or repeated to sizes.

    Args:
        path: the file.
        data: inputs in the order of the file.
        sizes: of the dimensions that vary, by name.
    """
    shapes = iter([_varying(shape) for _, shape, _ in ort.inputs(path)])

    def change(tensor: Tensor) -> Tensor:
        for axis, name in next(shapes).items():
            tensor = resized(tensor, axis, sizes[name])
        return tensor

    return Batch(data.args, data.kwargs).map(change)


def _varying(shape: list[int | str]) -> dict[int, str]:
    """The names of the dimensions that vary, by number."""
    return {axis: size for axis, size in enumerate(shape) if isinstance(size, str)}
