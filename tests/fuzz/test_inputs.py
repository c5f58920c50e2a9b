"""Texts and files that people give, written at random and damaged at random: read, or refused by an error of ours."""

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hawqfx
from hawqfx import Compiled
from hawqfx.allocation.budget import Budget
from hawqfx.errors import BudgetError, HawqfxError
from hawqfx.export.inspection import stored_weights, texts
from hawqfx.session.plan import Plan
from tests.nets import Residual
from tests.tools import quick

NAMES = ("size", "weight_bits", "bops", "latency", "drop", "activation_memory", "weight_memory", "speed", "")
UNITS = ("", "%", "B", "kB", "MB", "GB", "KiB", "ms", "s", "us", "bits", " ", "%%", "@")
WORDS = ("", "1e400", "0x1", "\u0663", "1_0")  # an Arabic digit among them
NUMBERS = st.one_of(st.integers(-3, 10**30).map(str), st.floats().map(str), st.sampled_from(WORDS))
SIGNS = st.sampled_from(["=", " = ", "==", ""])
LIMITS = st.builds("{}{}{}{}".format, st.sampled_from(NAMES), SIGNS, NUMBERS, st.sampled_from(UNITS))
BUDGETS = st.one_of(st.text(max_size=30), st.lists(LIMITS, max_size=4).map(", ".join))

ODD: tuple[Any, ...] = (
    None, True, -1, 0, 10**400, 1e308, float("nan"), "", "../../etc/passwd", [], {}, [[]], {"bits": 4},
)  # fmt: skip
DAMAGES = 150  # of each file


@settings(max_examples=600, deadline=None, derandomize=True)
@given(BUDGETS)
def test_a_budget_parses_to_what_it_prints_or_is_refused(text: str) -> None:
    try:
        budget = Budget.parse(text)
    except BudgetError:
        return
    assert Budget.parse(str(budget)) == budget


@cache
def compiled() -> Compiled:
    return quick(Residual, "weight_bits=4")


def _places(value: Any) -> list[tuple[Any, Any]]:
    """All pairs of a container and a key or number in it."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


def _damaged_json(text: str, draw: random.Random) -> str:
    tree = json.loads(text)
    for _ in range(draw.randint(1, 3)):
        container, key = draw.choice(_places(tree))
        if isinstance(container, dict) and draw.random() < 0.3:
            del container[key]
        else:
            container[key] = draw.choice(ODD)
        if not _places(tree):
            break
    return json.dumps(tree)


def _damaged_bytes(content: bytes, draw: random.Random) -> bytes:
    """Truncated, or with some bytes flipped, or with a part that is taken out or stands twice."""
    where = draw.randrange(len(content))
    match draw.randrange(4):
        case 0:
            return content[:where]
        case 1:
            changed = bytearray(content)
            for _ in range(draw.randint(1, 8)):
                changed[draw.randrange(min(len(content), 4096))] ^= 1 << draw.randrange(8)
            return bytes(changed)
        case 2:
            return content[:where] + content[where + draw.randint(1, 64) :]
        case _:
            return content[:where] + content[where // 2 :]


def _tried(path: Path, content: bytes, read: Callable[[Path], object]) -> None:
    path.write_bytes(content)
    try:
        read(path)
    except HawqfxError:
        return


@pytest.mark.parametrize("seed", range(DAMAGES))
def test_a_damaged_plan_is_read_or_refused(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    text = compiled().plan.to_json()
    content = _damaged_json(text, draw).encode() if seed % 2 else _damaged_bytes(text.encode(), draw)
    _tried(tmp_path / "plan.json", content, Plan.read)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """A saved network and an ONNX file."""
    folder = tmp_path_factory.mktemp("files")
    compiled().save(folder / "net.hawqfx")
    compiled().export(folder / "net.onnx")
    return (folder / "net.hawqfx").read_bytes(), (folder / "net.onnx").read_bytes()


def test_a_damaged_saved_network_is_loaded_or_refused(files: tuple[bytes, bytes], tmp_path: Path) -> None:
    model = Residual().eval()
    for seed in range(DAMAGES):
        content = _damaged_bytes(files[0], random.Random(seed))
        _tried(tmp_path / "net.hawqfx", content, lambda path: hawqfx.load(path, model))


def test_a_damaged_onnx_file_is_looked_into_or_refused(files: tuple[bytes, bytes], tmp_path: Path) -> None:
    for seed in range(DAMAGES):
        content = _damaged_bytes(files[1], random.Random(seed))
        _tried(tmp_path / "net.onnx", content, lambda path: (stored_weights(path), texts(path)))
