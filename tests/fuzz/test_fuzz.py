"""Sixty networks of the fuzz, twenty of each family, and some that were wrong once; `make fuzz` runs more."""

from pathlib import Path

import pytest

from tests.fuzz.networks import FAMILIES, Family
from tests.fuzz.run import tried

FOUND: tuple[tuple[Family, int], ...] = (
    ("transformer", 11002),  # weight-only rows of one block, whose scales were no numbers of bfloat16
    ("convolutional", 11046),  # a file was weighed with biases that int32 does not hold
    ("transformer", 6091),  # likewise, of rows with scales far below those of others
    ("mixed", 30206),  # onnxruntime quantized a weight that was to stay in float
    ("convolutional", 40257),  # and that of a transposed convolution
    ("mixed", 40163),  # onnxruntime's exact kernels fail on a float layer's codes, beside inputs quantized in each run
    ("convolutional", 30786),  # an output that is rounding alone was held to a tolerance
)


@pytest.mark.parametrize(("family", "seed"), [*((family, seed) for family in FAMILIES for seed in range(20)), *FOUND])
def test_a_random_network_is_right_or_refused(family: Family, seed: int, tmp_path: Path) -> None:
    outcome = tried(family, seed, tmp_path)
    assert outcome.kind != "wrong", f"python -m tests.fuzz.run --only {family}:{seed}: {outcome.detail}"
