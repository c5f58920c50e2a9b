"""Compute the nodes that depend on constants alone, and write a scale and shift per channel as a batch-norm.

Frozen batch-norms, say, that are written out as sums and products: fold_batchnorm then takes them into the layer
before.
"""

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.nn import Parameter

from hawqfx.ir.graph import tensor_of
from hawqfx.ir.operators import BATCH_NORM, PARTED, is_constant, is_tensor, operands
from hawqfx.ir.program import Program
from hawqfx.ir.rewriter import GraphRewriter
from hawqfx.pass_manager.base import Rewrite

_aten = torch.ops.aten
LARGEST = 1 << 20  # elements of a constant that is made of smaller ones: more may well be small ones, expanded


def _computable(node: fx.Node) -> bool:
    """Whether an operator on constants makes one floating-point tensor, the same every time."""
    value = node.meta.get("val")
    return (
        isinstance(node.target, OpOverload)
        and isinstance(value, Tensor)
        and value.is_floating_point()
        and all(isinstance(size, int) for size in value.shape)
        and bool(node.all_input_nodes)
        and all(source.op == "get_attr" for source in node.all_input_nodes)
        and value.numel() <= max(LARGEST, *(source.meta["val"].numel() for source in node.all_input_nodes))
        and torch.Tag.nondeterministic_seeded not in node.target.tags
        and not node.target._schema.is_mutable
    )


def _part_of_constant(node: fx.Node) -> fx.Node | None:
    """The operator that parts a constant into several, if a node is one of the parts, such as a projection that
    nn.MultiheadAttention packs with others."""
    whole = node.args[0] if node.target is operator.getitem else None
    if not isinstance(whole, fx.Node) or whole.target not in PARTED or not is_constant(whole.args[0]):
        return None
    value = whole.args[0].meta.get("val")  # type: ignore[union-attr]
    return whole if isinstance(value, Tensor) and value.is_floating_point() else None


@torch.no_grad()
def _take_part(rewriter: GraphRewriter, node: fx.Node, whole: fx.Node) -> None:
    """A constant takes the place of a part of another one."""
    source, *rest = operands(whole)
    part = whole.target(rewriter.value(source), *rest, **whole.kwargs)[node.args[1]].contiguous()  # type: ignore
    key = f"{source.target}_{node.args[1]}"
    with rewriter.before(node):
        make = rewriter.parameter if _is_parameter(rewriter, source) else rewriter.buffer
        constant = make(key, part, source)
    rewriter.replace(node, constant)


def _per_channel(node: Any, ndim: int, channels: Any) -> bool:
    """Whether a constant has one value per channel of images."""
    if not is_constant(node) or ndim < 3:
        return False
    shape = [1] * (ndim - node.meta["val"].ndim) + list(node.meta["val"].shape)
    return len(shape) == ndim and shape[1] == channels and all(size == 1 for at, size in enumerate(shape) if at != 1)


@torch.no_grad()
def _compute(rewriter: GraphRewriter, node: fx.Node) -> None:
    """A constant takes the place of an operator on constants, under the name of the parameter that it is made of."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), rewriter.value)
    value = node.target(*args, **kwargs).clone(memory_format=torch.contiguous_format)  # type: ignore[operator]
    with rewriter.before(node):
        parameter = _parameter(rewriter, node, value)
        if parameter is None:
            constant = rewriter.buffer(f"{node.name}_constant", value, node)
        else:
            constant = rewriter.parameter(parameter, value, node)
    rewriter.replace(node, constant)


def _parameter(rewriter: GraphRewriter, node: fx.Node, value: Tensor) -> str | None:
    """The name of a constant that is the only parameter that it is made of, pruned or turned, or one entry of it."""
    sources = [source for source in node.all_input_nodes if _is_parameter(rewriter, source)]
    if len(sources) != 1:
        return None
    (source,), key = sources, str(sources[0].target)
    if node.target is _aten.select.int and node.args[1] == 0:
        return f"{key}_{node.args[2]}"
    return key if len(source.users) == 1 and value.numel() == source.meta["val"].numel() else None


def _is_parameter(rewriter: GraphRewriter, constant: fx.Node) -> bool:
    return isinstance(tensor_of(rewriter.module, str(constant.target)), Parameter)


def _norm(rewriter: GraphRewriter, shift: fx.Node) -> None:
    """Write x * scale + shift as batch-norm, if such a sum ends in this node."""
    scaled, constants = _affine(shift)
    if scaled is None:
        return
    scale, offset = (rewriter.value(constant).reshape(-1) for constant in constants)
    tensor = next(argument for argument in operands(scaled) if is_tensor(argument))
    parts = {"gamma": scale, "beta": offset, "mean": torch.zeros_like(scale), "variance": torch.ones_like(scale)}
    with rewriter.before(shift):
        statistics = [rewriter.buffer(f"{shift.name}.{part}", value, shift) for part, value in parts.items()]
        norm = rewriter.call(BATCH_NORM, tensor, *statistics, False, 0.0, 0.0, False, like=shift)
    rewriter.replace(shift, norm)
    rewriter.erase(scaled)


def _affine(shift: fx.Node) -> tuple[fx.Node | None, tuple[fx.Node, ...]]:
    """The product that goes into a sum, and the constants of both."""
    value = shift.meta.get("val")
    if shift.target is not _aten.add.Tensor or shift.kwargs or not isinstance(value, Tensor) or value.ndim < 3:
        return None, ()

    def split(node: fx.Node) -> tuple[Any, Any]:
        one, other = node.args[:2]
        return (other, one) if is_constant(one) else (one, other)

    scaled, offset = split(shift)
    if not isinstance(scaled, fx.Node) or scaled.target is not _aten.mul.Tensor or len(scaled.users) > 1:
        return None, ()
    tensor, scale = split(scaled)
    fits = all(_per_channel(constant, value.ndim, value.shape[1]) for constant in (scale, offset))
    return (scaled, (scale, offset)) if fits and is_tensor(tensor) else (None, ())


@dataclass(frozen=True)
class FoldConstants(Rewrite):
    """Computes operators on constants, and writes a scale and shift per channel as a batch-norm."""

    tolerance: ClassVar[float] = 1e-5  # the same operators on the same values

    def rewrite(self, program: Program) -> Program:
        rewriter = GraphRewriter(program)
        for node in rewriter.calls():
            if _computable(node):
                _compute(rewriter, node)
            elif (whole := _part_of_constant(node)) is not None:
                _take_part(rewriter, node, whole)
        for node in rewriter.calls():
            _norm(rewriter, node)
        return rewriter.done()
