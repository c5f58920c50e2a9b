"""How far the blocks of a network are fitted: what goes into the next one, in float and quantized so far."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from hawqfx.frontend.context import Context
from hawqfx.ir.program import Hook, Program
from hawqfx.learning.blocks import Block
from hawqfx.maths.seeding import generator
from hawqfx.sensitivity.batching import largest_bytes, with_room

Values = dict[fx.Node, Any]

_KEPT = 6  # tensors of all samples at the ends of a block: in float and quantized, before it and after it, and learned
_TOGETHER = 32  # samples that are run at once where nothing is learned


@dataclass(frozen=True, eq=False)
class Walk:
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
        start: the program with codes, scales and biases by the samples that are fitted; None if there are none.
        done: keys of the sites whose quantizers are final.
        number: of the next block.
    """

    program: Program
    context: Context
    inputs: Values
    floats: Values
    quantized: Values
    unit: int
    learning: Tensor
    judging: Tensor
    start: Program | None
    done: frozenset[str] = frozenset()
    number: int = 0

    @staticmethod
    def begin(
        program: Program, context: Context, held_out: float, anew: Callable[[Program, Context], Program]
    ) -> "Walk":
        """Before the first block.

        Args:
            program: with a plan.
            context: the samples; as many as fit into memory are taken.
            held_out: the part of them that judges.
            anew: rounds a program anew by the samples of a context.
        """
        context = with_room(program, context, _KEPT * largest_bytes(program), "codes are learned from")
        batches = [program.flat_inputs(batch.args, batch.kwargs) for batch in context.batches]
        columns = zip(*batches, strict=True)
        values = [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
        inputs = dict(zip(program.graph.graph.find_nodes(op="placeholder"), values, strict=True))
        unit = 1 if program.dynamic_batch else context.batches[0].size
        units = context.samples // unit
        order = torch.randperm(units, generator=generator(context.seed, "judging", device=torch.device("cpu")))
        judges = max(1, round(units * held_out))
        learning, judging = order[judges:], order[:judges]
        start = anew(program, _of(context, _rows(learning, unit))) if len(learning) else None
        return Walk(program, context, inputs, {}, {}, unit, learning, judging, start)

    @property
    def samples(self) -> int:
        return self.context.samples

    @property
    def judges(self) -> Tensor:
        """The numbers of the samples that judge."""
        return _rows(self.judging, self.unit)

    def draw(self, most: int, random: torch.Generator) -> Tensor:
        """The numbers of at most `most` samples that are fitted, or of one fixed batch."""
        size = most if self.unit == 1 else 1
        return _rows(self.learning[torch.randperm(len(self.learning), generator=random)[:size]], self.unit)

    def part(self, values: Values, rows: Tensor) -> Values:
        """The values of some samples; what has no sample axis stays whole."""
        return {
            node: value[rows] if isinstance(value, Tensor) and value.shape[:1] == (self.samples,) else value
            for node, value in values.items()
        }

    @torch.no_grad()
    def run(self, block: Block, known: Values, hook: Hook | None, tensors: Mapping[str, Tensor]) -> Values:
        """The outputs of a block for all samples.

        Args:
            block: the block.
            known: the values of its inputs.
            hook: sees its activations, see Program.run.
            tensors: stand in for its weights.
        """
        parts: list[Values] = []
        for rows in torch.arange(self.samples).split(_TOGETHER if self.unit == 1 else self.unit):
            parts.append(self.evaluate(block, self.part(self.inputs | known, rows), hook, tensors))
        return {node: torch.cat([part[node] for part in parts]) for node in block.outputs}

    def evaluate(self, block: Block, known: Values, hook: Hook | None, tensors: Mapping[str, Tensor]) -> Values:
        """The outputs of a block for some samples; as `run`, with the inputs of the network among the known values."""
        if hook is not None:  # an input of the network that is quantized is a node of the block that reads it first
            sites = {name for site in self.program.activations for name in site.nodes}
            own = [node for node in block.nodes if node.op == "placeholder" and node.name in sites]
            known = known | {node: hook(node.name, known[node]) for node in own}
        return self.program.evaluate(block.outputs, known, hook, tensors)

    def after(self, block: Block, program: Program, floats: Values, quantized: Values, sites: set[str]) -> "Walk":
        """The walk after a block.

        Args:
            block: the block.
            program: with the facts of the block.
            floats: the outputs of the block in the float network.
            quantized: likewise in the quantized one.
            sites: keys of the block's sites, which no later block changes.
        """
        order = {node: number for number, node in enumerate(program.graph.graph.nodes)}
        end = order[block.nodes[-1]]
        later = {node for node in order if any(order[user] > end for user in node.users)}
        return replace(
            self,
            program=program,
            floats={node: value for node, value in (self.floats | floats).items() if node in later},
            quantized={node: value for node, value in (self.quantized | quantized).items() if node in later},
            done=self.done | sites,
            number=self.number + 1,
        )


def _rows(units: Tensor, unit: int) -> Tensor:
    """The numbers of the samples of some units."""
    return (units[:, None] * unit + torch.arange(unit)).reshape(-1)


def _of(context: Context, rows: Tensor) -> Context:
    """The context with some of its samples, batch by batch."""
    batches, first = [], 0
    for batch in context.batches:
        inside = rows[(rows >= first) & (rows < first + batch.size)].sort().values - first
        if len(inside):
            batches.append(batch.rows(inside))
        first += batch.size
    return replace(context, batches=tuple(batches))
