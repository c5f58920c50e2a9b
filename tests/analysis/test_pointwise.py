"""Functions of each value: found in the graph whole or not at all, and what quantizers make of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hawqfx.analysis.pointwise import function_of, mean_square_slope, nonlinearity
from hawqfx.ir.facts import QuantizationError
from hawqfx.ir.program import Program
from hawqfx.ir.quantizers import activation_at
from hawqfx.maths.formats import Format
from hawqfx.pass_manager.manager import run
from hawqfx.passes.calibration import Calibration
from hawqfx.passes.decompose import Decompose
from hawqfx.passes.find_sites import FindSites
from hawqfx.passes.histograms import Histograms
from hawqfx.passes.insert_copies import InsertCopies
from hawqfx.passes.perturbation import Perturbation
from hawqfx.passes.rounding import Rounding
from tests.tools import captured, context, tensor_at

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "tanh gelu": lambda x: F.gelu(x, approximate="tanh"), "hardswish": F.hardswish,
    "written out": lambda x: x * torch.tanh(F.softplus(x)),
}  # fmt: skip


class Between(nn.Module):
    """A function between two convolutions; `also` reads its input beside it."""

    def __init__(self, function: Callable[[Tensor], Tensor], also: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.function, self.also = function, also
        self.first, self.second, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(self.function(x)).mean((2, 3))
        return self.head(y if self.also is None else y + self.also(x).mean((2, 3)))


def found(make: Callable[[], nn.Module]) -> Program:
    return run([Decompose(), InsertCopies(), FindSites()], captured(make), context())


def source(program: Program) -> torch.fx.Node:
    """The tensor that the function is of."""
    return next(iter(program.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_found_whole(name: str) -> None:
    program = found(lambda: Between(FUNCTIONS[name]))
    function = function_of(program.graph.graph, [source(program).name])
    assert function is not None
    values = torch.linspace(-6, 6, 100)  # none where hardswish has a kink
    # written with other operators than torch's own kernel has: float32 rounding of values up to six
    torch.testing.assert_close(function(values), FUNCTIONS[name](values), rtol=1e-6, atol=2e-6)
    slopes = torch.func.vmap(torch.func.grad(FUNCTIONS[name]))(values)
    counts = torch.arange(100.0)
    mean = float((slopes.square() * counts).sum() / counts.sum())
    assert mean_square_slope(function, values, counts) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("function", [lambda x: x.abs().sqrt(), torch.reciprocal, lambda x: x / (x * x + 1)])
def test_a_function_that_is_not_finite_or_infinitely_steep_somewhere_is_none(
    function: Callable[[Tensor], Tensor],
) -> None:
    program = found(lambda: Between(function))
    assert function_of(program.graph.graph, [source(program).name]) is None


def test_who_asks_for_a_size_reads_no_values() -> None:
    program = found(lambda: Between(lambda x: F.silu(x) * x.shape[0]))
    assert function_of(program.graph.graph, [source(program).name]) is not None


@pytest.mark.parametrize("also", [torch.tanh, lambda x: x.transpose(2, 3)])
def test_what_else_is_read_of_a_tensor_leaves_no_function(also: Callable[[Tensor], Tensor]) -> None:
    program = found(lambda: Between(F.silu, also))
    assert function_of(program.graph.graph, [source(program).name]) is None


def test_a_sum_over_values_is_no_function_of_each() -> None:
    program = found(lambda: Between(lambda x: x - x.mean(1, keepdim=True)))
    assert nonlinearity(source(program)) == []


@pytest.mark.parametrize("bits", [4, 8])
def test_errors_count_after_the_function(bits: int) -> None:
    """||f(Q(x)) - f(x)||^2 / E[f'(x)^2], which is less than that of the quantizer for x itself."""
    program = found(lambda: Between(F.gelu))
    program = run([Histograms(), Calibration(), Rounding("nearest"), Perturbation()], program, context())
    key = source(program).name
    x = torch.cat([tensor_at(program, batch, key) for batch in context().batches])
    became = activation_at(program, key, Format(bits), x)
    error = (F.gelu(became.double()) - F.gelu(x.double())).square().sum() / len(x)
    slope = torch.func.vmap(torch.func.grad(F.gelu))(x.double().flatten()).square().mean()
    fact = program.facts.get(key, QuantizationError)
    # of a histogram, sixteen bins or more to a step of 8 bits
    assert fact.squared_error[Format(bits)] == pytest.approx(float(error / slope), rel=1e-2)
    low, high = float(x.min()), float(x.max())
    plain = torch.round((x - low) / (high - low) * (2**bits - 1)) / (2**bits - 1) * (high - low) + low
    assert error < (F.gelu(plain) - F.gelu(x)).double().square().sum() / len(x)
