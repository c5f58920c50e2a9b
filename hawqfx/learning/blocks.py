"""The blocks of a network, found from the graph: what can be fitted by itself, one after another.

A node through which all paths from the quantized inputs to the output go parts a network in two: a dominator of the
output (Lengauer, Tarjan 1979).  Between two of them lie a residual block, an inverted residual block, an attention or
an MLP, whatever they are called.  Single layers in a row are joined, and parts without such nodes inside, such as a
feature pyramid, are cut in the order of the graph, so that a block holds few weights.  What goes from a block to the
next has a row for each sample: steps take some of the samples, and tensors that part otherwise, such as tokens of all
samples in a row, lie within a block.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from hawqfx.ir.graph import batch_size, captured_size, dependents
from hawqfx.ir.program import Program

FEW, MOST = 2, 6  # weights of a block: fewer are joined with the next ones, more are cut


@dataclass(frozen=True)
class Block:
    """A part of the graph.

    Args:
        nodes: the nodes whose tensors quantization changes, in the order of the graph.
        weights: keys of the weights that they read.
        outputs: those of them that later blocks or the output read, and that have a row for each sample.
        inputs: nodes of earlier blocks that they read.
    """

    nodes: tuple[fx.Node, ...]
    weights: tuple[str, ...]
    outputs: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]


def blocks(program: Program) -> list[Block]:
    """The blocks of a network, in the order of the graph; they hold every node whose tensor the sites change."""
    graph = program.graph.graph
    keys, makers = {site.key for site in program.weights}, {node for s in program.activations for node in s.nodes}
    roots = {node for node in graph.nodes if node.name in makers or (node.op == "get_attr" and node.target in keys)}
    found = dependents(graph, roots)
    changed = [node for node in graph.nodes if node in found and _is_tensor(node)]
    reads = {node: _weights(node, keys) for node in changed}
    parts: list[list[fx.Node]] = []
    ends = _ends(changed, program.dynamic_batch)
    for part in _between(changed, _cuts(graph, changed) & ends):
        pieces = _cut_in_order(part, reads, ends) if _count(part, reads) > MOST else [part]
        for piece in pieces:
            if parts and _joins(_count(parts[-1], reads), _count(piece, reads)):
                parts[-1] += piece
            else:
                parts.append(list(piece))
    return [_block(part, reads, set(changed), program.dynamic_batch) for part in parts]


def _is_tensor(node: fx.Node) -> bool:
    """Whether a node makes tensors; sizes are numbers, and are computed from any batch."""
    if node.op in ("get_attr", "output"):
        return False
    return not isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool | int | float)


def _weights(node: fx.Node, keys: set[str]) -> list[str]:
    return [str(source.target) for source in node.all_input_nodes if source.op == "get_attr" and source.target in keys]


def _count(part: Sequence[fx.Node], reads: dict[fx.Node, list[str]]) -> int:
    return len({key for node in part for key in reads[node]})


def _joins(before: int, weights: int) -> bool:
    """Whether a part is joined to the block before it: where either has no weights, and single layers to few."""
    return before == 0 or weights == 0 or (weights == 1 and before < FEW)


def _cuts(graph: fx.Graph, changed: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes through which all paths to the output go."""
    import networkx  # `hawqfx.compile` loads without it

    paths: networkx.DiGraph[Any] = networkx.DiGraph()
    among = set(changed)
    for node in changed:
        sources: list[Any] = [source for source in node.all_input_nodes if source in among]
        paths.add_edges_from((source, node) for source in (sources or ["start"]))
    (output,) = graph.find_nodes(op="output")
    paths.add_edges_from((source, "end") for source in output.all_input_nodes if source in among)
    above = networkx.immediate_dominators(paths, "start")
    cuts, node = set(), above["end"]
    while node != "start":
        cuts.add(node)
        node = above[node]
    return cuts


def _between(changed: Sequence[fx.Node], cuts: set[fx.Node]) -> list[list[fx.Node]]:
    """The nodes after one cut up to and with the next."""
    ends = [0, *(number + 1 for number, node in enumerate(changed) if node in cuts), len(changed)]
    return [list(changed[start:stop]) for start, stop in pairwise(ends) if stop > start]


def _ends(changed: Sequence[fx.Node], dynamic_batch: bool) -> set[fx.Node]:
    """The nodes after which a block may end: all that is read later has a row for each sample."""
    last = {source: node for node in changed for source in node.all_input_nodes}
    ends: set[fx.Node] = set()
    across: set[fx.Node] = set()  # what is read later, and has no such rows
    for node in changed:
        across.difference_update([source for source in node.all_input_nodes if last[source] is node])
        if node in last and not _has_rows(node, dynamic_batch):
            across.add(node)
        if not across:
            ends.add(node)
    return ends


def _has_rows(node: fx.Node, dynamic_batch: bool) -> bool:
    """Whether dimension 0 of what a node makes is the batch."""
    samples = batch_size(node.graph)
    sizes = [value.shape[:1] for value in pytree.tree_leaves(node.meta["val"]) if isinstance(value, torch.Tensor)]
    return all(
        size and captured_size(size[0]) == samples and isinstance(size[0], torch.SymInt) == dynamic_batch
        for size in sizes
    )


def _cut_in_order(
    part: list[fx.Node], reads: dict[fx.Node, list[str]], ends: Collection[fx.Node]
) -> list[list[fx.Node]]:
    """A part in pieces of FEW weights, each up to the last end before the next weight is read, if there is one."""
    pieces: list[list[fx.Node]] = [[]]
    end = 0
    for node in part:
        if reads[node] and end and _count(pieces[-1], reads) >= FEW:
            pieces[-1:] = [pieces[-1][:end], pieces[-1][end:]]
        if reads[node]:
            end = 0
        pieces[-1].append(node)
        if node in ends:
            end = len(pieces[-1])
    return pieces


def _block(
    part: Sequence[fx.Node], reads: dict[fx.Node, list[str]], changed: set[fx.Node], dynamic_batch: bool
) -> Block:
    inside = set(part)
    outputs = [
        node
        for node in part
        if any(user not in inside and _counts(user, changed) for user in node.users) and _has_rows(node, dynamic_batch)
    ]
    inputs = dict.fromkeys(
        source for node in part for source in node.all_input_nodes if source in changed and source not in inside
    )
    return Block(
        tuple(part), tuple(dict.fromkeys(key for node in part for key in reads[node])), tuple(outputs), tuple(inputs)
    )


def _counts(user: fx.Node, changed: set[fx.Node]) -> bool:
    return user.op == "output" or user in changed
