"""The mean errors of the output channels of layers that rectifiers read; passes/bias_correction.py says why."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hawqfx.frontend.context import Context
from hawqfx.ir.facts import RoundedWeights
from hawqfx.ir.program import Program
from hawqfx.ir.sites import Layer
from hawqfx.learning.side_by_side import SideBySide, channels, passes, quantized_layers


def rectified_layers(program: Program) -> list[Layer]:
    """The quantized layers that rectifiers read, and that share neither weight nor bias with another, in the order of
    the graph."""
    own = program.with_own_bias
    nodes = {node.name: node for node in program.graph.graph.nodes}
    layers = quantized_layers(program)
    return [layer for layer in layers if layer.node in own and passes(nodes[layer.node]) is not None]


def corrected(program: Program, context: Context, name: str) -> Mapping[str, RoundedWeights]:
    """The facts of all weights, with biases that mean errors are taken out of, layer by layer.

    Args:
        program: with codes and a plan.
        context: the samples.
        name: of the pass, for its progress.
    """
    layers = rectified_layers(program)
    if not layers:
        return {site.key: program.facts.get(site.key, RoundedWeights) for site in program.weights}
    walk = SideBySide(program, context, "biases are corrected by")
    for layer in context.track(layers, name, len(layers)):
        correct(walk, layer)
    return walk.facts


def correct(walk: SideBySide, layer: Layer) -> None:
    """Go on to a layer that rectifiers read, and take the mean errors of its channels out of its bias."""
    walk.go_on(walk.named[layer.node], quantized=False)
    walk.shift(layer, mean_error(walk, layer))


def mean_error(walk: SideBySide, layer: Layer) -> Tensor:
    """The mean of the float output less the quantized one, by channel, (C,) float64, shrunk by its own error."""
    node = walk.named[layer.node]
    most = passes(node)
    assert most is not None
    totals, counts = [], []
    for exact, found in zip(walk.floats, walk.quantized, strict=True):
        wanted, output = exact[node], found[node]
        axis = channels(layer, output)
        others = [each for each in range(1, output.ndim) if each != axis]
        passed = ((wanted > 0) & (wanted < most)) | ((output > 0) & (output < most))
        errors = (wanted - output) * passed
        totals.append(errors.sum(others, dtype=torch.float64) if others else errors.double())
        counts.append(passed.sum(others, dtype=torch.float64) if others else passed.double())
    return shrunk_mean(torch.cat(totals), torch.cat(counts))


def shrunk_mean(totals: Tensor, counts: Tensor) -> Tensor:
    """The mean over all values of each channel, shrunk towards zero by as much of its square as is noise.

    The error of the mean is that of a ratio of sums over samples, whose values are no independent draws; the factor is
    that of James and Stein 1961, "Estimation with quadratic loss", for each channel by itself.

    Args:
        totals: (N, C) float64, sums of errors over the values of each sample.
        counts: (N, C) float64, number of those values.

    Returns:
        (C,) float64; zero where no value counts, or where the mean is within its standard error.
    """
    count = counts.sum(0).clamp_min(1)
    mean = totals.sum(0) / count
    if len(totals) < 2:
        return mean
    noise = (totals - mean * counts).square().sum(0) / count.square() * len(totals) / (len(totals) - 1)
    return mean * (1 - noise / mean.square().clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(0)
