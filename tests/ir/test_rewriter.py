"""The rewriter: edits a copy, keeps names for sites, records shapes."""

import torch

from hawqfx.ir.graph import batch_size, captured_shape
from hawqfx.ir.rewriter import GraphRewriter
from tests.nets import Plain
from tests.tools import captured

_aten = torch.ops.aten


def test_the_program_stays_as_it_was() -> None:
    program = captured(Plain)
    before, weight = str(program.graph.graph), program.tensor("conv1.weight").clone()
    rewriter = GraphRewriter(program)
    relu = rewriter.calls(_aten.relu.default)[0]
    with rewriter.before(relu):
        doubled = rewriter.call(_aten.mul.Tensor, relu.args[0], 2.0)
    relu.args = (doubled,)
    rewriter.store("conv1.weight", torch.zeros_like(weight), parameter=True)
    after = rewriter.done()
    assert str(program.graph.graph) == before
    assert torch.equal(program.tensor("conv1.weight"), weight)
    assert not after.tensor("conv1.weight").any()
    (made,) = after.graph.graph.find_nodes(op="call_function", target=_aten.mul.Tensor)
    assert captured_shape(made) == captured_shape(relu)


def test_a_node_takes_over_a_name_and_a_shape() -> None:
    rewriter = GraphRewriter(captured(Plain))
    relu = rewriter.calls(_aten.relu.default)[0]
    name, shape = relu.name, captured_shape(relu)
    with rewriter.before(relu):
        clamped = rewriter.call(_aten.clamp_min.default, relu.args[0], 0.0)
    rewriter.replace(relu, clamped, keep_name=True)
    (made,) = rewriter.done().graph.graph.find_nodes(op="call_function", target=_aten.clamp_min.default)
    assert (made.name, captured_shape(made)) == (name, shape)
    assert captured_shape(made)[0] == batch_size(made.graph)
