"""The output of HiGHS."""

import pytest

from hawqfx.allocation.solver.search import choose
from tests.allocation.solver.instances import large


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    choose(large(300, 3, seed=2), gap=1e-4)
    assert capfd.readouterr().out == ""
