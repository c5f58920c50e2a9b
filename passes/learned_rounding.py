"""The codes and scales of a plan, fitted block by block to the float network.

Rounding one weight at a time minimises the error of one layer's output.  What counts is the error after a block, from
inputs that are quantized already (Li et al., "BRECQ", ICLR 2021): a block's codes, the scales of its weights and those
of its activations are learned together by gradient, so that its outputs for quantized inputs are near those of the
float network.  The errors of earlier blocks are thereby corrected too.  Half of the elements of inputs and activations
stay in float in each step, drawn anew, so that few samples are not fitted at the cost of others (Wei et al., "QDrop",
ICLR 2022).

A quarter of the samples judge.  Learning begins with codes that the others alone give, and these are what a block must
beat on the samples that judge: codes that are made by all samples fit the judges too, and would win where they are
worse for everyone else.  A block that does not gain keeps the codes and scales that it had.  Codes stay whole numbers
all the time; those that come out are lowered and exported bit for bit.

Learning a block that gained once more, by all samples, was tried and brings nothing (ResNet-20, 128 images).
"""

import logging
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hawqfx.analysis.compensation import compensated
from hawqfx.errors import UsageError
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import ChosenFormat, Quantizers, RoundedWeights
from hawqfx.ir.graph import captured_shape
from hawqfx.ir.program import Program
from hawqfx.ir.sites import ActivationSite, WeightSite
from hawqfx.learning.blocks import Block, blocks
from hawqfx.learning.finished import FinishedBlocks
from hawqfx.learning.mean_error import corrected
from hawqfx.learning.quantizers import LearnedQuantizers
from hawqfx.learning.sequential import coded_anew
from hawqfx.learning.walk import Values, Walk
from hawqfx.maths.learned import chosen
from hawqfx.maths.seeding import generator
from hawqfx.pass_manager.base import Analysis, Kind, option
from hawqfx.sensitivity.cache import digest

log = logging.getLogger(__name__)

ELEMENTS, FEWEST = 1 << 21, 4  # of the largest tensor of a step, unless that are fewer samples than these


