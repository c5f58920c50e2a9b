"""Short timings in a folder of the tests' own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from hawqfx.latency import micro_timing, profiler


@pytest.fixture(scope="module", autouse=True)
def timings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of timings that the tests of a module share; no test is about the accuracy of times."""
    folder = tmp_path_factory.mktemp("timings")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAWQFX_CACHE", str(folder))
        patch.setattr(micro_timing, "PIECE_SECONDS", 0.001)
        patch.setattr(profiler, "WHOLE_SECONDS", 0.005)
        yield folder
