"""A table whose rows have bits of their own: in the file, in a saved network, and in a plan that is followed."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import hawqfx
from hawqfx import Compiled
from hawqfx.errors import ExportError, PlanError
from hawqfx.export.opsets import Packing
from hawqfx.maths.formats import Format

WORDS, WIDTH, LENGTH = 600, 24, 6


class Texts(nn.Module):
    """The class of a text, by the words in it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, 5)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.hidden(self.table(words)).relu().mean(1))


def texts(seed: int, count: int) -> Tensor:
    """Of words by Zipf's law."""
    random = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(1 / (torch.arange(WORDS) + 1.0), count * LENGTH, replacement=True, generator=random)
    return drawn.reshape(count, LENGTH)


def model() -> Texts:
    torch.manual_seed(0)
    return Texts().eval()


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return hawqfx.compile(model(), "weight_bits=4", list(texts(1, 64).chunk(4)))


def rows_of(found: Compiled) -> tuple[int, ...]:
    quantizer = found.plan.quantizers["table.weight"]
    assert quantizer is not None
    return quantizer.rows


def test_frequent_words_have_more_bits_and_the_average_is_that_of_the_format(compiled: Compiled) -> None:
    rows = rows_of(compiled)
    assert len(rows) == WORDS
    assert sum(rows) == compiled.plan.bits["table.weight"] * WORDS
    assert sum(rows[:20]) / 20 > sum(rows[-300:]) / 300
    assert f"table.weight: rows have {min(rows)} to {max(rows)} bits" in compiled.summary()


@pytest.mark.parametrize("factor", [0.0, 100.0])
def test_a_table_that_is_trained_beyond_the_bits_of_its_rows_is_refused(
    compiled: Compiled, factor: float, tmp_path: Path
) -> None:
    """Zero is no code of one bit; an error of packing was raised as it was."""
    row = int(np.argmin(rows_of(compiled)))
    table = compiled.model.get_parameter("table.weight")
    before = table.detach().clone()
    try:
        with torch.no_grad():
            table[row] *= factor
        words = rf"1 rows of 'table.weight' have values that their bits do not hold, row {row} with 1 bits first"
        with pytest.raises(ExportError, match=words):
            compiled.export(tmp_path / "trained.onnx")
    finally:
        with torch.no_grad():
            table.copy_(before)


@pytest.mark.parametrize("packing", ["portable", "native"])
def test_the_file_computes_what_the_graph_computes(compiled: Compiled, packing: Packing, tmp_path: Path) -> None:
    assert rows_of(compiled)
    path = tmp_path / "texts.onnx"
    compiled.export(path, packing=packing)
    inputs = texts(2, 200)
    (found,) = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"words": inputs.numpy()})
    with torch.no_grad():
        wanted = compiled.model(inputs).numpy()
    # kernels add the mean in another order, which moves a code at a tie
    assert np.mean(np.abs(found - wanted) > 1e-6) < 0.01
    table = np.unique(compiled.model.get_parameter("table.weight").detach().numpy(), axis=0)
    assert len(table) > WORDS / 2  # no table of equal rows


@pytest.mark.parametrize("size", [11_200, 11_500, 13_500])
def test_a_size_bounds_the_file(compiled: Compiled, size: int, tmp_path: Path) -> None:
    found = compiled.session.at(f"size={size}B")
    path = tmp_path / "texts.onnx"
    found.export(path)
    assert 0.9 * size < path.stat().st_size <= size


def test_rows_of_one_bit_are_signs_and_the_file_has_them(compiled: Compiled, tmp_path: Path) -> None:
    formats = {site.key: Format(8) for site in compiled.planned.sites} | {"table.weight": Format(2)}
    session = compiled.session
    two = session.lowered(session.planner.given(formats), compiled.budget)
    rows = np.array(rows_of(two))
    assert 1 in rows
    assert rows.mean() == 2
    table = two.model.get_parameter("table.weight").detach().numpy()
    for row in table[rows == 1]:
        assert len(np.unique(np.abs(row))) == 1
        assert np.abs(row[0]) > 0
    path = tmp_path / "two.onnx"
    two.export(path)
    inputs = texts(2, 200)
    (found,) = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"words": inputs.numpy()})
    with torch.no_grad():
        wanted = two.model(inputs).numpy()
    assert np.mean(np.abs(found - wanted) > 1e-6) < 0.01  # as above
    two.save(tmp_path / "two.hawqfx")
    again = hawqfx.load(tmp_path / "two.hawqfx", model())
    with torch.no_grad():
        assert torch.equal(again.model(inputs), two.model(inputs))


def test_equal_bits_of_the_same_bytes_lose_more(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hawqfx.analysis.compensation.mixed_rows", lambda weight, known, costs: (known, {}))
    equal = hawqfx.compile(model(), "weight_bits=4", list(texts(1, 64).chunk(4)))
    assert not rows_of(equal)
    inputs, formats = texts(3, 4000), {site.key: Format(8) for site in compiled.planned.sites}

    def lost(network: Compiled) -> float:
        session = network.session
        chosen = session.planner.given(formats | {"table.weight": Format(3)})
        with torch.no_grad():
            wanted = model()(inputs).log_softmax(1)
            found = session.lowered(chosen, network.budget).model(inputs).log_softmax(1)
        return float((wanted.exp() * (wanted - found)).sum(1).mean())

    assert lost(compiled) < 0.8 * lost(equal)


def test_a_saved_network_and_a_followed_plan_have_the_same_rows(compiled: Compiled, tmp_path: Path) -> None:
    path = tmp_path / "texts.hawqfx"
    compiled.save(path)
    again = hawqfx.load(path, model())
    assert rows_of(again) == rows_of(compiled)
    plan = tmp_path / "plan.json"
    plan.write_text(compiled.plan.to_json())
    followed = hawqfx.compile(model(), None, list(texts(1, 64).chunk(4)), plan=plan)
    assert rows_of(followed) == rows_of(compiled)
    inputs = texts(2, 50)
    with torch.no_grad():
        assert torch.equal(again.model(inputs), compiled.model(inputs))
        assert torch.equal(followed.model(inputs), compiled.model(inputs))


@pytest.mark.parametrize("rows", ["[9]", "[4, 4]", "[1]"])
def test_rows_that_are_not_of_the_table_are_refused(compiled: Compiled, rows: str, tmp_path: Path) -> None:
    plan = compiled.plan.to_json()
    start = plan.index('"rows"')
    broken = plan[: plan.index("[", start)] + rows + plan[plan.index("]", start) + 1 :]
    path = tmp_path / "plan.json"
    path.write_text(broken)
    with pytest.raises(PlanError, match="rows"):
        hawqfx.compile(model(), None, list(texts(1, 64).chunk(4)), plan=path)


class Padded(nn.Module):
    """Words by their own table, of whose words some are none: rows of zeros with a bias that keeps them away."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.table.weight.data[-8:] = 0
        self.head.weight = self.table.weight
        self.head.bias.data[-8:] = -30

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.table(words).tanh())


def test_rows_of_zeros_keep_the_bias_of_the_head() -> None:
    torch.manual_seed(0)
    found = hawqfx.compile(Padded().eval(), "weight_bits=4", list(texts(1, 64).chunk(4)))
    assert 1 in rows_of(found)
    with torch.no_grad():
        logits = found.model(texts(2, 8))[..., -8:]
    assert float((logits + 30).abs().max()) < 0.5  # a step of the output
