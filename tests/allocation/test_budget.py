"""Budgets: from text and back."""

import re

import pytest

from hawqfx import Budget, Limit
from hawqfx.errors import BudgetError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("size=12.5%", Budget(size=Limit(0.125, relative=True))),
        ("size=1.2MB", Budget(size=Limit(1_200_000))),
        ("size=300 kB", Budget(size=Limit(300_000))),
        ("size=1KiB", Budget(size=Limit(1024))),
        ("size=4096", Budget(size=Limit(4096))),
        ("size=1", Budget(size=Limit(1))),
        ("weight_bits=4", Budget(weight_bits=Limit(4))),
        (" size = 10% , bops=3%", Budget(size=Limit(0.1, relative=True), bops=Limit(0.03, relative=True))),
        ("bops=.5%", Budget(bops=Limit(0.005, relative=True))),
        ("latency=20ms@sequence=1", Budget(latency=Limit(0.02, shape={"sequence": 1}))),
        (
            "latency= 90% @ past = 128 @sequence=1, size=1kB",
            Budget(latency=Limit(0.9, relative=True, shape={"sequence": 1, "past": 128}), size=Limit(1000)),
        ),
        ("latency=3ms@8*_h=64", Budget(latency=Limit(0.003, shape={"8*_h": 64}))),
    ],
)
def test_parse(text: str, expected: Budget) -> None:
    assert Budget.parse(text) == expected
    assert Budget.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "size=12.5%",
        "size=9.4%",
        "size=10%",
        "size=100%",
        "size=1.2MB",
        "size=999B",
        "size=100kB, activation_memory=2GB",
        "weight_bits=3.5, bops=2%",
        "latency=20ms@sequence=1@past=0",
        "latency=1.5s",
        "latency=0.5us",
    ],
)
def test_text_survives(text: str) -> None:
    assert str(Budget.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("size=1000", "size=1kB"),
        ("size=1KiB", "size=1.024kB"),
        ("latency=0.02s", "latency=20ms"),
        ("drop=.01", "drop=0.01"),
    ],
)
def test_amounts_are_written_as_people_do(text: str, written: str) -> None:
    assert str(Budget.parse(text)) == written
    assert Budget.parse(written) == Budget.parse(text)


def test_a_limit_of_a_reference() -> None:
    assert Limit(0.25, relative=True).of(400) == 100
    assert Limit(30).of(400) == 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size=10%@batch=1", "size=10%@batch=1: latency alone is for a shape"),
        ("latency=3ms@sequence", "write NAME=SIZE"),
        ("latency=3ms@=4", "write NAME=SIZE"),
        ("latency=3ms@", "write NAME=SIZE"),
        ("latency=3ms@sequence=1.5", "the size '1.5' is no whole number"),
        ("latency=3ms@sequence=-1", "the size '-1' is no whole number"),
        ("latency=3ms@sequence=²", "no whole number"),
        ("latency=3ms@batch=1@batch=2", "batch stands twice"),
        ("latency=@batch=1", "an amount is a number with a unit"),
        ("latency=3ms@sequence=1@past=", "the size '' is no whole number"),
    ],
)
def test_shapes_that_are_none_are_refused(text: str, message: str) -> None:
    with pytest.raises(BudgetError, match=re.escape(message)):
        Budget.parse(text)
