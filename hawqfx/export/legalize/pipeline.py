"""The passes that export runs before it translates a graph, in order."""

from collections.abc import Sequence

from hawqfx.export.legalize.integer_constants import IntegerConstants
from hawqfx.export.legalize.linear_kernels import LinearKernels
from hawqfx.export.legalize.runtime_operators import FloatWeights, GlobalAverage, TableRows
from hawqfx.export.legalize.signed_factors import SignedFactors
from hawqfx.export.legalize.space_to_depth import SpaceToDepth
from hawqfx.pass_manager.base import Rewrite


def legalization(*, image_inputs: bool = True, signed_factors: bool = True) -> Sequence[Rewrite]:
    """The passes that give a graph, lowered or not, the form that onnxruntime's kernels take.

    Args:
        image_inputs: whether the graph's inputs may be images that layers read in blocks; not so for a part of a
            network, whose inputs are tensors anywhere inside.
        signed_factors: whether the file is for processors whose sums of signed codes do not saturate.
    """
    blocks = [SpaceToDepth()] if image_inputs else []
    factors = [SignedFactors()] if signed_factors else []
    return [IntegerConstants(), LinearKernels(), *blocks, *factors, FloatWeights(), GlobalAverage(), TableRows()]
