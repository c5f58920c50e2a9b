"""Codes of a plan, made anew layer by layer from quantized inputs; passes/sequential_rounding.py says why."""

from collections import Counter
from dataclasses import replace

from hawqfx.analysis.asymmetric import PairMoments, pair_moments, recoded
from hawqfx.analysis.input_moments import groups_of
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import Quantizers, RoundedWeights
from hawqfx.ir.operators import operands
from hawqfx.ir.program import Program
from hawqfx.ir.quantizers import ends_of, numbers_of, scale_of
from hawqfx.ir.sites import Layer
from hawqfx.learning.mean_error import correct, rectified_layers
from hawqfx.learning.side_by_side import SideBySide, quantized_layers
from hawqfx.maths.rounding import SCALES

MOST_COLUMNS = 6144  # whose moments, and what is made of them, take 4 GB


def coded_anew(program: Program, context: Context, name: str, *, biases: bool = True, scales: bool = True) -> Program:
    """The program with codes, scales and biases that are fitted to the float network.

    Args:
        program: with compensated codes and a plan.
        context: the samples.
        name: of the pass, for its progress.
        biases: whether biases move.
        scales: whether the scales of rows are chosen anew.
    """
    layers, fitted = quantized_layers(program), _fitted(program)
    rectified = {layer.node for layer in rectified_layers(program)} if biases else set()
    own = program.with_own_bias if biases else set()
    walk = SideBySide(program, context, "codes are fitted to")
    moments, quantizers = _Moments(walk), {}
    for layer in context.track(layers, name, len(layers)):
        if layer.weight in fitted:
            quantizers[layer.weight] = _recode(walk, moments, layer, layer.node in own - rectified, scales)
        if layer.node in rectified:
            correct(walk, layer)
    return program.learn(quantizers).learn(walk.facts)


def _recode(walk: SideBySide, moments: "_Moments", layer: Layer, bias: bool, scales: bool) -> Quantizers:
    """Go on to the input of a layer, give its weight other codes, and return its quantizers."""
    key, program = layer.weight, walk.program
    weight, width, known = program.tensor(key).detach(), walk.formats[key], program.facts.get(key, Quantizers)
    quantizer, how = known.by_format[width], program.facts.get(key, RoundedWeights).compensation
    assert how is not None
    found = recoded(
        weight, scale_of(quantizer).to(weight.device), ends_of(quantizer),
        moments.of(layer), groups_of(walk.named[layer.node], layer), how.chosen,
        bias=bias, scales=SCALES if scales else (1.0,), block=width.block,
    )  # fmt: skip
    walk.recode(key, found.codes, found.weight)
    if found.shift is not None:
        walk.move_bias(layer, found.shift)
    changed = replace(quantizer, scale=numbers_of(found.scale))
    return Quantizers({**known.by_format, width: changed})


def _fitted(program: Program) -> set[str]:
    """The weights whose codes are made anew: those of a single reader and of at most MOST_COLUMNS, compensated in all
    columns at once."""
    nodes = program.graph.graph.find_nodes(op="get_attr")
    readers = Counter(str(node.target) for node in nodes for _ in node.users)
    found = set()
    for layer in quantized_layers(program):
        how = program.facts.get(layer.weight, RoundedWeights).compensation
        columns = program.tensor(layer.weight)[0].numel()
        whole = how is not None and how.width == columns <= MOST_COLUMNS
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
