"""Keeps finished measurements on disk, batch by batch, so that a run that was killed continues where it stopped.

The name of a measurement is a digest of everything that its numbers depend on: graph, tensors, data, loss, seed, metric
and versions.  Files are JSON with a checksum; a file is written as a whole or not at all, and one that is damaged all
the same is measured again.
"""

import functools
import hashlib
import json
import logging
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

log = logging.getLogger(__name__)

VERSION = 10  # of the files and of the digest: a new version does not read the files of an old one


@dataclass(frozen=True)
class MeasurementCache:
    """The files of one measurement.

    Args:
        folder: where they are.
    """

    folder: Path

    @staticmethod
    def open(root: Path, name: str) -> "MeasurementCache":
        """The cache of a measurement; makes its folder.

        Args:
            root: the folder of all measurements.
            name: the digest of this one.

        Raises:
            CacheError: if the folder cannot be made.
        """
        folder = root / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"the cache {root} cannot be used: {error}") from error
        return MeasurementCache(folder)

    def batch_size(self, wanted: int) -> int:
        """The batch size, in samples, that the measurement was begun with; keeps `wanted` if it begins now.

        Raises:
            CacheError: if the file cannot be written.
        """
        known = self._read("batch_size.json")
        if not isinstance(known, int):
            self._write("batch_size.json", wanted)
            return wanted
        return known

    def get(self, batch: int, samples: range) -> dict[str, list[float]] | None:
        """The numbers of every quantity on a batch; None if the batch is not measured yet.

        Args:
            batch: its number.
            samples: which of all samples are in it.  Runs that know nothing of one another, or of a damaged batch size,
                may take batches of other sizes: then these are not the same numbers.
        """
        known = self._read(_name(batch))
        if known is None or known["samples"] != [samples.start, samples.stop]:
            return None
        return known["numbers"]

    def put(self, batch: int, samples: range, numbers: Mapping[str, Sequence[float]]) -> None:
        """Writes the numbers of every quantity on a batch.

        Raises:
            CacheError: if the file cannot be written.
        """
        self._write(_name(batch), {"samples": [samples.start, samples.stop], "numbers": dict(numbers)})

    def _read(self, name: str) -> Any:
        """The content of a file; None if there is none, or if it is damaged."""
        path = self.folder / name
        try:
            tree = json.loads(path.read_bytes())
            if tree["sha256"] != _checksum(tree["content"]):
                raise ValueError("its checksum is wrong")
            return json.loads(tree["content"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            log.warning("%s is damaged (%s): what it held is measured again", path, error)
            return None

    def _write(self, name: str, content: Any) -> None:
        if (self.folder / name).is_dir():  # of which _read has warned
            return
        try:
            with whole_file(self.folder / name) as temporary:
                text = json.dumps(content)
                temporary.write_text(json.dumps({"sha256": _checksum(text), "content": text}))
        except ExportError as error:
            raise CacheError(f"the cache was not written: {error}") from error


def _name(batch: int) -> str:
    return f"batch-{batch:06d}.json"


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def digest(parts: Iterable[Any]) -> str:
    """A name for the content of some values, the same in every process.

    Args:
        parts: strings, numbers, tensors, modules, functions, and lists, tuples, sets and dicts of them.

    Raises:
        CacheError: if the content of a value cannot be read.
    """
    state = hashlib.sha256(f"{VERSION} {torch.__version__}".encode())
    for part in parts:
        _feed(state.update, part)
    return state.hexdigest()[:24]


Update = Callable[[bytes], object]


def _feed(update: Update, value: Any) -> None:
    """Feeds a value to a hash by the first kind in _FEEDERS that it belongs to."""
    for kinds, feed in _FEEDERS:
        if isinstance(value, kinds):
            feed(update, value)
            return
    _feed_tree(update, value)


def _feed_tensor(update: Update, value: Tensor) -> None:
    tensor = value.detach().cpu().contiguous()
    update(f"tensor {tensor.dtype} {tuple(tensor.shape)}".encode())
    update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())


def _feed_literal(update: Update, value: Any) -> None:
    update(f"{type(value).__name__} {value!r};".encode())


def _feed_sequence(update: Update, value: Sequence[Any]) -> None:
    update(f"{type(value).__name__} {len(value)};".encode())
    for leaf in value:
        _feed(update, leaf)


def _feed_set(update: Update, value: set[Any] | frozenset[Any]) -> None:
    update(f"{type(value).__name__} {len(value)};".encode())
    for leaf in sorted(value, key=repr):  # the order of a set differs from process to process
        _feed(update, leaf)


def _feed_mapping(update: Update, value: Mapping[Any, Any]) -> None:
    update(f"{type(value).__name__} {len(value)};".encode())
    for leaf in value.items():
        _feed(update, leaf)


def _feed_module(update: Update, value: torch.nn.Module) -> None:
    update(f"module {type(value).__qualname__} {value!r};".encode())
    _feed(update, value.state_dict())


def _feed_partial(update: Update, value: functools.partial[Any]) -> None:
    _feed(update, (value.func, value.args, value.keywords))


def _feed_function(update: Update, value: types.FunctionType) -> None:
    update(f"function {value.__module__}.{value.__qualname__};".encode())
    cells = [cell.cell_contents for cell in value.__closure__ or ()]
    _feed(update, (value.__code__, cells, value.__defaults__, value.__kwdefaults__))


def _feed_code(update: Update, value: types.CodeType) -> None:
    update(value.co_code)
    _feed(update, (value.co_consts, value.co_names))


def _feed_builtin(update: Update, value: types.BuiltinFunctionType) -> None:
    update(f"builtin {value.__module__}.{value.__qualname__};".encode())


def _feed_tree(update: Update, value: Any) -> None:
    """Any other value: its leaves, if torch knows how to take it apart."""
    leaves, spec = pytree.tree_flatten(value)
    if len(leaves) == 1 and leaves[0] is value:
        raise CacheError(
            f"the cache cannot tell one {type(value).__name__} from another: write the loss as a function, with "
            "tensors, numbers and text in its closure or in functools.partial"
        )
    update(str(spec).encode())
    _feed(update, leaves)


_LITERALS = (
    types.NoneType, types.EllipsisType, str, int, float, complex, bool, bytes, slice, PurePath, torch.device,
    torch.dtype,
)  # fmt: skip

_FEEDERS: tuple[tuple[type | tuple[type, ...], Callable[[Update, Any], None]], ...] = (
    (Tensor, _feed_tensor),
    (_LITERALS, _feed_literal),
    ((list, tuple), _feed_sequence),
    ((set, frozenset), _feed_set),
    (Mapping, _feed_mapping),
    (torch.nn.Module, _feed_module),
    (functools.partial, _feed_partial),
    (types.FunctionType, _feed_function),
    (types.CodeType, _feed_code),
    (types.BuiltinFunctionType, _feed_builtin),
)
