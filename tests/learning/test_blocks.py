"""Blocks of a network: cuts by brute force, all nodes once, and values that follow from one block to the next."""

from collections.abc import Callable

import networkx
import pytest
import torch
from torch import nn

from hawqfx.ir.program import Program
from hawqfx.learning.blocks import MOST, blocks
from tests.nets import Attention, Concat, ConcatInput, Plain, Residual, SharedLayer, TiedWeights, TokenMlp
from tests.tools import after, context

NETWORKS = [Plain, Residual, SharedLayer, TiedWeights, Concat, ConcatInput, Attention, TokenMlp]


class Deep(nn.Module):
    """Residual blocks of two and of three layers, and a stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)
        self.two = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.three = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        for layers in (self.two, self.three):
            y = x
            for layer in layers:
                y = torch.relu(layer(y))
            x = torch.relu(x + y)
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """Every layer reads all tensors before it: no node parts the network."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(1 + 2 * k, 2, 3, padding=1) for k in range(MOST + 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        every = [x]
        for layer in self.layers:
            every.append(torch.relu(layer(torch.cat(every, 1))))
        return torch.cat(every, 1).mean((2, 3))


def program_of(make: Callable[[], nn.Module]) -> Program:
    return after("find_sites", make)


def test_residual_blocks_are_blocks() -> None:
    found = blocks(program_of(Deep))
    assert [block.weights for block in found] == [
        ("stem.weight",),
        ("two.0.weight", "two.1.weight"),
        ("three.0.weight", "three.1.weight", "three.2.weight"),
        ("head.weight",),
    ]
    assert [len(block.outputs) for block in found] == [1, 1, 1, 1]


def test_a_part_without_cuts_is_cut_in_the_order_of_the_graph() -> None:
    found = blocks(program_of(Dense))
    assert [len(block.weights) for block in found] == [2, 2, 2, 2]
    assert sum(len(block.outputs) for block in found) > len(found)


@pytest.mark.parametrize("make", [*NETWORKS, Deep])
def test_single_outputs_part_the_network(make: Callable[[], nn.Module]) -> None:
    """Without the output of any block, the network's output cannot be reached from its input."""
    program = program_of(make)
    graph = program.graph.graph
    (source,), (output,) = graph.find_nodes(op="placeholder"), graph.find_nodes(op="output")
    paths = networkx.DiGraph((before, node) for node in graph.nodes for before in node.all_input_nodes)
    assert networkx.has_path(paths, source, output)
    for block in blocks(program):
        (cut,) = block.outputs
        assert not networkx.has_path(networkx.restricted_view(paths, [cut], []), source, output)


@pytest.mark.parametrize("make", [*NETWORKS, Deep, Dense])
def test_what_blocks_pass_on_has_a_row_for_each_sample(make: Callable[[], nn.Module]) -> None:
    program, (batch, *_) = program_of(make), context().batches
    _, values = program.values(batch.args, {})
    found = blocks(program)
    assert [tuple(values[node].shape[:1]) for block in found for node in block.outputs] == [(batch.size,)] * sum(
        len(block.outputs) for block in found
    )


@pytest.mark.parametrize("make", [*NETWORKS, Deep, Dense])
def test_blocks_hold_every_weight_and_pass_values_on(make: Callable[[], nn.Module]) -> None:
    """From block to block, in float: the same output as the whole network, bit for bit."""
    program = program_of(make)
    found = blocks(program)
    assert {key for block in found for key in block.weights} == {site.key for site in program.weights}
    nodes = [node for block in found for node in block.nodes]
    assert len(nodes) == len(set(nodes))
    (batch, *_) = context().batches
    inputs = dict(
        zip(program.graph.graph.find_nodes(op="placeholder"), program.flat_inputs(batch.args, {}), strict=True)
    )
    known = dict(inputs)
    for block in found:
        assert set(block.inputs) <= set(known)
        known |= program.evaluate(block.outputs, inputs | {node: known[node] for node in block.inputs})
    (output,) = program.graph.graph.find_nodes(op="output")
    (answer,) = output.all_input_nodes
    assert torch.equal(program.evaluate([answer], known)[answer], program.run(batch.args, {}))
