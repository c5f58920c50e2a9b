"""Budgets: from text and back."""

import pytest

from hawqfx import Budget, Limit


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("size=12.5%", Budget(size=Limit(0.125, relative=True))),
        ("size=1.2MB", Budget(size=Limit(1_200_000))),
        ("size=300 kB", Budget(size=Limit(300_000))),
        ("size=1KiB", Budget(size=Limit(1024))),
        ("size=4096", Budget(size=Limit(4096))),
        ("weight_bits=4", Budget(weight_bits=Limit(4))),
        (" size = 10% , bops=3%", Budget(size=Limit(0.1, relative=True), bops=Limit(0.03, relative=True))),
        ("bops=.5%", Budget(bops=Limit(0.005, relative=True))),
    ],
)
def test_parse(text: str, expected: Budget) -> None:
    assert Budget.parse(text) == expected
    assert Budget.parse(str(expected)) == expected


@pytest.mark.parametrize("text", ["size=12.5%", "size=9.4%", "size=10%", "size=100%", "weight_bits=3.5, bops=2%"])
def test_text_survives(text: str) -> None:
    assert str(Budget.parse(text)) == text


def test_a_limit_of_a_reference() -> None:
    assert Limit(0.25, relative=True).of(400) == 100
    assert Limit(30).of(400) == 30
