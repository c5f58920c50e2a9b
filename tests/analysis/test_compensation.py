"""Compensation of wide layers: blocks of columns, within memory, in turns over the data; and inputs that are ill."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hawqfx.analysis import compensation
from hawqfx.analysis.compensation import compensated, compensated_anew
from hawqfx.analysis.input_moments import LOOKED_UP, InputMoments, input_moments, parts_of
from hawqfx.errors import DataError
from hawqfx.frontend.capture import capture
from hawqfx.frontend.context import Context
from hawqfx.frontend.data import gather
from hawqfx.frontend.losses import squared_error
from hawqfx.ir.facts import Quantizers, RoundedWeights
from hawqfx.ir.program import Program
from hawqfx.ir.quantizers import nearest_codes, weight_at
from hawqfx.maths import rounding
from hawqfx.maths.formats import Format
from hawqfx.pass_manager.manager import run
from hawqfx.passes.calibration import Calibration
from hawqfx.passes.histograms import Histograms
from hawqfx.pipeline import recipe
from tests.nets import Depthwise
from tests.tools import after, context, quick


class Wide(nn.Module):
    """A linear layer of many inputs."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.head = nn.Linear(columns, rows, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


def calibrated(columns: int, rows: int, data: Tensor, bits: tuple[int, ...]) -> tuple[Program, Context]:
    """A linear layer with its quantizers, and the data in two batches."""
    torch.manual_seed(0)
    surroundings = Context(gather(list(data.chunk(2))), squared_error)
    program = capture(Wide(columns, rows).eval(), surroundings.batches[0])
    return run([*recipe().rewrite, Histograms(), Calibration(bits, (8,))], program, surroundings), surroundings


def alike(count: int, columns: int = 96) -> Tensor:
    """Whole numbers, rows of which are alike: their products are exact in float32."""
    random = torch.Generator().manual_seed(1)
    common = torch.randint(-4, 5, (count, 6), generator=random) @ torch.randint(-2, 3, (6, columns), generator=random)
    return (common + torch.randint(-2, 3, (count, columns), generator=random)).float()


def by_least_squares(weight: Tensor, moment: Tensor, scale: Tensor, ends: tuple[int, int], damping: float) -> Tensor:
    """Codes (R, K): before a column is rounded, those left are where the error of the rounded ones is the least."""
    damped = moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    order = moment.diagonal().argsort(descending=True, stable=True).tolist()
    codes = torch.zeros_like(weight)
    for done in range(len(order)):
        fixed, free = order[:done], order[done:]
        error = codes[:, fixed] * scale - weight[:, fixed]
        best = weight[:, free] - torch.linalg.solve(damped[free][:, free], damped[free][:, fixed] @ error.T).T
        codes[:, free[0]] = (best[:, 0] / scale[:, 0]).round().clamp(*ends)
    return codes


