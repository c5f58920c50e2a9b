"""Runs of a program in which some values are known."""

import torch

from hawqfx.frontend.capture import capture
from hawqfx.frontend.data import Batch
from tests.nets import KeywordInputs, build


def test_inputs_beside_a_known_one_keep_their_places() -> None:
    """The measured metric changes one input and knows the others."""
    model, inputs = build(KeywordInputs), {"first": torch.randn(3, 5), "second": torch.randn(3, 6)}
    program = capture(model, Batch((), inputs))
    nodes = program.graph.graph.find_nodes(op="placeholder")
    for node in nodes:
        known = {node: inputs[str(node.target)] + 1}
        shifted = {name: value + (name == node.target) for name, value in inputs.items()}
        assert torch.equal(program.run((), inputs, known=known)["logits"], program.run((), shifted)["logits"])
