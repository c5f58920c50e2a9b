"""How far to bring the channels of linear layers' inputs to one range, measured on the calibration data.

The outputs of layer-norms and activations have channels that lie far above the others: in MiniLM, one of 384 reaches 30
where the median channel reaches 2.  A tensor has one scale, so that the others have few codes.  A linear layer takes as
well

    W x = (W diag(s)) (x / s),    s_c = 2^k_c,

with an integer k_c >= 0 for each channel, which changes nothing in float.  The weights of the channel grow by s_c, and
the scales of the rows with them where that leaves a smaller error.  So s brings all channels below one ceiling, the
largest range over a power of two, and the ceiling is the one that leaves W x the least squared error with inputs of 8
bits and weights of 4, in the nearest codes, of whose error compensation leaves about a quarter.

SmoothQuant (Xiao et al., ICML 2023, equations 3 and 4) takes s_c = max|x_c|^a / max|W_c|^(1 - a) for all channels, for
weights of 8 bits; at 4 bits, the weights lose more by scales that ordinary channels have as well.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hawqfx.analysis.linear_inputs import linear_readers
from hawqfx.analysis.partition import partition
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import InputExponents
from hawqfx.ir.operators import kept_in_float, operands
from hawqfx.ir.program import Program
from hawqfx.maths import affine
from hawqfx.pass_manager.base import Analysis, Kind, option

INPUT_BITS, WEIGHT_BITS = 8, 4  # that the ceiling is chosen for
LEFT = 0.25  # by compensation, of the squared error of the nearest codes
HALVINGS = 8  # of the largest range, at most
FEWEST = 128  # rows of weights: beside fewer, a factor for each channel takes as many bytes as some bits of each weight


@dataclass(frozen=True)
class Smoothing(Analysis):
    """Measures by which powers of two the channels of linear layers' inputs are divided."""

    gain: float = option(1.1, "the least fall of the squared error of a layer's output, as a factor")
    keep_float: tuple[str, ...] = option((), "patterns, as in a shell, of weights whose layers stay in float")
    given: Mapping[str, Mapping[int, int]] | None = option(None, "exponents that are known; None: those of the data")
    gives: ClassVar[tuple[Kind, ...]] = (InputExponents,)

    @torch.no_grad()
    def learn(self, program: Program, context: Context) -> Program:
        if self.given is not None:
            return program.learn_about_network(InputExponents(self.given))
        readers = _readers(program, self.keep_float)
        measured = {name: _Channels() for name in readers}

        def see(node: str, value: Tensor) -> Tensor:
            measured[node].add(value)
            return value

        if readers:
            for batch in context.track(context.batches, self.name, len(context.batches)):
                program.run(batch.args, batch.kwargs, see, at=readers)
        found = {
            name: _exponents(channels, [program.tensor(key) for key in readers[name]], self.gain)
            for name, channels in measured.items()
        }
        return program.learn_about_network(InputExponents({name: each for name, each in found.items() if each}))


class _Channels:
    """Of each channel, the last dimension of a tensor: the ends of its range, zero among them, and its energy."""

    def __init__(self) -> None:
        self.rows = 0
        self.low = self.high = self.energy = torch.zeros(())

    def add(self, value: Tensor) -> None:
        rows = value.detach().flatten(0, -2)
        self.rows += len(rows)
        self.low, self.high = torch.minimum(self.low, rows.amin(0)), torch.maximum(self.high, rows.amax(0))
        self.energy = self.energy + rows.double().square().sum(0)

    def error(self, scale: Tensor, weight: Tensor) -> float:
        """The squared error of W x, over all rows, that an input x / `scale` (C,) of 8 bits has."""
        step = ((self.high / scale).max() - (self.low / scale).min()).double() / (2**INPUT_BITS - 1)
        return float(self.rows * step.square() / 12 * (weight * scale).double().square().sum())

    def weights_error(self, scale: Tensor, weight: Tensor) -> float:
        """The squared error of W x, over all rows, that W diag(`scale`) of 4 bits has."""
        scaled = weight * scale
        steps = affine.along_channels(affine.channel_scales(scaled, WEIGHT_BITS), scaled)
        errors = (affine.fake_quantize(scaled, steps, 0, *affine.signed_range(WEIGHT_BITS)) - scaled) / scale
        return float((errors.double().square().sum(0) * self.energy).sum())


def _readers(program: Program, keep_float: Sequence[str]) -> dict[str, list[str]]:
    """Tensors that float operators make and linear layers alone read, as integers, by the name of their node, with the
    weights of these layers, which nothing else reads.  Of a tensor that is reshaped, it is the first."""
    graph = program.graph.graph
    parts = partition(graph, lambda layer: kept_in_float(layer, keep_float))
    free, found = set(parts.kernels), {}
    for node in graph.nodes:
        layers = linear_readers(node) if node.op == "call_function" and node not in parts.integer_outputs else []
        if not layers or not set(layers) <= free:
            continue
        weights = {str(operands(layer)[1].target): operands(layer)[1] for layer in layers}
        alone = all(set(weight.users) <= set(layers) for weight in weights.values())
        if alone and sum(len(program.tensor(key)) for key in weights) >= FEWEST:
            found[node.name] = list(weights)
            free -= set(layers)
    return found


def _exponents(channels: _Channels, weights: Sequence[Tensor], gain: float) -> dict[int, int]:
    """k_c of the channels where it is above 0; none where that gains too little.

    Args:
        channels: of the input.
        weights: (rows, channels) each, that multiply it.
        gain: the least fall of the error, as a factor.
    """
    weight = torch.cat([each.detach() for each in weights])
    reach = torch.maximum(-channels.low, channels.high)
    best = torch.zeros_like(reach)
    least = (channels.error(best + 1, weight) + LEFT * channels.weights_error(best + 1, weight)) / gain
    if not 0 < least < math.inf:  # the histogram says which activation is not finite
        return {}
    for halvings in range(1, HALVINGS + 1):
        powers = (reach / (reach.max() / 2**halvings)).clamp_min(1.0).log2().ceil()
        scale = torch.exp2(powers)
        of_weights = LEFT * channels.weights_error(scale, weight)
        error = channels.error(scale, weight) + of_weights
        if error < least:
            best, least = powers, error
        if of_weights >= least:
            break
    return {channel: int(power) for channel, power in enumerate(best.tolist()) if power}
