"""The quantizers of a block: those that a plan has, and those that are learned."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from hawqfx.ir.facts import Quantizers, RoundedWeights
from hawqfx.ir.program import Program
from hawqfx.ir.quantizers import activation_at, ends_of, scale_of, weight_at
from hawqfx.ir.sites import Layer
from hawqfx.learning.blocks import Block
from hawqfx.learning.walk import Walk
from hawqfx.maths import affine
from hawqfx.maths.formats import Format
from hawqfx.maths.learned import LearnedActivation, LearnedBias, LearnedWeight


class PlannedQuantizers:
    """The quantizers of a block as the facts have them.

    Args:
        program: with a plan, quantizers and codes.
        block: the block.
    """

    def __init__(self, program: Program, block: Block) -> None:
        self.program, self.plan = program, program.formats()
        self.site_of = {node: site.key for site in program.activations for node in site.nodes}
        self.weights = {key: weight_at(program, key, self.plan[key]) for key in block.weights if self._is_integer(key)}
        self.biases = biases_at(program, block)

    def _is_integer(self, key: str) -> bool:
        return not self.plan[key].is_float

    def tensors(self) -> dict[str, Tensor]:
        """The dequantized weights, and the biases that came with their codes."""
        return self.weights | self.biases

    def quantize(self, node: str, value: Tensor) -> Tensor:
        """The hook that quantizes activations; the gradient passes straight through."""
        site = self.site_of[node]
        if not self._is_integer(site):
            return value
        quantized = activation_at(self.program, site, self.plan[site], value.detach())
        return value + (quantized - value).detach() if value.requires_grad else quantized


def biases_at(program: Program, block: Block) -> dict[str, Tensor]:
    """The biases of a block that came with the codes of their layers."""
    plan, found = program.formats(), {}
    for layer in program.layers:
        if layer.weight in block.weights and layer.bias is not None:
            known = program.facts.get(layer.weight, RoundedWeights).biases
            if plan[layer.weight] in known:
                found[layer.bias] = known[plan[layer.weight]]
    return found


class LearnedQuantizers(nn.Module):
    """The quantizers of a block, learned where the plan has static ones that no earlier block uses.

    Args:
        walk: up to the block.
        block: the block.
    """

    def __init__(self, walk: Walk, block: Block) -> None:
        super().__init__()
        self.program, self.planned = walk.program, PlannedQuantizers(walk.program, block)
        self.start = {} if walk.start is None else biases_at(walk.start, block)
        self.weights = dict(self._weights(walk, block))
        self.activations = dict(self._activations(walk, block))
        self.biases: dict[str, LearnedBias] = {}
        self.bias_of: dict[str, str] = {}
        for layer, bias, unit in self._free_biases():
            self.biases[layer.weight] = LearnedBias(self.start.get(bias, self.program.tensor(bias)), unit)
            self.bias_of[layer.weight] = bias
        self.parts = nn.ModuleList([*self.weights.values(), *self.biases.values(), *self.activations.values()])

    def _weights(self, walk: Walk, block: Block) -> Iterator[tuple[str, LearnedWeight]]:
        """Weights, from codes that are compensated by the samples that are fitted alone."""
        program, plan = self.program, self.planned.plan
        tables = {site.key for site in program.weights if site.kind == "embedding"}
        for key in block.weights:
            if walk.start is not None and plan[key].is_static and key not in walk.done and key not in tables:
                quantizer = walk.start.facts.get(key, Quantizers).by_format[plan[key]]
                if quantizer.rows:  # a table that is a head too: a row of one bit has no code between its two
                    continue
                weight = program.tensor(key).detach()
                scale = affine.along_channels(scale_of(quantizer).to(weight.device), weight)
                codes = walk.start.facts.get(key, RoundedWeights).codes[plan[key]]
                low, high = (affine.along_channels(end.to(weight), weight) for end in ends_of(quantizer))
                yield key, LearnedWeight(weight, codes, scale, low, high)

    def _activations(self, walk: Walk, block: Block) -> Iterator[tuple[str, LearnedActivation]]:
        program, plan = self.program, self.planned.plan
        nodes = {node.name for node in block.nodes}
        for site in program.activations:
            if plan[site.key].is_static and site.key not in walk.done and nodes.intersection(site.nodes):
                quantizer = program.facts.get(site.key, Quantizers).by_format[plan[site.key]]
                low, high = quantizer.low - quantizer.zero_point, quantizer.high - quantizer.zero_point
                # a rectifier with a ceiling is lowered as the end of the quantizer's range, which may not pass it
                ceiling = max(site.ceiling, quantizer.scale[0] * high)
                yield site.key, LearnedActivation(quantizer.scale[0], low, high, ceiling).to(walk.context.device)

    def _free_biases(self) -> Iterator[tuple[Layer, str, Tensor]]:
        """Layers whose bias can be learned with their weight, the bias, and the unit of its steps, (C,): about the
        error that half a code of every element leaves in the output."""
        program, plan = self.program, self.planned.plan
        weights, biases = (Counter(getattr(layer, part) for layer in program.layers) for part in ("weight", "bias"))
        for layer in program.layers:
            alone = layer.bias is not None and weights[layer.weight] == biases[layer.bias] == 1
            if layer.weight in self.weights and alone and plan[layer.input].is_static:
                assert layer.bias is not None
                read = program.facts.get(layer.input, Quantizers).by_format[plan[layer.input]]
                size = read.scale[0] * (read.high - read.low) / 4  # four standard deviations, nearly
                weight = self.weights[layer.weight]
                columns = weight.start[0].numel()
                scale = weight.scale.detach().abs().flatten().expand(weight.start.shape[0])
                yield layer, layer.bias, scale * size * math.sqrt(columns)

    @property
    def offsets(self) -> list[nn.Parameter]:
        """What the codes and biases are moved by, in codes."""
        return [*(part.offset for part in self.weights.values()), *(part.offset for part in self.biases.values())]

    @property
    def scales(self) -> list[nn.Parameter]:
        """The logarithms of scales."""
        scales = [part.log_scale for part in self.weights.values()]
        return scales + [part.log_scale for part in self.activations.values()]

    @property
    def sites(self) -> set[str]:
        """Keys of the sites that are learned."""
        return {*self.weights, *self.activations}

    def state(self) -> list[Tensor]:
        """All that is learned, as it is now."""
        return [parameter.detach().clone() for parameter in self.parameters()]

    @torch.no_grad()
    def set(self, state: Sequence[Tensor]) -> None:
        """Take what `state` returned."""
        for parameter, value in zip(self.parameters(), state, strict=True):
            parameter.copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """The dequantized weights and the biases of the block."""
        biases = {self.bias_of[key]: bias() for key, bias in self.biases.items()}
        weights = {key: weight() for key, weight in self.weights.items()}
        return self.planned.tensors() | weights | self.start | biases

    def quantize(self, node: str, value: Tensor) -> Tensor:
        """The hook that quantizes activations."""
        site = self.planned.site_of[node]
        return self.activations[site](value) if site in self.activations else self.planned.quantize(node, value)

    def learned(self) -> Program:
        """The program with the quantizers and codes as learned."""
        return self.program.learn(self._quantizers()).learn(self._codes())

    def _quantizers(self) -> dict[str, Quantizers]:
        scales = {key: part.scale for key, part in self.weights.items()}
        scales |= {key: part.scale for key, part in self.activations.items()}
        facts = {}
        for key, scale in scales.items():
            width, before = self._format(key), self.program.facts.get(key, Quantizers)
            numbers = tuple(scale.detach().reshape(-1).tolist())
            facts[key] = Quantizers({**before.by_format, width: replace(before.by_format[width], scale=numbers)})
        return facts

    def _codes(self) -> dict[str, RoundedWeights]:
        facts = {}
        for key, weight in self.weights.items():
            width, before = self._format(key), self.program.facts.get(key, RoundedWeights)
            codes = {**before.codes, width: weight.codes.detach().to(torch.int8)}
            biases: Mapping[Format, Tensor] = before.biases
            if key in self.biases:
                biases = {**biases, width: self.biases[key]().detach()}
            facts[key] = replace(before, codes=codes, biases=biases)
        return facts

    def _format(self, key: str) -> Format:
        return self.planned.plan[key]
