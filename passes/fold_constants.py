"""Compute what depends on constants alone, and write a scale and shift per channel as the batch-norm that it is.

Frozen batch-norms, say, that are written out as sums and products: fold_batchnorm then takes them into the layer
before.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from hawqfx.ir.operators import BATCH_NORM, is_constant, is_tensor, operands
from hawqfx.ir.program import Program, copy_graph, set_tensor
from hawqfx.pass_manager.base import Rewrite

_aten = torch.ops.aten
LARGEST = 1 << 20  # elements of a constant that is computed: what is larger may well be an expanded small one


def _computable(node: fx.Node) -> bool:
    """Whether an operator on constants makes one floating-point tensor, the same every time."""
    value = node.meta.get("val")
    return (
        isinstance(node.target, OpOverload)
        and isinstance(value, Tensor)
        and value.is_floating_point()
        and all(isinstance(size, int) for size in value.shape)
        and value.numel() <= LARGEST
        and bool(node.all_input_nodes)
        and all(source.op == "get_attr" for source in node.all_input_nodes)
        and torch.Tag.nondeterministic_seeded not in node.target.tags
        and not node.target._schema.is_mutable
    )


def _per_channel(node: Any, ndim: int, channels: Any) -> bool:
    """Whether a constant has one value per channel of images."""
    if not is_constant(node) or ndim < 3:
        return False
    shape = [1] * (ndim - node.meta["val"].ndim) + list(node.meta["val"].shape)
    return len(shape) == ndim and shape[1] == channels and all(size == 1 for at, size in enumerate(shape) if at != 1)


class _Folder:
    def __init__(self, program: Program) -> None:
        self.module = copy_graph(program.graph)
        self.graph = self.module.graph

    def value(self, node: fx.Node) -> Tensor:
        owner, _, name = str(node.target).rpartition(".")
        value: Tensor = getattr(self.module.get_submodule(owner), name)
        return value.detach()

    def constant(self, key: str, value: Tensor, like: fx.Node) -> fx.Node:
        set_tensor(self.module, key, value, parameter=False)
        node = self.graph.get_attr(key)
        node.meta["val"] = like.meta["val"].new_empty(value.shape)
        return node

    @torch.no_grad()
    def compute(self, node: fx.Node) -> None:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.value)
        value = node.target(*args, **kwargs).contiguous()  # type: ignore[operator]
        with self.graph.inserting_before(node):
            node.replace_all_uses_with(self.constant(f"{node.name}_constant", value, node))
        self.graph.erase_node(node)

    def norm(self, shift: fx.Node) -> None:
        """x * scale + shift as batch-norm, if that is what ends in this node."""
        scaled, constants = _affine(shift)
        if scaled is None:
            return
        scale, offset = (self.value(constant).reshape(-1) for constant in constants)
        tensor = next(argument for argument in operands(scaled) if is_tensor(argument))
        name = shift.name
        with self.graph.inserting_before(shift):
            gamma, beta = (self.constant(f"{name}.{w}", v, shift) for w, v in (("gamma", scale), ("beta", offset)))
            mean = self.constant(f"{name}.mean", torch.zeros_like(scale), shift)
            variance = self.constant(f"{name}.variance", torch.ones_like(scale), shift)
            norm = self.graph.call_function(BATCH_NORM, (tensor, gamma, beta, mean, variance, False, 0.0, 0.0, False))
        norm.meta["val"] = shift.meta["val"]
        shift.replace_all_uses_with(norm)
        self.graph.erase_node(shift)
        self.graph.erase_node(scaled)


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
    tolerance: ClassVar[float] = 1e-5  # the same operators on the same values

    def rewrite(self, program: Program) -> Program:
        folder = _Folder(program)
        for node in list(folder.graph.nodes):
            if node.op == "call_function" and _computable(node):
                folder.compute(node)
        for node in list(folder.graph.nodes):
            if node.op == "call_function":
                folder.norm(node)
        folder.graph.eliminate_dead_code()
        folder.module.recompile()
        return replace(program, graph=fx.GraphModule(folder.module, folder.graph))
