"""Keeps what was learned of finished blocks on disk, so that a run that was killed goes on after them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hawqfx.atomic_write import whole_file
from hawqfx.errors import CacheError, ExportError


@dataclass(frozen=True)
class FinishedBlocks:
    """The files of one run of learning.

    Args:
        folder: where they are; made with the first file.
    """

    folder: Path

    def get(self, number: int) -> list[Tensor] | None:
        """What block `number` learned, no tensors where nothing was gained; None if it is not finished.

        Raises:
            CacheError: if the file is damaged.
        """
        path = self._path(number)
        if not path.exists():
            return None
        try:
            tensors = load_file(path)
            return [tensors[str(place)] for place in range(len(tensors))]
        except (OSError, SafetensorError, KeyError) as error:
            raise CacheError(f"{path} is damaged ({error}): delete it, and that block is learned again") from error

    def put(self, number: int, learned: Sequence[Tensor]) -> None:
        """Keeps what block `number` learned.

        Raises:
            CacheError: if the file cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_file(self._path(number)) as temporary:
                save_file({str(place): tensor.cpu() for place, tensor in enumerate(learned)}, temporary)
        except (OSError, ExportError) as error:
            raise CacheError(f"the cache {self.folder} was not written: {error}") from error

    def _path(self, number: int) -> Path:
        return self.folder / f"block-{number:06d}.safetensors"
