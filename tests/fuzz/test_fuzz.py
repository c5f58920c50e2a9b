"""Sixty networks of the fuzz, twenty of each family, of which none is refused; `make fuzz` runs thousands."""

from pathlib import Path

import pytest

from tests.fuzz.networks import FAMILIES, Family
from tests.fuzz.run import tried


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_network_is_right(family: Family, seed: int, tmp_path: Path) -> None:
    outcome = tried(family, seed, tmp_path)
    assert outcome.kind == "right", f"python -m tests.fuzz.run --only {family}:{seed}: {outcome.detail}"
