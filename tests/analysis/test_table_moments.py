"""Tables of words: their moment is the Gauss-Newton form of all uses, also where one is the head too."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hawqfx.analysis import compensation
from hawqfx.analysis.compensation import compensated, compensated_anew
from hawqfx.analysis.input_moments import input_moments
from hawqfx.analysis.table_moments import TableMoments, table_moments, tables
from hawqfx.errors import LossError
from hawqfx.frontend.capture import capture
from hawqfx.frontend.context import Context
from hawqfx.frontend.criteria import Categorical, Loss
from hawqfx.frontend.data import gather
from hawqfx.frontend.losses import squared_error
from hawqfx.ir.facts import Quantizers
from hawqfx.ir.program import Program
from hawqfx.ir.quantizers import scale_of, weight_at
from hawqfx.maths import curvature
from hawqfx.maths.formats import Format
from hawqfx.pass_manager.manager import run
from hawqfx.passes.calibration import Calibration
from hawqfx.passes.histograms import Histograms
from hawqfx.pipeline import recipe

WORDS, WIDTH = 200, 32


class Words(nn.Module):
    """Words that are looked up, a layer, and the same table, or another, as the head; some columns count for more."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.table.weight.data *= 0.5
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.columns = nn.Buffer(torch.logspace(-1, 1, WIDTH)[torch.randperm(WIDTH)])
        self.other = None if tied else nn.Parameter(torch.randn(WORDS, WIDTH) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x, self.table.weight)

    def outputs(self, x: Tensor, table: Tensor) -> Tensor:
        return F.linear(self.inputs(F.embedding(x, table)), table if self.other is None else self.other)

    def inputs(self, found: Tensor) -> Tensor:
        """Of the head."""
        return self.layer(found * self.columns).relu()


def prepared(
    loss: Loss, tokens: Tensor, *, tied: bool = True, bits: tuple[int, ...] = (4,)
) -> tuple[Words, Program, Context]:
    torch.manual_seed(0)
    model = Words(tied=tied).eval()
    surroundings = Context(gather(list(tokens.chunk(4))), loss)
    program = capture(model, surroundings.batches[0])
    return model, run([*recipe().rewrite, Histograms(), Calibration(bits, (8,))], program, surroundings), surroundings


def words(seed: int, samples: int, length: int = 5) -> Tensor:
    return torch.randint(0, WORDS, (samples, length), generator=torch.Generator().manual_seed(seed))


def test_the_moment_is_the_gauss_newton_form_of_both_uses() -> None:
    """Of the squared error of n outputs, whose matrix is 2 / n J^T J: with one draw of each of 400 samples, along some
    directions, within 5 standard errors, those of sums of squared normal variables."""
    tokens = words(1, 400)
    model, program, surroundings = prepared(squared_error, tokens)
    assert tables(program) == {"table.weight"}
    (moments,) = table_moments(program, surroundings, {"table.weight": WIDTH})["table.weight"].parts
    weight, of_output = model.table.weight.detach().double(), 2 / (tokens.shape[1] * WORDS)
    with torch.no_grad():
        inputs = model.inputs(model.table.weight[tokens]).reshape(-1, WIDTH).double()
    layer = model.layer.weight.detach().double() * model.columns
    slopes = (weight[None] * (inputs > 0)[:, None]) @ layer  # (tokens, words, columns), the J of a look-up
    for direction in torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64):
        looked_up = of_output * (slopes @ direction).square().sum(1)  # of each token
        multiplied = of_output * (inputs @ direction).square()  # of each token and word
        expected = float(looked_up.sum() + WORDS * multiplied.sum()) / len(tokens)
        variance = 2 * float(looked_up.square().sum() + WORDS * multiplied.square().sum()) / len(tokens) ** 2
        found = float(direction @ moments.whole[0] @ direction)
        assert abs(found - expected) < 5 * variance**0.5
    blocks = torch.cat(
        [each.whole for each in table_moments(program, surroundings, {"table.weight": 4})["table.weight"].parts]
    )
    for number, block in enumerate(blocks):
        own = slice(4 * number, 4 * number + 4)
        assert torch.allclose(block, moments.whole[0, own, own], rtol=1e-12)  # the same draws, added up alike


def test_rows_of_a_head_cost_in_both_uses() -> None:
    """By the closed form of the test above, row by row: of 2,000 tokens with one draw each, of which a row of the head
    reads all and a look-up ten."""
    tokens = words(1, 400)
    model, program, surroundings = prepared(squared_error, tokens)
    found = table_moments(program, surroundings, {"table.weight": WIDTH})["table.weight"].rows
    assert found is not None
    with torch.no_grad():
        inputs = model.inputs(model.table.weight[tokens]).reshape(-1, WIDTH).double()
    layer = model.layer.weight.detach().double() * model.columns
    slopes = (model.table.weight.detach().double()[None] * (inputs > 0)[:, None]) @ layer
    expected = torch.full((WORDS,), float(inputs.square().sum()), dtype=torch.float64)
    expected.index_add_(0, tokens.flatten(), slopes.square().sum((1, 2)))
    ratio = found.mean(0) * expected.mean() / expected
    # a look-up is 10 sums over 32 columns, far from independent: about .4, in the part of the cost that is its own
    assert abs(float(ratio.mean()) - 1) < 0.1
    assert float(ratio.std()) < 0.4
    assert float(torch.corrcoef(torch.stack([found.mean(0), expected]))[0, 1]) > 0.7


