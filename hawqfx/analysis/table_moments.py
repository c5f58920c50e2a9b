"""The second moments of tables, by what errors of a row cost in all of its uses.

A row w_v of a table is looked up, y = w_v, and, where the table is the head too, multiplied, y_v = w_v . x.  With g the
gradient of the mean loss over c drawn targets by what a use gives, an error d of the row costs half of

    c E[(g . d)^2]  where it is looked up,      c E[g_v^2 (x . d)^2]  where it is multiplied,

the Gauss-Newton form of passes/gauss_newton.py.  Both grow with how frequent the word is, about alike, by which the
bits of rows are chosen (hawqfx/maths/row_widths.py).  Beside that, all rows share one moment, the sums of c g g^T over
what is looked up and of c |g|^2 x x^T over what is multiplied: what is looked up weighs by the network after it, and
the words that the network is sure of weigh little in the head.  Codes are compensated by it as those of a layer are by
the moment of its inputs.

Of tables that are heads, the rest in float, the divergence from the float network on other texts, in nats, with the
moment of the head's inputs, with a tenth of the identity beside it, and with this one and a damping of a tenth; scales
are those of calibration:

| table | inputs | and the identity | both uses |
| --- | --- | --- | --- |
| Whisper tiny.en, 4 bits, a scale for each row | .027 | .035 | .013 |
| the same, 3 bits | .103 | .052 | .052 |
| SmolLM2-135M, 4 bits in blocks of 128 | .159 | .132 | .111 |
| the same, 3 bits in blocks of 32 | .320 | .285 | .244 |
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx

from hawqfx.analysis.input_moments import InputMoments, Part, Sums, halves, looked_up, parts_of
from hawqfx.errors import LossError
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import Quantizers
from hawqfx.ir.operators import EMBEDDING, is_data_movement, operands
from hawqfx.ir.program import Program
from hawqfx.maths import curvature, rounding
from hawqfx.maths.seeding import generator


def tables(program: Program) -> set[str]:
    """The weights whose rows are looked up, whether or not a layer multiplies by them too."""
    return looked_up(program) & {site.key for site in program.weights}


@dataclass(frozen=True, eq=False)
class TableMoments:
    """What errors of a table cost.

    Args:
        parts: the moments that all rows share, block by block of columns, in units of the loss.
        rows: (2, V) float64, what a squared error of each row costs, in units of their mean, over each half of the
            samples; (1, V) for a single sample; None for a table without static formats, and if what is looked up does
            not come from the network's inputs, but from places in a sequence, say: of those that no sample reaches,
            nothing is known.
    """

    parts: tuple[InputMoments, ...]
    rows: Tensor | None


def table_moments(program: Program, context: Context, widths: Mapping[str, int]) -> dict[str, TableMoments]:
    """The moments of tables, and what their rows cost.

    Args:
        program: the float network.
        context: the samples, which are measured one by one; targets are drawn.
        widths: table -> the most columns of a block.

    Raises:
        LossError: if a gradient is not finite.
    """
    uses = _Uses(program, widths)
    sums = {key: Sums(1, parts_of(1, program.tensor(key).shape[1], width)) for key, width in widths.items()}
    rows: dict[str, dict[int, Tensor]] = {key: {} for key in widths}
    if program.dynamic_batch:  # the graph of a sample takes many times the memory of its output
        context = replace(context, batches=tuple(sample for batch in context.batches for sample in batch.split(1)))
    for index, batch in enumerate(context.track(context.batches, "tables", len(context.batches))):
        random = generator(context.seed, "tables", index, device=context.device)
        with torch.enable_grad():
            output = program.run(batch.args, batch.kwargs, uses.record, uses.weights, at=uses.at)
            target = context.drawn(output, random, batch.target)
            gradients = curvature.gradient(context.loss_at(output, target, index), uses.given, again=False)
        draws = context.draws(target, index)
        for key, vectors in uses.vectors(gradients):
            if not torch.isfinite(vectors).all():
                raise LossError(f"the gradient at {key!r} is not finite on batch {index}: the loss overflows there")
            for half, part, samples in halves(vectors, batch.size, index):
                vector, share = part.reshape(-1, part.shape[-1]).double() * draws**0.5, samples / context.samples
                sums[key].add(half, share, partial(_total, vector))
        for key, half, costs in uses.costs(gradients, batch.size, index):
            rows[key][half] = rows[key].get(half, 0.0) + costs * draws
    return {
        key: TableMoments(each.finished(), _of_mean(rows[key]) if key in uses.of_inputs else None)
        for key, each in sums.items()
    }


def _of_mean(halves: Mapping[int, Tensor]) -> Tensor:
    """(halves, V), each in units of its mean."""
    costs = torch.stack([halves[half] for half in sorted(halves)])
    return costs / costs.mean(1, keepdim=True).clamp_min(torch.finfo(costs.dtype).tiny)


def _total(rows: Tensor, part: Part) -> Tensor:
    """The sum of x x^T over rows, (blocks, K, K)."""
    return rounding.second_moment(part.of(rows[None, :, part.columns])) * len(rows)


class _Uses:
    """What is looked up in tables and multiplied by them, in a forward pass that can be differentiated by it.

    Args:
        program: the float network.
        keys: of the tables.
    """

    def __init__(self, program: Program, keys: Mapping[str, int]) -> None:
        nodes = {node.name: node for node in program.graph.graph.nodes}
        self.weights = {site.key: program.tensor(site.key).detach() for site in program.weights}
        layers = {layer.node: layer.weight for layer in program.layers if layer.weight in keys}
        self.tables: dict[str, str] = dict(layers)  # node -> the table that it reads
        self.indices: dict[str, str] = {}  # node that looks up -> the one that makes the numbers of rows
        # the tables with static formats, in which inputs of the network look up
        self.of_inputs = {
            key for key in keys if any(width.is_static for width in program.facts.get(key, Quantizers).by_format)
        }
        self.rows = {key: program.tensor(key).shape[0] for key in keys}
        for node in program.graph.graph.find_nodes(op="get_attr"):
            if str(node.target) in keys:
                for user in node.users:
                    if user.target is EMBEDDING:
                        self.tables[user.name], numbers = str(node.target), operands(user)[1]
                        self.indices[user.name] = numbers.name
                        if not _is_input(numbers):
                            self.of_inputs.discard(str(node.target))
        self.sources = {name: operands(nodes[name])[0].name for name in layers}
        self.at = {*self.tables, *self.sources.values(), *self.indices.values()}
        self.values: dict[str, Tensor] = {}

    def record(self, name: str, value: Tensor) -> Tensor:
        if name in self.tables and not value.requires_grad:
            value = value.detach().requires_grad_()
        self.values[name] = value
        return value

    @property
    def given(self) -> list[Tensor]:
        """What the uses give, in the order of `tables`."""
        return [self.values[name] for name in self.tables]

    def vectors(self, gradients: tuple[Tensor, ...]) -> list[tuple[str, Tensor]]:
        """Table and (..., K), the vectors whose products with the error of a row cost their squares, use by use."""
        found = []
        for (name, key), gradient in zip(self.tables.items(), gradients, strict=True):
            if name in self.sources:
                source = self.values[self.sources[name]].detach()
                found.append((key, source * torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)))
            else:
                found.append((key, gradient))
        return found

    def costs(self, gradients: tuple[Tensor, ...], size: int, index: int) -> Iterator[tuple[str, int, Tensor]]:
        """Table, half of the samples, and (V,) what squared errors of its rows cost, use by use.

        Args:
            gradients: by what is given.
            size: samples of the batch.
            index: its number.
        """
        for (name, key), gradient in zip(self.tables.items(), gradients, strict=True):
            if key not in self.of_inputs:
                continue
            if name in self.sources:
                source = self.values[self.sources[name]].detach().double().square().sum(-1)
                pairs = zip(halves(gradient, size, index), halves(source, size, index), strict=True)
                for (half, part, _), (_, squares, _) in pairs:
                    yield key, half, squares.flatten() @ part.double().square().flatten(0, -2)
                continue
            numbers, slopes = self.values[self.indices[name]], gradient.double().square().sum(-1)
            for (half, rows, _), (_, part, _) in zip(
                halves(numbers, size, index), halves(slopes, size, index), strict=True
            ):
                found = part.new_zeros(self.rows[key])
                yield key, half, found.index_add_(0, rows.flatten(), part.flatten())


def _is_input(numbers: fx.Node) -> bool:
    """Whether these are numbers that the network is given."""
    while is_data_movement(numbers) and isinstance(source := numbers.args[0], fx.Node):
        numbers = source
    return numbers.op == "placeholder"