def test_blocks_are_rounded_as_weights_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 columns in three blocks of 34, 34 and 32, two of which are worked on at once."""
    monkeypatch.setattr(compensation, "DAMPINGS", (0.1,))
    data = alike(64, 100)
    program, surroundings = calibrated(100, 7, data, (2, 4))
    fact = compensated(program, surroundings, block=40)["head.weight"]
    weight = program.tensor("head.weight").detach().double()
    for width, quantizer in program.facts.get("head.weight", Quantizers).by_format.items():
        scale = torch.tensor(quantizer.scale).double()[:, None]
        for start in (0, 34, 68):
            part = slice(start, start + 34)
            moment = data[:, part].double().T @ data[:, part].double() / 64
            ends = (quantizer.low, quantizer.high)
            wanted = by_least_squares(weight[:, part], moment, scale, ends, 0.1 / 2)  # twice the samples of a half
            assert torch.equal(fact.codes[width][:, part].double(), wanted)
    assert fact.compensation is not None
    assert (fact.compensation.width, fact.compensation.blocks) == (34, 3)
    assert fact.compensation.damping == pytest.approx(0.05)


def test_blocks_lose_less_than_the_nearest_and_more_than_the_whole() -> None:
    data = alike(512)
    program, surroundings = calibrated(96, 32, data, (2, 3, 4))
    weight = program.tensor("head.weight").detach()
    losses = []
    for facts in (
        compensated(program, surroundings),
        compensated(program, surroundings, block=48),
        compensated(program, surroundings, block=12),
        {"head.weight": compensation.nearest(weight, program.facts.get("head.weight", Quantizers))},
    ):
        rounded = program.learn(facts)
        errors = (weight_at(rounded, "head.weight", Format(bits)) - weight for bits in (2, 3, 4))
        losses.append([float((data @ error.T).square().sum()) for error in errors])
    for whole, halves, eighths, nearest in zip(*losses, strict=True):
        assert whole < halves < eighths < nearest


def test_a_grouped_convolution_in_blocks_is_whole_weights_side_by_side() -> None:
    """Every block of a convolution's columns, channels or parts of them, has the moment that these columns have."""
    program = after("calibration", Depthwise)
    whole = input_moments(program, context(), {"grouped.weight": 27})["grouped.weight"]
    parted = input_moments(program, context(), {"grouped.weight": 10})["grouped.weight"]
    assert [part.part.blocks for part in parted] == [3]
    wanted = torch.stack([whole[0].halves[:, :, k : k + 9, k : k + 9] for k in (0, 9, 18)], 2).flatten(1, 2)
    assert torch.allclose(parted[0].halves, wanted, rtol=1e-5, atol=0)  # float32 sums in another order
    energy = parted[0].energy.reshape(2, 3)
    assert torch.allclose(energy.mean(1), torch.ones(2, dtype=torch.float64), rtol=1e-12)  # sums of nine


