"""What is in memory at once, on graphs small enough to count by hand.  Images are 1 x 8 x 8."""

import torch
from torch import Tensor, nn

from hawqfx.analysis.liveness import live
from hawqfx.ir.program import Program
from hawqfx.pass_manager.manager import run
from tests.nets import Plain, Residual
from tests.tools import after, captured, context


def largest(program: Program, width: int) -> int:
    """Bytes at the peak, every site at a width of whole bytes."""
    return max(step.fixed + sum(map(sum, step.elements.values())) * width // 8 for step in live(program))


def test_a_chain_holds_what_goes_in_and_what_comes_out() -> None:
    program = after("find_sites", Plain)
    elements = {node.name: node.meta["val"][0].numel() for node in program.graph.graph.nodes if "val" in node.meta}
    sites = {site.key: elements[site.key] for site in program.activations}
    x, first, second, *_ = sites
    steps = live(program)
    # the convolution's own output and its rectifier's are one storage
    assert {first, x} <= steps[0].elements.keys()
    assert steps[0].elements == {x: (sites[x],), first: (sites[first],)}
    assert any(step.elements == {first: (sites[first],), second: (sites[second],)} for step in steps)


def test_a_skip_keeps_its_tensor_alive() -> None:
    program = after("find_sites", Residual)
    stem, inner = (layer.node for layer in program.layers[:2])
    at_the_addition = max(live(program), key=lambda step: sum(map(sum, step.elements.values())))
    # the skip, the branch and the sum: 4 channels each
    (side,) = {site.shape[-1] for site in program.activations if len(site.shape) == 3}
    assert sum(map(sum, at_the_addition.elements.values())) == 3 * 4 * side * side
    assert {stem, inner}


class Views(nn.Module):
    """A reshape and a permutation between two layers, and a part in float that is twice as large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)[:, :64].reshape(-1, 8, 8))
        x = x.permute(0, 2, 1)
        return self.last(torch.cat([torch.tanh(x), torch.sin(x)], 1).mean(1))


def test_views_take_no_memory_and_float_parts_do_not_shrink() -> None:
    program = after("find_sites", Views)
    inside = [site for site in program.activations if site.key != "x"]
    assert inside
    # both halves and what they are concatenated to: 64 + 64 + 128 elements of float32
    assert max(step.fixed for step in live(program)) >= 4 * (64 + 64 + 128)
    assert largest(program, 8) >= 4 * (64 + 64 + 128)


class Normalised(nn.Module):
    """A tensor in float that a layer reads as integers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.reshape(-1, 8, 8))
        return torch.tanh(self.last(x)) + x


def test_a_quantized_copy_takes_memory_beside_the_float_tensor() -> None:
    program = after("find_sites", Normalised)
    (copy,) = program.activations
    (together,) = (step for step in live(program) if copy.key in step.elements)
    # the normalised tensor and what the layer makes of it, in float, and the copy
    assert (together.fixed, together.elements) == (4 * (64 + 64), {copy.key: (64,)})


def test_no_step_is_within_another() -> None:
    steps = live(after("find_sites", Residual))
    assert len(steps) == len({(step.fixed, tuple(step.elements.items())) for step in steps})
    assert run([], captured(Residual), context()).sites == ()
