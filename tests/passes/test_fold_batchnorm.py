"""fold_batchnorm: the function stays, the batch-norms go, and a weight under two of them is left alone."""

from typing import Any

import pytest
import torch

from hawqfx.frontend.capture import capture
from hawqfx.ir.operators import BATCH_NORM
from hawqfx.ir.program import Program
from hawqfx.pass_manager.manager import run
from hawqfx.passes.fold_batchnorm import FoldBatchnorm
from tests.nets import IMAGES, Plain, SharedLayer, SharedWeightTwoNorms, build, images
from tests.tools import after, captured, context


def norms(program: Program) -> int:
    return len(program.graph.graph.find_nodes(op="call_function", target=BATCH_NORM))


@pytest.mark.parametrize("name", IMAGES)
def test_keeps_the_function(name: str) -> None:
    x = images()[0][0]
    folded = after("fold_batchnorm", IMAGES[name])
    # float32 sums of at most 54 terms in another order: 54 * 2^-24, rounded up
    torch.testing.assert_close(folded.run((x,), {}), build(IMAGES[name])(x), rtol=1e-5, atol=1e-5)


def test_agrees_with_the_formula_in_float64() -> None:
    model: Any = build(Plain)
    folded = after("fold_batchnorm", Plain)
    norm = model.norm1
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    expected = (model.conv1.weight.double() * gain[:, None, None, None]).float()
    assert torch.equal(folded.tensor("conv1.weight"), expected)
    bias = (norm.bias.double() - norm.running_mean.double() * gain).float()
    # one rounding to float32, after sums in another order
    torch.testing.assert_close(folded.tensor("conv1.folded_bias"), bias, rtol=1e-6, atol=1e-7)


def test_drops_every_batchnorm_and_dropout_of_a_chain() -> None:
    assert norms(captured(Plain)) == 2
    assert norms(after("fold_batchnorm", Plain)) == 0


def test_folds_a_shared_layer_once() -> None:
    assert norms(captured(SharedLayer)) == 2
    assert norms(after("fold_batchnorm", SharedLayer)) == 0


def test_leaves_a_weight_under_two_batchnorms() -> None:
    assert norms(after("fold_batchnorm", SharedWeightTwoNorms)) == 2


def test_leaves_the_users_model_as_it_was() -> None:
    model = build(Plain)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run([FoldBatchnorm()], capture(model, context().batches[0]), context())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
