"""The codes of a plan, made anew layer by layer, from inputs that are quantized already.

The rounding before a plan knows every format of every weight, and takes the inputs of the float network.  Once formats
are chosen, the inputs of each layer are known as they will be, with the errors of all layers before it.  So the float
network and the quantized one are walked through side by side, and each weight is rounded towards the weight that gives
the float layer's outputs from its quantized inputs (hawqfx/analysis/asymmetric.py), each row in the scale that leaves
the least error.  Of layers that rectifiers read, mean errors are taken out of the biases then, see bias_correction.py;
of others with a bias of their own, by the same least squares.

KL divergence from float on data held out, with compensated codes and corrected biases / so: ResNet-20 (512 images)
with 3 bits on average .0065 / .0022, 2.5 bits .064 / .0042, uniform 2 bits 1.23 / .040; EfficientNet-Lite0
(64 pictures) with uniform 4 bits .24 / .098.  benchmarks/rounding.py measures it.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from hawqfx.analysis.asymmetric import SCALES, PairMoments, pair_moments, recoded
from hawqfx.analysis.input_moments import groups_of
from hawqfx.analysis.side_by_side import SideBySide, quantized_layers, with_own_bias
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import ChosenFormat, Quantizers, RoundedWeights
from hawqfx.ir.operators import operands
from hawqfx.ir.program import Program
from hawqfx.ir.quantizers import scale_of
from hawqfx.ir.sites import ActivationSite, Layer, WeightSite
from hawqfx.maths import affine
from hawqfx.pass_manager.base import Analysis, Kind, option
from hawqfx.passes.bias_correction import correct, rectified_layers


@dataclass(frozen=True)
class SequentialRounding(Analysis):
    """The codes of a plan, fitted layer by layer to the float network from quantized inputs."""

    biases: bool = option(True, "whether biases move too")
    scales: bool = option(True, "whether the scales of rows are chosen anew; those of a plan that is followed are not")
    needs: ClassVar[tuple[Kind, ...]] = (WeightSite, ActivationSite, Quantizers, RoundedWeights, ChosenFormat)
    gives: ClassVar[tuple[Kind, ...]] = (Quantizers, RoundedWeights)

    @torch.no_grad()
    def learn(self, program: Program, context: Context) -> Program:
        layers, fitted = quantized_layers(program), _fitted(program)
        rectified = {layer.node for layer in rectified_layers(program)} if self.biases else set()
        own = with_own_bias(program) if self.biases else set()
        walk = SideBySide(program, context, "codes are fitted to")
        moments, quantizers = _Moments(walk), {}
        for layer in context.track(layers, self.name, len(layers)):
            if layer.weight in fitted:
                quantizers[layer.weight] = self._recode(walk, moments, layer, layer.node in own - rectified)
            if layer.node in rectified:
                correct(walk, layer)
        return program.learn(quantizers).learn(walk.facts)

    def _recode(self, walk: SideBySide, moments: "_Moments", layer: Layer, bias: bool) -> Quantizers:
        """Go on to the input of a layer, give its weight other codes, and return its quantizers."""
        key, program = layer.weight, walk.program
        weight, width, known = program.tensor(key).detach(), walk.formats[key], program.facts.get(key, Quantizers)
        quantizer, how = known.by_format[width], program.facts.get(key, RoundedWeights).compensation
        assert how is not None
        node = walk.named[layer.node]
        found = recoded(
            weight, affine.along_channels(scale_of(quantizer).to(weight.device), weight),
            (quantizer.low, quantizer.high), moments.of(layer), groups_of(node, layer), how.chosen,
            bias=bias, scales=SCALES if self.scales and quantizer.blocks == 1 else (1.0,),
        )  # fmt: skip
        walk.recode(key, found.codes, found.weight)
        if found.shift is not None:
            walk.move_bias(layer, found.shift)
        if found.scale is None or quantizer.blocks > 1:
            return known
        changed = replace(quantizer, scale=tuple(found.scale.tolist()))
        return Quantizers({**known.by_format, width: changed})


def _fitted(program: Program) -> set[str]:
    """The weights whose codes are made anew: those of a single reader, compensated in all their columns at once."""
    nodes = program.graph.graph.find_nodes(op="get_attr")
    readers = Counter(str(node.target) for node in nodes for _ in node.users)
    found = set()
    for layer in quantized_layers(program):
        how = program.facts.get(layer.weight, RoundedWeights).compensation
        whole = how is not None and how.width == program.tensor(layer.weight)[0].numel()
        if whole and readers[layer.weight] == 1:
            found.add(layer.weight)
    return found


class _Moments:
    """The moments of the inputs of layers; layers that read the same input in the same way, such as the projections
    of an attention, share them."""

    def __init__(self, walk: SideBySide) -> None:
        self.walk = walk
        self.last: tuple[object, list[tuple[float, PairMoments]]] = (None, [])

    def of(self, layer: Layer) -> list[tuple[float, PairMoments]]:
        walk = self.walk
        node, weight = walk.named[layer.node], walk.program.tensor(layer.weight)
        source = operands(node)[0]
        kind = (source, layer.operator, weight.shape[1:], str(operands(node)[3:]))
        if self.last[0] != kind:
            walk.go_on(source)
            inputs = [(exact[source], found[source]) for exact, found in zip(walk.floats, walk.quantized, strict=True)]
            self.last = (kind, pair_moments(node, layer, weight, inputs, walk.sizes))
        return self.last[1]
