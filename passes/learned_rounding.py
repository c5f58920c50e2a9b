"""The codes and scales of a plan, fitted block by block to the float network.

Rounding one weight at a time minimises the error of one layer's output.  What counts is the error after a block, from
inputs that are quantized already (Li et al., "BRECQ", ICLR 2021): a block's codes, the scales of its weights and those
of its activations are learned together by gradient, so that its outputs for quantized inputs are near those of the
float network.  The errors of earlier blocks are thereby corrected too.  Half of the elements of inputs and activations
stay in float in each step, drawn anew, so that few samples are not fitted at the cost of others (Wei et al., "QDrop",
ICLR 2022).

A quarter of the samples judge.  Learning begins with codes that are compensated by the others alone, and these are what
a block must beat on the samples that judge: codes that are compensated by all samples fit the judges too, and would
win where they are worse for everyone else.  A block that does not gain keeps the codes and scales that it had.  Codes
stay whole numbers all the time; those that come out are lowered and exported bit for bit.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from hawqfx.analysis.blocks import Block, blocks
from hawqfx.analysis.compensation import compensated
from hawqfx.errors import HawqfxError
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import ChosenFormat, Quantizers, RoundedWeights
from hawqfx.ir.graph import batch_size, captured_shape
from hawqfx.ir.program import Hook, Program
from hawqfx.ir.quantizers import activation_at, scale_of, weight_at
from hawqfx.ir.sites import ActivationSite, Layer, WeightSite
from hawqfx.maths import affine
from hawqfx.maths.formats import Format
from hawqfx.maths.learned import LearnedActivation, LearnedBias, LearnedWeight
from hawqfx.maths.seeding import generator
from hawqfx.pass_manager.base import Analysis, Kind, option
from hawqfx.sensitivity.batching import free_memory

log = logging.getLogger(__name__)

_Values = dict[fx.Node, Any]

ELEMENTS, FEWEST = 1 << 21, 4  # of the largest tensor of a step, unless that are fewer samples than these
_KEPT = 6  # tensors of all samples at the ends of a block: in float and quantized, before it and after it, and learned
_TOGETHER = 32  # samples that are run at once where nothing is learned


@dataclass(frozen=True)
class LearnedRounding(Analysis):
    """The codes and scales of a plan, fitted block by block to the float network."""

    steps: int = option(200, "steps of Adam for each block")
    rate: float = option(0.01, "the rate of codes, in codes per step, that falls to zero along half a cosine")
    scale_rate: float = option(0.001, "the rate of the logarithms of scales, likewise")
    batch: int = option(32, "the most samples of a step")
    drop: float = option(0.5, "the part of the elements of inputs and activations that stay in float in a step")
    held_out: float = option(0.25, "the part of the samples that only judge")
    needs: ClassVar[tuple[Kind, ...]] = (WeightSite, ActivationSite, Quantizers, RoundedWeights, ChosenFormat)
    gives: ClassVar[tuple[Kind, ...]] = (Quantizers, RoundedWeights)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not 0 < self.held_out < 1 or not 0 <= self.drop < 1:
            raise HawqfxError(f"{self}: steps and batch are 1 or more, held_out and drop are parts of one")

    def learn(self, program: Program, context: Context) -> Program:
        context = _within_memory(program, context)
        found = blocks(program)
        walk = _Walk.begin(program, context, self.held_out)
        for number, block in enumerate(context.track(found, self.name, len(found))):
            walk = _fitted(self, walk, block, number)
        return walk.program


def _within_memory(program: Program, context: Context) -> Context:
    """The context with as many samples as can be kept at the ends of a block; all, of a fixed batch."""
    if not program.dynamic_batch:
        return context
    nodes = (node for node in program.graph.graph.nodes if isinstance(node.meta.get("val"), Tensor))
    largest = max(math.prod(captured_shape(node)) for node in nodes if node.op == "call_function")
    bytes_of_sample = _KEPT * 4 * largest // batch_size(program.graph.graph)
    most = max(1, free_memory(context.device) // 2 // bytes_of_sample)
    if most >= context.samples:
        return context
    log.warning("codes are learned from %d of %d samples, which fit into memory", most, context.samples)
    kept = []
    for batch in context.batches:
        if most > 0:
            kept.append(batch.first(most))
            most -= batch.size
    return replace(context, batches=tuple(kept))


@dataclass(frozen=True, eq=False)
class _Walk:
    """How far the blocks are fitted.

    Args:
        program: with the facts of the blocks so far.
        context: the device and the seed.
        inputs: of the network, all samples.
        floats: node -> its values in the float network, of nodes that later blocks read.
        quantized: likewise in the network as quantized so far.
        unit: samples that are only run together: those of a fixed batch, else one.
        learning: numbers of the units that are fitted.
        judging: numbers of those that are not.
        start: codes in the formats of the plan, compensated by the samples that are fitted.
        done: keys of the sites whose quantizers are final.
    """

    program: Program
    context: Context
    inputs: _Values
    floats: _Values
    quantized: _Values
    unit: int
    learning: Tensor
    judging: Tensor
    start: Mapping[str, RoundedWeights]
    done: frozenset[str]

    @staticmethod
    def begin(program: Program, context: Context, held_out: float) -> "_Walk":
        batches = [program.flat_inputs(batch.args, batch.kwargs) for batch in context.batches]
        columns = zip(*batches, strict=True)
        values = [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
        inputs = dict(zip(program.graph.graph.find_nodes(op="placeholder"), values, strict=True))
        unit = 1 if program.dynamic_batch else context.batches[0].size
        units = context.samples // unit
        order = torch.randperm(units, generator=generator(context.seed, "judging", device=torch.device("cpu")))
        judges = max(1, round(units * held_out))
        learning, judging = order[judges:], order[:judges]
        start = _compensated(program, context, _rows(learning, unit)) if len(learning) else {}
        return _Walk(program, context, inputs, {}, {}, unit, learning, judging, start, frozenset())

    @property
    def samples(self) -> int:
        return self.context.samples

    def part(self, values: _Values, rows: Tensor) -> _Values:
        """The values of some samples; what has no sample axis stays whole."""
        return {
            node: value[rows] if isinstance(value, Tensor) and value.shape[:1] == (self.samples,) else value
            for node, value in values.items()
        }

    @torch.no_grad()
    def run(self, block: Block, known: _Values, hook: Hook | None, tensors: Mapping[str, Tensor]) -> _Values:
        """The outputs of a block for all samples."""
        parts: list[_Values] = []
        for rows in torch.arange(self.samples).split(_TOGETHER if self.unit == 1 else self.unit):
            parts.append(self.program.evaluate(block.outputs, self.part(self.inputs | known, rows), hook, tensors))
        return {node: torch.cat([part[node] for part in parts]) for node in block.outputs}


def _rows(units: Tensor, unit: int) -> Tensor:
    """The numbers of the samples of some units."""
    return (units[:, None] * unit + torch.arange(unit)).reshape(-1)


def _compensated(program: Program, context: Context, rows: Tensor) -> dict[str, RoundedWeights]:
    """The codes of all weights in the formats of the plan, compensated by some samples."""
    formats = program.formats()
    chosen = {}
    for site in program.weights:
        known = program.facts.get(site.key, Quantizers).by_format
        chosen[site.key] = Quantizers({width: known[width] for width in known if width == formats[site.key]})
    batches, first = [], 0
    for batch in context.batches:
        inside = rows[(rows >= first) & (rows < first + batch.size)].sort().values - first
        if len(inside):
            batches.append(batch.rows(inside))
        first += batch.size
    return compensated(program.learn(chosen), replace(context, batches=tuple(batches)))


class _Quantizers(nn.Module):
    """The quantizers of a block, learned where the plan has static ones that no earlier block uses.

    Args:
        walk: with the program and its facts.
        block: the block.
        plan: the format of every site.
    """

    def __init__(self, walk: _Walk, block: Block, plan: Mapping[str, Format]) -> None:
        super().__init__()
        self.walk, self.plan = walk, plan
        program = walk.program
        nodes = {node.name for node in block.nodes}
        self.bias_of = {layer.weight: layer.bias for layer in program.layers if layer.bias is not None}
        self.site_of = {node: site.key for site in program.activations for node in site.nodes}
        tables = {site.key for site in program.weights if site.kind == "embedding"}
        self.fixed = {
            key: weight_at(program, key, plan[key]) for key in block.weights if not plan[key].is_float
        }  # as they are
        self.weights: dict[str, LearnedWeight] = {}
        for key in block.weights:
            if plan[key].is_static and key in walk.start and key not in walk.done and key not in tables:
                quantizer = program.facts.get(key, Quantizers).by_format[plan[key]]
                weight = program.tensor(key).detach()
                scale = affine.along_channels(scale_of(quantizer).to(weight.device), weight)
                codes = walk.start[key].codes[plan[key]]
                self.weights[key] = LearnedWeight(weight, codes, scale, quantizer.low, quantizer.high)
        self.activations: dict[str, LearnedActivation] = {}
        for site in program.activations:
            if plan[site.key].is_static and site.key not in walk.done and nodes.intersection(site.nodes):
                quantizer = program.facts.get(site.key, Quantizers).by_format[plan[site.key]]
                zero = quantizer.zero_point
                # a rectifier with a ceiling is lowered as the end of the quantizer's range, which may not pass it
                ceiling = max(site.ceiling, quantizer.scale[0] * (quantizer.high - zero))
                self.activations[site.key] = LearnedActivation(
                    quantizer.scale[0], quantizer.low - zero, quantizer.high - zero, ceiling
                ).to(walk.context.device)
        self.biases = {
            layer.weight: LearnedBias(program.tensor(bias), unit) for layer, bias, unit in self._free_biases()
        }
        self.learned = nn.ModuleList([*self.weights.values(), *self.biases.values(), *self.activations.values()])

    def _free_biases(self) -> Iterator[tuple[Layer, str, Tensor]]:
        """Layers of the block whose bias can be learned with their weight, the bias, and the unit of its steps, (C,):
        about the error that half a code of every element leaves in the output."""
        program = self.walk.program
        weights, biases = (Counter(getattr(layer, part) for layer in program.layers) for part in ("weight", "bias"))
        for layer in program.layers:
            alone = layer.bias is not None and weights[layer.weight] == biases[layer.bias] == 1
            if layer.weight in self.weights and alone and self.plan[layer.input].is_static:
                assert layer.bias is not None
                read = program.facts.get(layer.input, Quantizers).by_format[self.plan[layer.input]]
                size = read.scale[0] * (read.high - read.low) / 4  # four standard deviations, nearly
                weight = self.weights[layer.weight]
                columns = weight.start[0].numel()
                scale = weight.scale.detach().flatten().expand(weight.start.shape[0])
                yield layer, layer.bias, scale * size * math.sqrt(columns)

    def tensors(self) -> dict[str, Tensor]:
        """The dequantized weights of the block."""
        biases = {self.bias_of[key]: bias() for key, bias in self.biases.items()}
        return self.fixed | {key: weight() for key, weight in self.weights.items()} | biases

    def quantize(self, node: str, value: Tensor) -> Tensor:
        """The hook that quantizes activations."""
        site = self.site_of[node]
        if self.plan[site].is_float:
            return value
        if site in self.activations:
            return self.activations[site](value)
        quantized = activation_at(self.walk.program, site, self.plan[site], value.detach())
        return value + (quantized - value).detach()  # the gradient passes straight through

    def facts(self) -> tuple[dict[str, Quantizers], dict[str, RoundedWeights]]:
        """The quantizers and codes as learned."""
        known = self.walk.program.facts
        quantizers: dict[str, Quantizers] = {}
        codes: dict[str, RoundedWeights] = {}
        scales: dict[str, Tensor] = {key: weight.scale for key, weight in self.weights.items()}
        scales |= {key: activation.scale for key, activation in self.activations.items()}
        for key, scale in scales.items():
            width, before = self.plan[key], known.get(key, Quantizers)
            numbers = tuple(scale.detach().reshape(-1).tolist())
            quantizer = replace(before.by_format[width], scale=numbers)
            quantizers[key] = Quantizers({**before.by_format, width: quantizer})
        for key, weight in self.weights.items():
            before_codes = known.get(key, RoundedWeights)
            learned = {**before_codes.codes, self.plan[key]: weight.codes.detach().to(torch.int8)}
            codes[key] = replace(before_codes, codes=learned)
            if key in self.biases:
                biases = {**before_codes.biases, self.plan[key]: self.biases[key]().detach()}
                codes[key] = replace(codes[key], biases=biases)
        return quantizers, codes


def _fitted(options: LearnedRounding, walk: _Walk, block: Block, number: int) -> _Walk:
    """The walk after a block, with its quantizers as they were or, where that leaves less error, learned."""
    plan = walk.program.formats()
    quantizers = _Quantizers(walk, block, plan)
    wanted = walk.run(block, walk.floats, None, {})
    found, program = None, walk.program
    if quantizers.weights:
        before = walk.run(block, walk.quantized, _before(walk, plan, quantizers), quantizers.tensors())
        _learn(options, walk, block, quantizers, wanted, number)
        after = walk.run(block, walk.quantized, quantizers.quantize, quantizers.tensors())
        rows = _rows(walk.judging, walk.unit)
        errors = [_error(wanted, values, wanted, rows) for values in (before, after)]
        log.info("%s: error on samples left out %.4g, learned %.4g", block.outputs[-1].name, *map(float, errors))
        if errors[1] < errors[0]:
            found = after
            for facts in quantizers.facts():
                program = program.learn(facts)
    if found is None:
        found = walk.run(block, walk.quantized, _before(walk, plan, quantizers), quantizers.fixed)
    later = _read_later(walk, block)
    return replace(
        walk,
        program=program,
        floats={node: value for node, value in (walk.floats | wanted).items() if node in later},
        quantized={node: value for node, value in (walk.quantized | found).items() if node in later},
        done=walk.done | set(block.weights) | set(quantizers.activations),
    )


def _before(walk: _Walk, plan: Mapping[str, Format], quantizers: _Quantizers) -> Hook:
    """The hook of the quantizers as they were."""

    def quantize(node: str, value: Tensor) -> Tensor:
        site = quantizers.site_of[node]
        return value if plan[site].is_float else activation_at(walk.program, site, plan[site], value)

    return quantize


def _read_later(walk: _Walk, block: Block) -> set[fx.Node]:
    """The nodes up to this block that nodes after it read."""
    order = {node: number for number, node in enumerate(walk.program.graph.graph.nodes)}
    end = order[block.nodes[-1]]
    return {node for node in order if any(order[user] > end for user in node.users)}


def _learn(
    options: LearnedRounding, walk: _Walk, block: Block, quantizers: _Quantizers, wanted: _Values, number: int
) -> None:
    """Adam on the quantizers of a block; the error is that of its outputs, each relative to its mean square."""
    codes = [weight.offset for weight in quantizers.weights.values()]
    codes += [bias.offset for bias in quantizers.biases.values()]
    scales = [part.log_scale for part in (*quantizers.weights.values(), *quantizers.activations.values())]
    optimizer = torch.optim.Adam([{"params": codes, "lr": options.rate}, {"params": scales, "lr": options.scale_rate}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    device = walk.context.device
    random = generator(walk.context.seed, "learned_rounding", number, device=device)
    order = generator(walk.context.seed, "learned_rounding", number, "order", device=torch.device("cpu"))
    size = min(_step_size(options.batch, block), len(walk.learning)) if walk.unit == 1 else 1

    def mixed(quantized: Tensor, exact: Tensor) -> Tensor:
        """The quantized tensor with some elements in float."""
        kept = torch.rand(exact.shape, generator=random, device=device) < options.drop
        return torch.where(kept, exact, quantized)

    def hook(node: str, value: Tensor) -> Tensor:
        return mixed(quantizers.quantize(node, value), value) if options.drop else quantizers.quantize(node, value)

    floats = {node: walk.floats[node] for node in block.inputs}
    inputs = {node: walk.quantized[node] for node in block.inputs}
    for _ in range(options.steps):
        rows = _rows(walk.learning[torch.randperm(len(walk.learning), generator=order)[:size]], walk.unit)
        known, exact = walk.part(inputs, rows), walk.part(floats, rows)
        if options.drop:
            known = {node: pytree.tree_map(mixed, value, exact[node]) for node, value in known.items()}
        found = walk.program.evaluate(block.outputs, walk.part(walk.inputs, rows) | known, hook, quantizers.tensors())
        optimizer.zero_grad()
        _error(walk.part(wanted, rows), found, wanted, None).backward()
        optimizer.step()
        schedule.step()


def _step_size(most: int, block: Block) -> int:
    """The samples of a step: fewer where tensors are large, whose many places show as much of a block."""
    shapes = [captured_shape(node) for node in block.nodes if isinstance(node.meta.get("val"), Tensor)]
    largest = max((math.prod(shape[1:]) for shape in shapes), default=1)
    return max(1, min(most, max(FEWEST, ELEMENTS // max(1, largest))))


def _error(wanted: _Values, found: _Values, whole: _Values, rows: Tensor | None) -> Tensor:
    """The mean squared error of the outputs of a block, of each relative to its mean square over all samples.

    Args:
        wanted: what the outputs should be.
        found: what they are.
        whole: what they should be for all samples.
        rows: the samples that count; None: all.
    """
    errors = []
    for node, exact in wanted.items():
        difference = found[node] - exact
        if rows is not None:
            difference = difference[rows]
        errors.append(difference.square().mean() / whole[node].square().mean().clamp_min(torch.finfo(exact.dtype).tiny))
    return torch.stack(errors).sum()
