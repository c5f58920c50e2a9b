"""Values are called by the path of the module that makes them, as the model's own code does."""

import pytest
import torch
from torch import Tensor, nn

from hawqfx.frontend.capture import capture
from hawqfx.frontend.data import Batch
from hawqfx.ir.names import names_of
from hawqfx.ir.program import Program
from tests.nets import build
from tests.tools import quick


class Block(nn.Module):
    """Modules that are called once, one that is called twice, and an operator beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.relu = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        return self.relu(self.conv2(x) + x)


class Net(nn.Module):
    """A block, and the model's own operators."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.Sequential(Block()), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3)))


@pytest.fixture(scope="module")
def captured() -> Program:
    return capture(build(Net), Batch((torch.randn(2, 1, 8, 8),), {}))


def test_modules_operators_calls_and_inputs(captured: Program) -> None:
    names = names_of(captured.graph.graph)
    assert [name for node, name in names.items() if node.op != "get_attr"] == [
        "input x", "layers.0.conv1", "layers.0.relu", "layers.0.conv2", "layers.0 add", "layers.0.relu#2", "mean",
        "head", "output",
    ]  # fmt: skip


def test_sites_keep_their_names_through_the_passes() -> None:
    compiled = quick(Net, "weight_bits=5")
    assert [site.name for site in compiled.planned.activations] == [
        "input x", "layers.0.relu output", "layers.0.conv2 output", "layers.0.relu#2 output", "mean output",
    ]  # fmt: skip


def test_nodes_that_passes_make_have_the_module_of_what_they_replace() -> None:
    """Attention, which is written out, and the copies that integer kernels read."""
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(attention, nn.Flatten(), nn.Linear(40, 3)).eval()
    data = [(torch.randn(4, 5, 8), torch.randint(0, 3, (4,))) for _ in range(2)]
    compiled = quick(lambda: model, "weight_bits=6", data=data)
    names = {site.key: site.name for site in compiled.planned.activations}
    assert {"input input", "0.norm1 output"} <= set(names.values())
    assert not [key for key in names if "_" in key and key in compiled.summary()]


def test_a_program_of_torch_export_has_the_same_names() -> None:
    example = torch.randn(2, 1, 8, 8)
    found = names_of(capture(torch.export.export(build(Net), (example,)), Batch((example,), {})).graph.graph)
    assert "layers.0.relu#2" in found.values()