@given(st.integers(1, 4), st.integers(1, 400), st.integers(1, 400))
def test_parts_cover_all_columns_once(groups: int, columns: int, width: int) -> None:
    parts = parts_of(groups, columns, width)
    ends = [0, *(part.columns.stop for part in parts)]
    assert [part.columns.start for part in parts] == ends[:-1]
    assert ends[-1] == columns
    assert sum(part.blocks for part in parts) == -(-columns // width)
    assert all(part.width <= width for part in parts)
    assert {part.width for part in parts[:-1]} <= {parts[0].width}


def test_memory_halves_the_blocks_and_the_summary_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 columns need 32 MB for two moments of 2,000, and more to work on them."""
    monkeypatch.setattr(compensation, "free_memory", lambda device: 2 * 70 * 2**20)
    compiled = quick(lambda: Wide(2000, 3), data=[torch.rand(16, 2000)])
    expected = "rounding: head.weight: compensated in 8 blocks of 250 columns, each by itself; "
    assert expected + "rounding=Rounding(block=250) does so on any machine" in compiled.summary()
    monkeypatch.setattr(compensation, "free_memory", lambda device: 2**40)
    again = compensated(compiled.planned, compiled.session.context)["head.weight"]
    assert again.compensation is not None
    assert again.compensation.width == 250  # as it was rounded before, whatever memory is free now


def test_weights_are_taken_in_turns_and_rounded_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    program = after("calibration", Depthwise)
    together = compensated(program, context())
    seen: list[int] = []

    def watched(program: Program, context: Context, widths: Mapping[str, int]) -> dict[str, tuple[InputMoments, ...]]:
        seen.append(len(widths))
        return input_moments(program, context, widths)

    monkeypatch.setattr(compensation, "free_memory", lambda device: 0)
    monkeypatch.setattr(compensation, "input_moments", watched)
    one_by_one = compensated(program, context(), block=1000)
    assert seen == [1] * len(program.weights)
    for key, fact in together.items():
        assert fact.squared_error == one_by_one[key].squared_error
        for width, codes in fact.codes.items():
            assert torch.equal(codes, one_by_one[key].codes[width])


def test_a_truly_wide_layer_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """30,000 columns: their moments alone would be 14 GB."""
    refs, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not refs.exists():
        pytest.skip("the peak of a process can be reset on Linux alone")
    monkeypatch.setattr(compensation, "free_memory", lambda device: 2 * 100 * 2**20)
    data = torch.randn(16, 30000, generator=torch.Generator().manual_seed(0))
    program, surroundings = calibrated(30000, 8, data, (4,))

    def kilobytes(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    refs.write_text("5")  # the peak starts anew
    before = kilobytes("VmRSS")
    fact = compensated(program, surroundings)["head.weight"]
    assert kilobytes("VmHWM") - before < 250 * 1024
    assert fact.compensation is not None
    assert fact.compensation.width == 64


@pytest.mark.parametrize("exponent", [-75, 75])
def test_inputs_whose_squares_are_no_float32_numbers(exponent: int) -> None:
    """2^-75 squared is no normal number in float32, and 2^75 squared is none at all: codes are as for ordinary ones."""
    found = []
    for data in (alike(32), alike(32) * 2.0**exponent):
        program, surroundings = calibrated(96, 4, data, (3,))
        found.append(compensated(program, surroundings)["head.weight"].codes[Format(3)])
    assert torch.equal(found[0], found[1])


def test_inputs_that_are_not_finite_are_refused_by_the_name_of_the_layer() -> None:
    with pytest.raises(DataError, match=r"the input of 'head.weight' is not finite on batch 0"):
        compensated(doubled(), Context(gather([torch.full((4, 4), 3e38)]), squared_error))


class Doubled(Wide):
    def __init__(self) -> None:
        super().__init__(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + x)


def doubled() -> Program:
    """A network that overflows on large inputs, calibrated on small ones."""
    surroundings = Context(gather([torch.rand(4, 4)]), squared_error)
    program = capture(Doubled().eval(), surroundings.batches[0])
    return run([*recipe().rewrite, Histograms(), Calibration((4,), (8,))], program, surroundings)


def test_the_summary_tells_damping_beyond_the_usual_and_weights_to_the_nearest() -> None:
    compiled = quick(lambda: Wide(64, 3))
    how = "compensated by their inputs, 1 of them layer by layer from quantized ones"
    assert f"rounding: 1 weights {how}, 0 to the nearest\n" in compiled.summary()
    before = quick(lambda: Wide(64, 3), rounding="compensated")
    assert "rounding: 1 weights compensated by their inputs, 0 to the nearest\n" in before.summary()
    assert "was added to their second moment" not in compiled.summary()
    fact = compiled.planned.facts.get("head.weight", RoundedWeights)
    assert fact.compensation is not None
    damped = replace(fact, compensation=replace(fact.compensation, damping=5.0))
    text = replace(compiled, planned=compiled.planned.learn({"head.weight": damped})).summary()
    assert "rounding: head.weight: its inputs determine too little, so that 5 times their mean square was added" in text
    nearest = quick(lambda: Wide(64, 3), rounding="nearest")
    assert "rounding: 0 weights compensated by their inputs, 1 to the nearest\n" in nearest.summary()


def test_many_rows_are_judged_by_some_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    program, surroundings = calibrated(96, 512, alike(200), (3, 8))

    everyone = compensated(program, surroundings)["head.weight"]
    judged: list[int] = []
    whole = compensation._Stack.held_out

    def held_out(stack: compensation._Stack, fitted: list[rounding.Compensation]) -> Tensor:
        judged.append(stack.rows.shape[1])
        return whole(stack, fitted)

    monkeypatch.setattr(compensation._Stack, "held_out", held_out)
    monkeypatch.setattr(compensation, "JUDGED", 64)
    some = compensated(program, surroundings)["head.weight"]
    assert set(judged) == {64}
    for width, codes in everyone.codes.items():
        assert torch.equal(some.codes[width], codes)
        # both are means over rows whose errors scatter by about their mean: 64 of them tell it to 1 / 8 or so
        assert some.optimism[width] == pytest.approx(everyone.optimism[width], rel=0.2)
        fitted = [found.squared_error[width] / found.optimism[width] for found in (some, everyone)]
        assert fitted[0] == pytest.approx(fitted[1])


class Tied(nn.Module):
    """A table that is the head too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 64)
        self.table.weight.data *= torch.logspace(-1, 1, 64)[torch.randperm(64)]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.table(x).relu(), self.table.weight)


