"""What a walk through both networks keeps is what is made room for."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from hawqfx.ir.operators import operands
from hawqfx.learning.mean_error import correct, rectified_layers
from hawqfx.learning.side_by_side import SideBySide, bytes_kept, quantized_layers
from tests.nets import Attention, Concat, ConcatInput, Plain, Residual, SharedLayer
from tests.tools import quick


@pytest.mark.parametrize("make", [Plain, Residual, SharedLayer, Concat, ConcatInput, Attention])
@torch.no_grad()
def test_most_that_is_kept_is_foreseen(make: Callable[[], nn.Module]) -> None:
    """Of every stop that sequential rounding makes, counted from the tensors themselves."""
    compiled = quick(make, "weight_bits=4")
    program, context = compiled.planned, compiled.session.context
    walk = SideBySide(program, context, "")
    rectified, most = {layer.node for layer in rectified_layers(program)}, 0
    for layer in quantized_layers(program):
        for stop in (False, True):
            if stop and layer.node in rectified:
                correct(walk, layer)
            elif not stop:
                walk.go_on(operands(walk.named[layer.node])[0])
            kept = [tensor for values in (*walk.floats, *walk.quantized) for tensor in values.values()]
            most = max(most, sum(tensor.nbytes for tensor in kept))
    assert most == bytes_kept(program) * context.samples
