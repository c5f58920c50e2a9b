"""normalize_tables: the function stays, columns come to one range, and what cannot be parted exactly is left alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hawqfx
from hawqfx.frontend.capture import capture
from hawqfx.frontend.context import Context
from hawqfx.frontend.data import gather
from hawqfx.frontend.losses import squared_error
from hawqfx.ir.operators import EMBEDDING
from hawqfx.ir.program import Program
from hawqfx.pass_manager.manager import run
from hawqfx.passes.decompose import Decompose
from hawqfx.passes.normalize_tables import NormalizeTables
from hawqfx.runtime import ort
from tests.nets import build

WORDS, WIDTH = 200, 32
COMMON = torch.tensor([30.0, -8.0] + [0.0] * (WIDTH - 2))  # of every row, beside deviations of one


def texts(count: int = 2) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(0, 100, (8, 6), generator=random) for _ in range(count)]


class Words(nn.Module):
    """A table whose rows have much in common, and a head that multiplies by it; by another one unless `tied`."""

    def __init__(self, tied: bool = True, bias: bool = False, common: Tensor = COMMON, words: int = WORDS) -> None:
        super().__init__()
        self.table = nn.Embedding(words, WIDTH)
        self.table.weight.data.mul_(torch.linspace(0.5, 2, WIDTH)).add_(common)
        self.norm, self.body = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, words, bias=bias)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        return self.head(self.norm(x + self.body(torch.tanh(x))))


class Twice(Words):
    """The table is read by a sum, too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.table.weight.sum()


class OfItself(Words):
    """The table is multiplied by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(self.table.weight, self.table.weight).mean()


def normalized(model: nn.Module, **options: Any) -> tuple[Program, Program, Tensor]:
    surroundings = Context(gather(texts()), squared_error)
    before = run([Decompose()], capture(model, surroundings.batches[0]), surroundings)
    return before, run([NormalizeTables(**options)], before, surroundings), texts()[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_function_stays_and_columns_come_to_one_range(tied: bool, bias: bool) -> None:
    model = build(lambda: Words(tied, bias))
    before, after, x = normalized(model)
    wanted = before.run((x,), {}).detach()
    # float32 sums in another order, of terms of about a thousand
    assert torch.allclose(after.run((x,), {}).detach(), wanted, atol=1e-6 * float(wanted.abs().max()) * WIDTH)
    table, old = after.tensor("table.weight"), before.tensor("table.weight")
    assert old.abs().amax(1).min() > 25
    assert table.abs().amax(1).max() < 5
    assert table.mean(0).abs().max() < 1e-5  # a mean of 30 in float32 is off by 2e-6
    assert torch.allclose(table.std(0, correction=0), torch.ones(WIDTH), atol=1e-5)
    columns, means = after.tensor("table.weight_columns"), after.tensor("table.weight_means")
    assert torch.allclose(table * columns + means, old, atol=1e-5)
    assert torch.equal(model.get_parameter("table.weight"), old), "the user's table is not changed"
    readers = [node for node in after.graph.graph.nodes if node.op == "get_attr" and node.target == "table.weight"]
    assert sum(len(node.users) for node in readers) == 1 + tied


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: Words(common=torch.zeros(WIDTH)), {}),
        (Words, {"keep_float": ("table.*",)}),
        (Words, {"gain": 1e9}),
        (Twice, {}),
        (OfItself, {}),
        (lambda: Words(words=100), {}),
    ],
)
def test_other_tables_are_left_alone(make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    before, after, _ = normalized(build(make), **options)
    assert after.graph is before.graph


def test_a_table_of_few_bits_loses_much_less(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the table and its head at 4 bits; and the file computes what the graph does."""

    def loss(gain: float) -> tuple[hawqfx.Compiled, float]:
        monkeypatch.setattr("hawqfx.pipeline.NormalizeTables", lambda keep_float: NormalizeTables(gain, keep_float))
        model = build(Words)
        compiled = hawqfx.compile(
            model, "weight_bits=8", texts(8), sensitivity="mse", weight_bits=(4, 8),
            fix={"table.weight": 4, "body.weight": 8},
        )  # fmt: skip
        with torch.no_grad():
            p, q = (net(texts(8)[-1]).log_softmax(-1) for net in (model, compiled.model))
        return compiled, float((p.exp() * (p - q)).sum(-1).mean())

    plain, parted = loss(1e9), loss(16.0)
    assert parted[1] < 0.1 * plain[1]
    parted[0].export(tmp_path / "model.onnx")
    x = texts()[0]
    (found,) = ort.run_exactly(tmp_path / "model.onnx", [x.numpy()])
    wanted = parted[0].model(x).detach()
    assert torch.allclose(torch.from_numpy(found), wanted, atol=1e-2 * float(wanted.abs().max()))
    parted[0].save(tmp_path / "net.hawqfx")
    hawqfx.load(tmp_path / "net.hawqfx", build(Words)).export(tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "model.onnx").read_bytes()
    (lookup,) = parted[0].planned.graph.graph.find_nodes(op="call_function", target=EMBEDDING)
    assert lookup.args[0].target == "table.weight"
