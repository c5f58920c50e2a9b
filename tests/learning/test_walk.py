"""Values that go from block to block are those of the whole network, in float and quantized."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from hawqfx.learning.blocks import blocks
from hawqfx.learning.quantizers import PlannedQuantizers
from hawqfx.learning.walk import Walk
from tests.nets import Attention, Concat, ConcatInput, Plain, Residual, SharedLayer
from tests.tools import quick


@pytest.mark.parametrize("make", [Plain, Residual, SharedLayer, Concat, ConcatInput, Attention])
@torch.no_grad()
def test_the_last_values_are_the_answers(make: Callable[[], nn.Module]) -> None:
    """Inputs of the network are quantized too: with codes of 4 bits, one that is not would show."""
    compiled = quick(make, "weight_bits=3", activation_bits=(4,))
    context = compiled.session.context
    walk = Walk.begin(compiled.planned, context, 0.25, lambda program, _: program)
    weights: dict[str, torch.Tensor] = {}
    for block in blocks(walk.program):
        planned = PlannedQuantizers(walk.program, block)
        weights |= planned.tensors()
        floats = walk.run(block, walk.floats, None, {})
        found = walk.run(block, walk.quantized, planned.quantize, planned.tensors())
        last, walk = (floats, found), walk.after(block, walk.program, floats, found, set())
    (output,) = walk.program.graph.graph.find_nodes(op="output")
    for hook, tensors, values in ((None, {}, last[0]), (planned.quantize, weights, last[1])):
        whole = [walk.program.run(batch.args, batch.kwargs, hook, tensors) for batch in context.batches]
        # float32 sums in batches of another size
        torch.testing.assert_close(values[output.all_input_nodes[0]], torch.cat(whole), rtol=1e-5, atol=1e-5)