def in_blocks(model: nn.Module, data: Tensor) -> tuple[Program, Context]:
    surroundings = Context(gather(list(data.chunk(2))), squared_error)
    program = capture(model.eval(), surroundings.batches[0])
    passes = [*recipe().rewrite, Histograms(), Calibration((3, 8), (8,), ("weight-only",), (32,))]
    return run(passes, program, surroundings), surroundings


def test_a_table_that_is_the_head_too_is_judged_in_both() -> None:
    """What is looked up is wrong by the whole error of its row: the moment has some of the identity too."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 30, (40, 5))
    program, surroundings = in_blocks(Tied(), tokens)
    (moments,) = input_moments(program, surroundings, {"table.weight": 64})["table.weight"]
    inputs = program.tensor("table.weight").detach()[tokens].relu().reshape(-1, 64).double()
    own = inputs.T @ inputs / len(inputs)
    wanted = own + LOOKED_UP * own.diagonal().mean() * torch.eye(64)
    assert torch.allclose(moments.whole[0], wanted, rtol=1e-5, atol=1e-4)  # sums of float32, of numbers up to 100


@pytest.mark.parametrize("tied", [False, True])
def test_scales_of_blocks_that_are_chosen_leave_less(tied: bool) -> None:
    """On samples that they are not fitted to; and none are chosen where a plan has them."""
    torch.manual_seed(0)
    sizes = torch.logspace(-1, 1, 96)[torch.randperm(96)]
    model, data = (Tied(), torch.randint(0, 30, (40, 5))) if tied else (Wide(96, 40), torch.randn(400, 96) * sizes)
    program, surroundings = in_blocks(model, data)
    (key,) = [site.key for site in program.weights]
    kept, plain = compensated_anew(program, surroundings, scales=False)
    chosen, found = compensated_anew(program, surroundings, scales=True)
    assert kept[key] == program.facts.get(key, Quantizers)
    for width in found[key].codes:
        assert chosen[key].by_format[width].scale != kept[key].by_format[width].scale
        # 3 bits gain most; with 8 the rounding of scales to bfloat16 is as much as there is to gain
        part = 0.95 if width.bits == 3 else 1.02
        assert found[key].squared_error[width] < part * plain[key].squared_error[width]


def test_rows_of_one_bit_are_compensated_signs() -> None:
    """Of all 2^K signs with the calibrated scale, the compensated ones leave less at the output than the nearest, on
    average over rows, and no less than the best of them."""
    columns, rows = 8, 40
    data = alike(256, columns)
    program, surroundings = calibrated(columns, rows, data, (2,))
    weight = program.tensor("head.weight").detach()
    equal = program.facts.get("head.weight", Quantizers).by_format[Format(2)]
    one = torch.arange(rows) % 2 == 0  # and 2 bits for the others
    scale = torch.where(one, weight.abs().mean(1), torch.tensor(equal.scale))
    mixed = replace(equal, scale=tuple(scale.tolist()), rows=tuple(torch.where(one, 1, 2).tolist()))
    program = program.learn({"head.weight": Quantizers({Format(2): mixed})})
    codes = compensated(program, surroundings)["head.weight"].codes[Format(2)]
    assert set(codes[one].unique().tolist()) == {-1, 1}
    assert set(codes[~one].unique().tolist()) <= {-2, -1, 0, 1}
    moment = rounding.second_moment(data.double()[None])[0]

    def error(some: Tensor) -> Tensor:
        difference = some.double() * scale[one, None].double() - weight[one].double()
        return ((difference @ moment) * difference).sum(-1)

    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * columns)
    best = torch.stack([error(each.expand(int(one.sum()), columns)) for each in signs]).amin(0)
    nearest = error(nearest_codes(weight / scale[:, None], mixed)[one])
    found = error(codes[one])
    assert bool((found >= best * (1 - 1e-9)).all())  # float64
    assert float(found.mean()) < 0.8 * float(nearest.mean())
