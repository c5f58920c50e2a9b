"""A few faults of each kind; `make faults` puts hundreds of kills, and `make soak` hundreds of compilations."""

import os
import subprocess
import sys
from pathlib import Path

from tests.faults.soak import Use, grown

ROOT = Path(__file__).parents[2]


def test_a_few_faults() -> None:
    """In a process of its own, since it forks: six kills, four at random moments or stages, and small files."""
    command = [sys.executable, "-m", "tests.faults.run", "--count", "6", "--seed", "1", "--quick"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--conditions", "largest file", "unwritable"], cwd=ROOT, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_grows_is_named() -> None:
    flat = [Use(k, 500 + k % 3, 10, 3, 0, 0.0) for k in range(12)]
    assert grown(flat) == []
    assert grown([Use(use.done, 500 + 10 * use.done, 10, 3, 0, 0.0) for use in flat]) == [
        "memory: from 540 MB in the second quarter to 600 MB in the last"
    ]
    assert grown([Use(use.done, 500, 10 + use.done // 6, 3, use.done, 0.0) for use in flat]) == [
        "files: from 10 in the second quarter to 11 in the last",
        "temporary: from 5 in the second quarter to 11 in the last",
    ]
