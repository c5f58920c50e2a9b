"""find_sites: every weight and tensor of the integer part is found, and what must share a quantizer does."""

import pytest
import torch
from torch import Tensor, nn

from hawqfx.errors import CaptureError, NothingToQuantize
from hawqfx.ir.program import Program
from hawqfx.pass_manager.manager import run
from hawqfx.passes.find_sites import FindSites
from tests.nets import Concat, Depthwise, Flattened, Plain, Recurrent, Residual, SharedLayer, TiedWeights
from tests.tools import after, captured, context


def find(make: type[nn.Module]) -> Program:
    return after("find_sites", make)


def test_a_chain() -> None:
    program = find(Plain)
    assert [site.key for site in program.weights] == ["conv1.weight", "conv2.weight", "head.weight"]
    assert [(site.key, site.nonnegative) for site in program.activations] == [
        ("x", False),
        ("relu", True),
        ("relu_1", True),
        ("mean", False),
    ]
    assert program.left_float == {}


def test_macs_count_one_sample() -> None:
    assert {layer.node: layer.macs for layer in find(Plain).layers} == {
        "conv2d": 8 * 8 * 4 * 9,
        "conv2d_1": 3 * 3 * 6 * 4 * 9,
        "linear": 6 * 3,
    }


def test_macs_of_groups() -> None:
    macs = {layer.weight: layer.macs for layer in find(Depthwise).layers}
    assert macs["depthwise.weight"] == 8 * 8 * 6 * 9
    assert macs["grouped.weight"] == 4 * 4 * 4 * 3 * 9


def test_both_operands_and_the_sum_of_a_residual_are_sites() -> None:
    assert [site.key for site in find(Residual).activations] == ["x", "relu", "conv2d_1", "relu_1", "mean"]


def test_concat_ties_its_inputs_and_maxpool_carries_on() -> None:
    site = next(site for site in find(Concat).activations if len(site.nodes) > 1)
    assert site.nodes == ("relu", "relu_1")
    assert site.data_movement == ("cat", "max_pool2d")
    assert site.numel == 2 * 3 * 8 * 8


def test_a_reshape_carries_the_quantizer() -> None:
    site = find(Flattened).activations[1]
    assert (site.key, site.data_movement) == ("relu", ("flatten",))


@pytest.mark.parametrize(("make", "key"), [(SharedLayer, "twice.weight"), (TiedWeights, "first.weight")])
def test_a_shared_weight_is_one_site_with_two_layers(make: type[nn.Module], key: str) -> None:
    program = find(make)
    assert [site.key for site in program.weights].count(key) == 1
    assert sum(layer.weight == key for layer in program.layers) == 2
    assert "second.weight" not in {site.key for site in program.weights}


def test_what_stays_in_float_is_named() -> None:
    assert find(Recurrent).left_float == {"lstm": "onnxruntime has no integer kernel for lstm"}


def test_keep_float_takes_patterns() -> None:
    folded = after("fold_batchnorm", Plain)
    program = run([FindSites(keep_float=("conv*",))], folded, context())
    assert [site.key for site in program.weights] == ["head.weight"]
    assert program.left_float == dict.fromkeys(("conv2d", "conv2d_1"), "kept in float by the user")


class Computed(nn.Module):
    """A weight that depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.direction, self.head = nn.Parameter(torch.randn(3, 64)), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.direction * x.mean()
        return self.head(torch.nn.functional.linear(x.flatten(1), normed))


def test_a_computed_weight_stays_in_float_and_is_named() -> None:
    program = find(Computed)
    assert [site.key for site in program.weights] == ["head.weight"]
    assert "computed in the graph" in program.left_float["linear"]


def test_nothing_to_quantize() -> None:
    with pytest.raises(NothingToQuantize, match="no convolution or linear layer"):
        find(nn.Flatten)


class OverSamples(nn.Module):
    """A layer after a mean over the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(64, 5), nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.flatten(1)).mean(0)) + x.sum()


def test_a_tensor_without_a_batch_is_named_as_users_call_it() -> None:
    with pytest.raises(CaptureError, match=r"'mean' has shape \(5,\), of which the batch of \d+ is no part"):
        find(OverSamples)


def test_sites_do_not_change_the_graph() -> None:
    program = captured(Residual)
    assert run([FindSites()], program, context()).graph is program.graph


class Table(nn.Module):
    """A matrix for each sample, chosen by the sample itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(3, 8, 8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, :8]
        chosen = self.table[x[:, :3].argmax(1)]
        return self.head(torch.relu(torch.bmm(chosen, x[..., None]).squeeze(2)))


def test_a_table_of_matrices_that_stays_in_float_is_named() -> None:
    program = find(Table)
    assert list(program.float_weights()) == ["table"]
    assert "index" in program.left_float
    assert program.left_float["index"].startswith("aten.index.Tensor chooses among the matrices of table")
