"""The one way to edit a graph: passes write into a copy of the program's graph."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses import FakeTensor
from torch.fx.node import Target

from hawqfx.ir.graph import copy_graph, set_tensor, tensor_of
from hawqfx.ir.names import PATHS
from hawqfx.ir.program import Program


class GraphRewriter:
    """A copy of a program's graph that shares its tensors.  New nodes go before or after the node that `before` or
    `after` names, and are said to be made by the module that made that node (hawqfx.ir.names).  A node records its
    value's shape (`meta["val"]`) where those of all its inputs are recorded."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.module = copy_graph(program.graph)
        self.graph = self.module.graph
        self._beside: fx.Node | None = None

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """New nodes go before this node, in the order in which they are made."""
        with self._at(node, node):
            yield

    @contextmanager
    def after(self, node: fx.Node) -> Iterator[None]:
        """New nodes go after this node, in the order in which they are made."""
        with self._at(node.next, node):
            yield

    @contextmanager
    def _at(self, place: fx.Node, beside: fx.Node) -> Iterator[None]:
        outer, self._beside = self._beside, beside
        with self.graph.inserting_before(place):
            yield
        self._beside = outer

    def calls(self, target: Target | None = None) -> list[fx.Node]:
        """The nodes that call a function, in the order of the graph; those that call `target`, if it is given."""
        return [node for node in self.graph.nodes if node.op == "call_function" and target in (None, node.target)]

    def call(self, target: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        """A new node that calls a function.

        Args:
            target: the function.
            args: its arguments, nodes among them.
            like: a node whose value has the same shape and type; it need not be computed then.
            kwargs: its keyword arguments.
        """
        node = self.graph.call_function(target, args, kwargs)
        if self._beside is not None and PATHS in self._beside.meta:
            node.meta[PATHS] = self._beside.meta[PATHS]
        if like is not None:
            node.meta["val"] = like.meta.get("val")
        elif all(source.meta.get("val") is not None for source in node.all_input_nodes):
            values = fx.map_arg((args, kwargs), lambda source: source.meta["val"])
            with self._shapes_alone():
                node.meta["val"] = target(*values[0], **values[1])
        return node

    def _shapes_alone(self) -> AbstractContextManager[Any]:
        """Where torch computes shapes, and no values: an operator of sizes alone, such as arange, would else make a
        tensor, and a size that varies would be fixed by that in every shape of the graph."""
        recorded = (node.meta.get("val") for node in self.graph.nodes)
        return next((value.fake_mode for value in recorded if isinstance(value, FakeTensor)), nullcontext())

    def parameter(self, key: str, value: Tensor, like: fx.Node | None = None) -> fx.Node:
        """A new node that reads a parameter, which is put at this qualified name.

        Args:
            key: the name; a tensor that was there is replaced.
            value: of the parameter.
            like: a node on whose device the graph was captured; without one, no shape is recorded.
        """
        self.store(key, value, parameter=True)
        return self._read(key, value, like)

    def buffer(self, key: str, value: Tensor, like: fx.Node | None = None) -> fx.Node:
        """A new node that reads a buffer; the arguments are those of `parameter`."""
        self.store(key, value, parameter=False)
        return self._read(key, value, like)

    def _read(self, key: str, value: Tensor, like: fx.Node | None) -> fx.Node:
        node = self.graph.get_attr(key)
        if like is not None:
            node.meta["val"] = like.meta["val"].new_empty(value.shape)
        return node

    def store(self, key: str, value: Tensor, *, parameter: bool) -> None:
        """Put a parameter or a buffer at a qualified name, over the tensor that was there."""
        set_tensor(self.module, key, value, parameter=parameter)

    def value(self, constant: fx.Node) -> Tensor:
        """The tensor that a get_attr node reads."""
        return tensor_of(self.module, str(constant.target)).detach()

    def replace(self, node: fx.Node, by: fx.Node, *, keep_name: bool = False) -> None:
        """Let every user of `node` read `by`, and erase `node`.

        Args:
            node: the node that goes.
            by: the node that takes its place.
            keep_name: whether `by` takes over the name, so that sites still know it.
        """
        node.replace_all_uses_with(by)
        self.erase(node)
        if keep_name:
            by.name = node.name

    def erase(self, node: fx.Node) -> None:
        """Take a node out that nothing reads."""
        self.graph.erase_node(node)

    def done(self) -> Program:
        """The program with the copy, without nodes and tensors that nothing reads any more."""
        self.graph.eliminate_dead_code(_has_effect)
        return replace(self.program, graph=fx.GraphModule(self.module, self.graph))


def _has_effect(node: fx.Node) -> bool:
    """Whether a node does something besides its result.  A random draw does not, such as the dropout that attention has
    a place for: torch counts it as an effect, and would keep attention whose result nobody reads."""
    drawn = isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
    return node.is_impure() and not (drawn and not node.target._schema.is_mutable)  # type: ignore[union-attr]
