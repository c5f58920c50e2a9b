"""Divide the channels of linear layers' inputs by the powers of two that Smoothing found, and multiply the weights.

A layer-norm, or a product with a constant such as that of an RMS-norm, that nothing but these layers reads takes the
factors into its own constants; else a product with them stands before the layers, in float, where the tensor is.
Powers of two change no value.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from hawqfx.analysis.linear_inputs import linear_readers
from hawqfx.errors import PlanError
from hawqfx.ir.facts import InputExponents
from hawqfx.ir.names import SCALED
from hawqfx.ir.operators import COPY, is_constant, operands, value_readers
from hawqfx.ir.program import Program
from hawqfx.ir.rewriter import GraphRewriter
from hawqfx.pass_manager.base import Kind, Rewrite

_aten = torch.ops.aten


@dataclass(frozen=True)
class SmoothInputs(Rewrite):
    """Divides the channels of linear layers' inputs by powers of two, and multiplies the weights by them."""

    # the same to the bit in the same order of sums, which may be another where the weight lies elsewhere in memory
    tolerance: ClassVar[float] = 1e-4
    needs: ClassVar[tuple[Kind, ...]] = (InputExponents,)

    def rewrite(self, program: Program) -> Program:
        exponents = program.about(InputExponents).exponents
        if not exponents:
            return program
        rewriter = GraphRewriter(program)
        nodes = {node.name: node for node in rewriter.graph.nodes}
        for name, powers in exponents.items():
            node = nodes.get(name)
            layers = linear_readers(node) if node is not None else []
            if node is None or not layers or max(powers) >= node.meta["val"].shape[-1]:
                raise PlanError(
                    f"the plan is for another model: it divides {max(powers) + 1} channels or more of {name!r}, which "
                    "linear layers alone do not read here"
                )
            scale = torch.ones(node.meta["val"].shape[-1])
            scale[list(powers)] = torch.tensor([2.0**power for power in powers.values()])
            weights = [operands(layer)[1] for layer in layers]
            for constant in dict.fromkeys(weights):
                _multiply(rewriter, constant, scale)
            taking = _taking(node)
            for constant in taking:
                _multiply(rewriter, constant, 1 / scale)
            if not taking:
                _divide(rewriter, node, weights[0], 1 / scale)
        return rewriter.done()


def _taking(node: fx.Node) -> list[fx.Node]:
    """The constants (C,) of a node that its output is proportional to together; none where there are no such, or where
    others read one of them too."""
    if node.target is _aten.layer_norm.default:
        constants = operands(node)[2:4]
    elif node.target is _aten.rms_norm.default:
        constants = operands(node)[2:3]
    elif node.target is _aten.mul.Tensor:
        constants = tuple(filter(is_constant, operands(node)))
    else:
        return []
    channels = node.meta["val"].shape[-1:]
    own = (is_constant(each) and len(each.users) == 1 and each.meta["val"].shape == channels for each in constants)
    return list(constants) if all(own) else []


def _multiply(rewriter: GraphRewriter, constant: fx.Node, scale: Tensor) -> None:
    """Multiply the last dimension of a parameter."""
    value = rewriter.value(constant)
    rewriter.store(str(constant.target), value * scale.to(value), parameter=True)


def _divide(rewriter: GraphRewriter, node: fx.Node, weight: fx.Node, factor: Tensor) -> None:
    """Let what reads a tensor read it times `factor` (C,), which is named by a weight."""
    readers = value_readers(node)
    with rewriter.after(node):
        factors = rewriter.buffer(f"{weight.target}_inputs", factor.to(rewriter.value(weight)), weight)
        divided = rewriter.call(_aten.mul.Tensor, node, factors, like=node)
        divided.meta[SCALED] = True
    for reader in readers:
        reader.replace_input_with(node, divided)
    if node.target is COPY:  # the product is a copy
        source = node.args[0]
        assert isinstance(source, fx.Node)
        divided.replace_input_with(node, source)
        rewriter.erase(node)
