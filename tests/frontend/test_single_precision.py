"""Models of 16 and 64 bits are measured and lowered in float32."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hawqfx
from hawqfx.frontend.capture import capture
from hawqfx.frontend.data import Batch
from hawqfx.frontend.single_precision import in_single_precision
from hawqfx.runtime import ort

OTHERS = (torch.bfloat16, torch.float16, torch.float64)
X = torch.randn(16, 12, generator=torch.Generator().manual_seed(1))


class Masked(nn.Module):
    """Layers, a cast to the type of the weights, and a mask of the least number of that type."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(12, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        kind = self.first.weight.dtype
        x = torch.relu(self.first(x.to(kind)))
        hidden = torch.full_like(x, torch.finfo(kind).min)
        return self.head(x.float().to(kind) * torch.where(x > 0, x, hidden).softmax(-1))


def network(kind: torch.dtype) -> Any:
    torch.manual_seed(0)
    return Masked().eval().to(kind)


@pytest.mark.parametrize("given", ["model", "float32 data", "exported"])
@pytest.mark.parametrize("kind", OTHERS)
def test_measured_and_lowered_in_float32(tmp_path: Path, kind: torch.dtype, given: str) -> None:
    model, x = network(kind), X if given == "float32 data" else X.to(kind)
    source = model
    if given == "exported":
        source = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    made = hawqfx.compile(source, "weight_bits=7", [x, x], sensitivity="mse")
    name = str(kind).removeprefix("torch.")
    assert f"the model's {name} tensors are measured and lowered in float32" in made.summary()
    assert all(parameter.dtype == kind for parameter in model.parameters())
    assert all(tensor.dtype == torch.float32 for tensor in made.program.constants().values())
    made.export(tmp_path / "model.onnx")
    (output,) = ort.run(ort.session(tmp_path / "model.onnx"), [X.to(kind).float().numpy()])
    exact = network(kind).double()(X.to(kind).double()).detach().numpy()
    # 7 bits of weights and 8 of activations: a step is 1/128 of a tensor's range
    assert np.abs(output - exact).max() < 0.02 * np.abs(exact).max()


@pytest.mark.parametrize("kind", OTHERS)
def test_the_graph_is_the_model_without_rounding(kind: torch.dtype) -> None:
    program = in_single_precision(capture(network(kind), Batch((X,), {})))
    types = {node.meta["val"].dtype for node in program.graph.graph.nodes if "val" in node.meta}
    assert types <= {torch.float32, torch.bool}
    exact = network(kind).double()(X.double())
    # float32 sums of 32 products
    assert (program.run((X,), {}) - exact).abs().max() < 1e-6


def test_a_float32_model_shares_its_tensors_and_has_no_note() -> None:
    model = network(torch.float32)
    program = in_single_precision(capture(model, Batch((X,), {})))
    assert program.notes == ()
    assert program.tensor("head.weight") is model.head.weight


class Mixed(nn.Module):
    """A float32 layer in front of a bfloat16 one, whose parameters come first."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.first = nn.Linear(32, 3).to(torch.bfloat16), nn.Linear(12, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x)).to(torch.bfloat16))


def test_a_model_of_two_types_gets_inputs_of_the_one_that_it_takes() -> None:
    made = hawqfx.compile(Mixed().eval(), "weight_bits=7", [X], sensitivity="mse")
    assert {site.key for site in made.planned.weights} == {"first.weight", "head.weight"}
