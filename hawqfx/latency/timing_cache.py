"""Timings that outlive the process: one file for each machine, number of threads and version of onnxruntime."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import platformdirs

from hawqfx.atomic_write import whole_file
from hawqfx.errors import CacheError, ExportError

log = logging.getLogger(__name__)

SAVE_EVERY = 16  # new timings, so that an interrupted profile loses few


@dataclass
class TimingCache:
    """Seconds by key.

    Args:
        path: the file that keeps them.
        seconds: the timings, read from the file and new.
        new: how many of them were not read from the file.
    """

    path: Path
    seconds: dict[str, float] = field(default_factory=dict)
    new: int = 0

    @staticmethod
    def open(folder: Path | None, setting: Mapping[str, object]) -> "TimingCache":
        """The timings of a setting; a damaged file counts as empty.

        Args:
            folder: of the files; by default $HAWQFX_CACHE, or the user's cache folder.
            setting: everything that timings depend on, besides their key.

        Raises:
            CacheError: if the folder cannot be made.
        """
        folder = folder or Path(os.environ.get("HAWQFX_CACHE") or platformdirs.user_cache_dir("hawqfx"))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"the cache {folder} cannot be used: {error}") from error
        digest = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:16]
        path = folder / f"latency-{digest}.json"
        return TimingCache(path, _read(path) if path.exists() else {})

    def __contains__(self, key: str) -> bool:
        return key in self.seconds

    def get(self, key: str, measure: Callable[[], float]) -> float:
        """The seconds of a key; `measure` is called if they are unknown."""
        if key not in self.seconds:
            self.put(key, measure())
        return self.seconds[key]

    def put(self, key: str, seconds: float) -> None:
        """Keep a new timing, and save the file after every few."""
        self.seconds[key] = seconds
        self.new += 1
        if self.new % SAVE_EVERY == 0:
            self.save()

    def save(self) -> None:
        """Write the file, if there are new timings.

        Raises:
            CacheError: if the file cannot be written.
        """
        if not self.new or self.path.is_dir():  # of a folder, open() has warned
            return
        try:
            with whole_file(self.path) as temporary:
                temporary.write_text(json.dumps({"seconds": self.seconds}, indent=1))
        except ExportError as error:
            raise CacheError(f"timings cannot be kept: {error}") from error


def _read(path: Path) -> dict[str, float]:
    try:
        return {str(key): float(value) for key, value in json.loads(path.read_text())["seconds"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        log.warning("the timings in %s are damaged (%s): all are taken again", path, error)
        return {}
