"""The second moments of tables, by what errors of a row cost in all of its uses.

A row w_v of a table is looked up, y = w_v, and, where the table is the head too, multiplied, y_v = w_v . x.  With g the
gradient of the mean loss over c drawn targets by what a use gives, an error d of the row costs half of

    c E[(g . d)^2]  where it is looked up,      c E[g_v^2 (x . d)^2]  where it is multiplied,

the Gauss-Newton form of passes/gauss_newton.py.  Both grow with how frequent the word is, about alike.  So all rows
share one moment, the sums of c g g^T over what is looked up and of c |g|^2 x x^T over what is multiplied: what is
looked up weighs by the network after it, and the words that the network is sure of weigh little in the head.  Codes
are compensated by it as those of a layer are by the moment of its inputs.

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

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hawqfx.analysis.input_moments import InputMoments, Part, Sums, halves, looked_up, parts_of
from hawqfx.errors import LossError
from hawqfx.frontend.context import Context
from hawqfx.ir.operators import EMBEDDING, operands
from hawqfx.ir.program import Program
from hawqfx.maths import curvature, rounding
from hawqfx.maths.seeding import generator


def tables(program: Program) -> set[str]:
    """The weights whose rows are looked up, whether or not a layer multiplies by them too."""
    return looked_up(program) & {site.key for site in program.weights}


def table_moments(program: Program, context: Context, widths: Mapping[str, int]) -> dict[str, tuple[InputMoments, ...]]:
    """The moments of tables, block by block, in units of the loss.

    Args:
        program: the float network.
        context: the samples, which are measured one by one; targets are drawn.
        widths: table -> the most columns of a block.

    Raises:
        LossError: if a gradient is not finite.
    """
    uses = _Uses(program, widths)
    sums = {key: Sums(1, parts_of(1, program.tensor(key).shape[1], width)) for key, width in widths.items()}
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
                rows, share = part.reshape(-1, part.shape[-1]).double() * draws**0.5, samples / context.samples
                sums[key].add(half, share, partial(_total, rows))
    return {key: each.finished() for key, each in sums.items()}


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
        for node in program.graph.graph.find_nodes(op="get_attr"):
            if str(node.target) in keys:
                self.tables |= {user.name: str(node.target) for user in node.users if user.target is EMBEDDING}
        self.sources = {name: operands(nodes[name])[0].name for name in layers}
        self.at = {*self.tables, *self.sources.values()}
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