@dataclass(frozen=True)
class LearnedRounding(Analysis):
    """The codes and scales of a plan, fitted block by block to the float network."""

    steps: int = option(100, "steps of Adam for each block")
    rate: float = option(0.01, "the rate of codes, in codes per step, that falls to zero along half a cosine")
    scale_rate: float = option(0.001, "the rate of the logarithms of scales, likewise")
    batch: int = option(32, "the most samples of a step")
    drop: float = option(0.5, "the part of the elements of inputs and activations that stay in float in a step")
    held_out: float = option(0.25, "the part of the samples that only judge")
    needs: ClassVar[tuple[Kind, ...]] = (WeightSite, ActivationSite, Quantizers, RoundedWeights, ChosenFormat)
    gives: ClassVar[tuple[Kind, ...]] = (Quantizers, RoundedWeights)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not 0 < self.held_out < 1 or not 0 <= self.drop < 1:
            raise UsageError(f"{self}: steps and batch are 1 or more, held_out and drop are parts of one")

    def learn(self, program: Program, context: Context) -> Program:
        found = blocks(program)
        finished = self._finished(program, context)
        walk = Walk.begin(program, context, self.held_out, _rounded_anew)
        for block in context.track(found, self.name, len(found)):
            walk = self._through(walk, block, finished)
        return walk.program

    def _finished(self, program: Program, context: Context) -> FinishedBlocks | None:
        """The blocks that an earlier run of the same plan, data and options finished."""
        if context.cache is None:
            return None
        parts: list[object] = [repr(self), str(program.graph.graph), program.constants(), context.seed]
        parts += [context.device.type, [batch.tensors for batch in context.batches]]
        for site in program.sites:
            width = program.formats()[site.key]
            parts += [site.key, str(width), repr(program.facts.get(site.key, Quantizers).by_format.get(width))]
            if isinstance(site, WeightSite):
                parts.append(program.facts.get(site.key, RoundedWeights).codes.get(width))
        return FinishedBlocks(context.cache / f"learned-{digest(parts)}")

    def _through(self, walk: Walk, block: Block, finished: FinishedBlocks | None) -> Walk:
        """The walk after a block, with its quantizers as they were or, where that leaves less error, learned."""
        quantizers = LearnedQuantizers(walk, block)
        wanted = walk.run(block, walk.floats, None, {})
        sites = quantizers.sites | set(block.weights)
        learned = self._learned(walk, block, quantizers, wanted, finished) if quantizers.weights and wanted else []
        if learned:
            quantizers.set(learned)
            found = walk.run(block, walk.quantized, quantizers.quantize, quantizers.tensors())
            return walk.after(block, quantizers.learned(), wanted, found, sites)
        planned = quantizers.planned
        found = walk.run(block, walk.quantized, planned.quantize, planned.tensors())
        return walk.after(block, walk.program, wanted, found, sites)

    def _learned(
        self, walk: Walk, block: Block, quantizers: LearnedQuantizers, wanted: Values, finished: FinishedBlocks | None
    ) -> list[Tensor]:
        """What the block learned, now or in an earlier run; nothing, where that did not gain."""
        known = None if finished is None else finished.get(walk.number)
        if known is not None:
            return known
        learned = self._gained(walk, block, quantizers, wanted)
        if finished is not None:
            finished.put(walk.number, learned)
        return learned

    def _gained(self, walk: Walk, block: Block, quantizers: LearnedQuantizers, wanted: Values) -> list[Tensor]:
        """What the block learns; nothing, if that leaves no less error on the samples that judge."""
        before = walk.run(block, walk.quantized, quantizers.planned.quantize, quantizers.tensors())
        self._fit(walk, block, quantizers, wanted)
        after = walk.run(block, walk.quantized, quantizers.quantize, quantizers.tensors())
        errors = [float(_error(wanted, values, wanted, walk.judges)) for values in (before, after)]
        log.info("%s: error on samples left out %.4g, learned %.4g", block.outputs[-1].name, *errors)
        return quantizers.state() if errors[1] < errors[0] else []

    def _fit(self, walk: Walk, block: Block, quantizers: LearnedQuantizers, wanted: Values) -> None:
        """Adam on the quantizers of a block; the error is that of its outputs, each relative to its mean square."""
        optimizer = torch.optim.Adam(
            [{"params": quantizers.offsets, "lr": self.rate}, {"params": quantizers.scales, "lr": self.scale_rate}]
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        device, seed = walk.context.device, walk.context.seed
        random = generator(seed, "learned_rounding", walk.number, device=device)
        order = generator(seed, "learned_rounding", walk.number, "order", device=torch.device("cpu"))

        def mixed(quantized: Tensor, exact: Tensor) -> Tensor:
            """The quantized tensor with some elements in float."""
            return torch.where(chosen(exact.shape, self.drop, random), exact, quantized) if self.drop else quantized

        def hook(node: str, value: Tensor) -> Tensor:
            return mixed(quantizers.quantize(node, value), value)

        floats = {node: walk.floats[node] for node in block.inputs}
        inputs = {node: walk.quantized[node] for node in block.inputs}
        size = _step_size(self.batch, block)
        for _ in range(self.steps):
            rows = walk.draw(size, order)
            known, exact = walk.part(inputs, rows), walk.part(floats, rows)
            known = {node: pytree.tree_map(mixed, value, exact[node]) for node, value in known.items()}
            known |= walk.part(walk.inputs, rows)
            found = walk.evaluate(block, known, hook, quantizers.tensors())
            optimizer.zero_grad()
            _error(walk.part(wanted, rows), found, wanted, None).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def _rounded_anew(program: Program, context: Context) -> Program:
    """The program with codes of its plan's formats that these samples give, made in the way that its own were."""
    formats, chosen = program.formats(), {}
    for site in program.weights:
        known = program.facts.get(site.key, Quantizers).by_format
        chosen[site.key] = Quantizers({width: known[width] for width in known if width == formats[site.key]})
    own = [program.facts.get(site.key, RoundedWeights) for site in program.weights]
    biases = any(each.biases for each in own)
    anew = program.learn(chosen)
    anew = anew.learn(compensated(anew, context))
    if any(each.compensation is not None and each.compensation.sequential for each in own):
        return coded_anew(anew, context, "learned_rounding", biases=biases)
    return anew.learn(corrected(anew, context, "learned_rounding")) if biases else anew


def _step_size(most: int, block: Block) -> int:
    """The samples of a step: fewer where tensors are large, whose many places show as much of a block."""
    shapes = [captured_shape(node) for node in block.nodes if isinstance(node.meta.get("val"), Tensor)]
    largest = max((math.prod(shape[1:]) for shape in shapes), default=1)
    return max(1, min(most, max(FEWEST, ELEMENTS // max(1, largest))))


def _error(wanted: Values, found: Values, whole: Values, rows: Tensor | None) -> Tensor:
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
