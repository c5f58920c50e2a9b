"""What has been measured, kept on disk batch by batch, so that a run that was killed goes on where it was.

The key is a digest of everything that the numbers depend on: graph, tensors, data, loss, seed, metric, versions.
Files are JSON, each written whole or not at all.
"""

import functools
import hashlib
import json
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hawqfx.atomic_write import whole_file
from hawqfx.errors import CacheError, ExportError

FORMAT = 2


@dataclass(frozen=True)
class MeasurementCache:
    """The files of one measurement."""

    folder: Path

    @staticmethod
    def open(cache: Path, digest: str) -> "MeasurementCache":
        """Raises CacheError if the folder cannot be made."""
        folder = cache / digest
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"the cache {cache} cannot be used: {error}") from error
        return MeasurementCache(folder)

    def batch_size(self, wanted: int) -> int:
        """The size of batches that the measurement was begun with; `wanted`, if it begins now."""
        found = self._read("batch_size.json")
        if found is None:
            self._write("batch_size.json", wanted)
            return wanted
        return int(found)

    def get(self, batch: int) -> dict[str, list[float]] | None:
        """The numbers of every quantity on a batch; None if it was not measured yet."""
        return self._read(f"batch-{batch:06d}.json")

    def put(self, batch: int, numbers: Mapping[str, Sequence[float]]) -> None:
        self._write(f"batch-{batch:06d}.json", dict(numbers))

    def _read(self, name: str) -> Any:
        path = self.folder / name
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise CacheError(f"{path} is damaged ({error}): delete it, and that batch is measured again") from error

    def _write(self, name: str, content: Any) -> None:
        try:
            with whole_file(self.folder / name) as temporary:
                temporary.write_text(json.dumps(content))
        except ExportError as error:
            raise CacheError(f"the cache was not written: {error}") from error


def digest(parts: Iterable[Any]) -> str:
    """A name for the content of strings, numbers, tensors, functions, and lists, tuples and dicts of them."""
    state = hashlib.sha256(f"{FORMAT} {torch.__version__}".encode())
    for part in parts:
        _feed(state.update, part)
    return state.hexdigest()[:24]


_TOLD_BY_REPR = (str, int, float, complex, bool, bytes, slice, PurePath, torch.device, torch.dtype)


def _feed(update: Callable[[bytes], object], value: Any) -> None:
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        update(f"tensor {tensor.dtype} {tuple(tensor.shape)}".encode())
        update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif value is None or value is ... or isinstance(value, _TOLD_BY_REPR):
        update(f"{type(value).__name__} {value!r};".encode())
    elif isinstance(value, (list, tuple, set, frozenset, Mapping)):
        leaves = value.items() if isinstance(value, Mapping) else value
        if isinstance(value, (set, frozenset)):  # whose order differs from process to process
            leaves = sorted(value, key=repr)
        update(f"{type(value).__name__} {len(value)};".encode())
        for leaf in leaves:
            _feed(update, leaf)
    elif isinstance(value, torch.nn.Module):
        update(f"module {type(value).__qualname__} {value!r};".encode())
        _feed(update, value.state_dict())
    elif isinstance(value, functools.partial):
        _feed(update, (value.func, value.args, value.keywords))
    elif isinstance(value, types.FunctionType):
        update(f"function {value.__module__}.{value.__qualname__};".encode())
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        _feed(update, (value.__code__, cells, value.__defaults__, value.__kwdefaults__))
    elif isinstance(value, types.CodeType):
        update(value.co_code)
        _feed(update, (value.co_consts, value.co_names))
    elif isinstance(value, types.BuiltinFunctionType):
        update(f"builtin {value.__module__}.{value.__qualname__};".encode())
    else:
        leaves, spec = pytree.tree_flatten(value)
        if len(leaves) == 1 and leaves[0] is value:
            raise CacheError(
                f"the cache cannot tell one {type(value).__name__} from another: write the loss as a function, with "
                "tensors, numbers and text in its closure or in functools.partial"
            )
        update(str(spec).encode())
        _feed(update, leaves)
