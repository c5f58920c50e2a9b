"""Keeps what was learned of finished blocks on disk, so that a run that was killed goes on after them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hawqfx.atomic_write import whole_file
from hawqfx.errors import CacheError, ExportError
from hawqfx.maths.digest import digest

log = logging.getLogger(__name__)

KEY = "sha256"  # of the metadata


@dataclass(frozen=True)
class FinishedBlocks:
    """The files of one run of learning.

    Args:
        folder: where they are; made with the first file.
    """

    folder: Path

    def get(self, number: int) -> list[Tensor] | None:
        """What block `number` learned, no tensors where nothing was gained; None if it is not finished, or if its
        file is damaged."""
        path = self._path(number)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                checksum = (file.metadata() or {}).get(KEY)
                learned = [file.get_tensor(str(place)) for place in range(len(file.keys()))]
            if checksum != _checksum(learned):
                raise ValueError("its checksum is wrong")
        except (OSError, SafetensorError, ValueError) as error:
            log.warning("%s is damaged (%s): that block is learned again", path, error)
            return None
        return learned

    def put(self, number: int, learned: Sequence[Tensor]) -> None:
        """Keeps what block `number` learned.

        Raises:
            CacheError: if the file cannot be written.
        """
        path, tensors = self._path(number), [tensor.detach().cpu().contiguous() for tensor in learned]
        if path.is_dir():  # of which get() has warned
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                content = {str(place): tensor for place, tensor in enumerate(tensors)}
                save_file(content, temporary, {KEY: _checksum(tensors)})
        except (OSError, ExportError) as error:
            raise CacheError(f"the cache {self.folder} was not written: {error}") from error

    def _path(self, number: int) -> Path:
        return self.folder / f"block-{number:06d}.safetensors"


def _checksum(learned: Sequence[Tensor]) -> str:
    return digest("", ((str(place), tensor) for place, tensor in enumerate(learned)))