@pytest.mark.parametrize("tied", [False, True])
def test_codes_that_fit_all_uses_lose_less_on_other_texts(monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    """Than the nearest ones, and than those that are fitted to the inputs of the head."""
    model, program, surroundings = prepared(Categorical(-1), words(1, 64), tied=tied)
    held_out = words(3, 400)
    with torch.no_grad():
        wanted = model(held_out).log_softmax(-1)

    def lost(found: Program) -> float:
        (width,) = found.facts.get("table.weight", Quantizers).by_format
        weight = weight_at(found, "table.weight", width)
        with torch.no_grad():
            got = model.outputs(held_out, weight).log_softmax(-1)
        return float((wanted.exp() * (wanted - got)).sum(-1).mean())

    found = lost(program.learn(compensated(program, surroundings)))
    if tied:

        def of_inputs(program: Program, context: Context, widths: Mapping[str, int]) -> dict[str, TableMoments]:
            found = input_moments(program, context, widths)
            return {key: TableMoments(parts, None) for key, parts in found.items()}

        monkeypatch.setattr(compensation, "table_moments", of_inputs)
    else:
        monkeypatch.setattr(compensation, "tables", lambda program: set())
    assert found < 0.8 * lost(program.learn(compensated(program, surroundings)))


def test_without_a_distribution_codes_of_a_table_are_the_nearest() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return output.square().mean()

    model, program, surroundings = prepared(loss, words(1, 8), tied=False)
    found = compensated(program, surroundings)["table.weight"]
    ((width, codes),) = found.codes.items()
    scale = scale_of(program.facts.get("table.weight", Quantizers).by_format[width])
    assert found.compensation is None
    assert torch.equal(codes, (model.table.weight / scale[:, None]).round().clamp(-8, 7).to(torch.int8))


def test_a_slope_that_overflows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, program, surroundings = prepared(squared_error, words(1, 8))
    whole = curvature.gradient

    def overflowing(*args: Any, **options: Any) -> tuple[Tensor, ...]:
        return tuple(gradient * 1e30 * 1e30 for gradient in whole(*args, **options))

    monkeypatch.setattr(curvature, "gradient", overflowing)
    with pytest.raises(LossError, match=r"'table.weight' is not finite on batch 0"):
        table_moments(program, surroundings, {"table.weight": WIDTH})


def frequent(seed: int, samples: int) -> Tensor:
    """Words of Zipf's law, the most frequent ones anywhere in the table."""
    random = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(1 / (torch.arange(MANY) + 1.0), samples * 5, replacement=True, generator=random)
    return torch.randperm(MANY, generator=torch.Generator().manual_seed(0))[drawn].reshape(samples, 5)


MANY = 200
EVERY = (2, 3, 4, 5, 6, 7, 8)


class Texts(nn.Module):
    """What a table of many words says, place by place, and the places themselves from a table of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(MANY, WIDTH), nn.Embedding(5, WIDTH)
        self.layer = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer((self.table(x) + self.places.weight[torch.arange(5)]).relu())


def of_texts(loss: Loss = squared_error) -> tuple[Texts, Program, Context]:
    torch.manual_seed(0)
    model = Texts().eval()
    surroundings = Context(gather(list(frequent(1, 64).chunk(4))), loss)
    program = capture(model, surroundings.batches[0])
    return model, run([*recipe().rewrite, Histograms(), Calibration(EVERY, (8,))], program, surroundings), surroundings


def test_rows_cost_the_squared_slopes_at_what_is_looked_up() -> None:
    """Half by half, of words that occur often in proportion to the squared slopes of the layer after the table, and
    nothing for a word that does not occur."""
    model, program, surroundings = of_texts()
    found = table_moments(program, surroundings, {"table.weight": WIDTH})["table.weight"].rows
    assert found is not None
    assert found.shape == (2, MANY)
    assert torch.allclose(found.mean(1), torch.ones(2, dtype=torch.float64))
    for number in (0, 1):
        texts = torch.cat([batch.args[0] for batch in surroundings.batches])[number::2]  # measured one by one
        counts = torch.bincount(texts.flatten(), minlength=MANY)
        assert bool(((found[number] > 0) <= (counts > 0)).all())
        often = counts >= 8  # the slopes of these differ by the places alone, and average out
        with torch.no_grad():
            hidden = model.table.weight[texts] + model.places.weight
        slope = (hidden > 0).double() @ model.layer.weight.detach().double().square().sum(0)
        exact = torch.zeros(MANY, dtype=torch.float64).index_add_(0, texts.flatten(), slope.flatten())
        ratio = (found[number] / exact)[often]
        assert float(ratio.std() / ratio.mean()) < 0.6  # of sums of at least 8 x 4 squared normals: about .25 to .5


def test_rows_of_places_in_a_text_all_have_the_bits_of_the_format() -> None:
    """Of places that no sample reaches nothing is known."""
    _, program, surroundings = of_texts()
    tables_here = tables(program)
    for key, moments in table_moments(program, surroundings, dict.fromkeys(tables_here, WIDTH)).items():
        assert (moments.rows is None) is (key != "table.weight")


def test_frequent_words_have_more_bits_and_other_texts_lose_less() -> None:
    model, program, surroundings = of_texts()
    held_out = frequent(3, 2000)
    with torch.no_grad():
        wanted = model(held_out)

    def lost(found: Program) -> float:
        weight = weight_at(found, "table.weight", Format(3))
        with torch.no_grad():
            got = model.layer((F.embedding(held_out, weight) + model.places.weight).relu())
        return float((got - wanted).square().mean())

    quantizers, codes = compensated_anew(program, surroundings, scales=True)
    mixed = program.learn(quantizers).learn(codes)
    rows = quantizers["table.weight"].by_format[Format(3)].rows
    assert sum(rows) == 3 * MANY
    assert rows[int(frequent(5, 2000).flatten().mode().values)] > 3
    assert lost(mixed) < 0.7 * lost(program.learn(compensated(program, surroundings)))
    # as much as samples tell of other texts
    assert all(factor >= 1 for factor in codes["table.weight"].optimism.values())
