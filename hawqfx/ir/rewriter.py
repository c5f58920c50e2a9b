"""Puts nodes into a copy of a program's graph."""

from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from hawqfx.ir.program import Program, copy_graph, set_tensor, tensor_of


class GraphRewriter:
    """A copy of the graph, and new nodes in it, before the node that is being rewritten."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.module = copy_graph(program.graph)
        self.graph = self.module.graph

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = target(*fx.map_arg(args, lambda argument: argument.meta["val"]), **kwargs)
        return node

    def constant(self, key: str, value: Tensor, like: fx.Node) -> fx.Node:
        set_tensor(self.module, key, value, parameter=True)
        node = self.graph.get_attr(key)
        node.meta["val"] = like.meta["val"].new_empty(value.shape)
        return node

    def value(self, node: fx.Node) -> Tensor:
        return tensor_of(self.module, str(node.target)).detach()

    def replace(self, constant: fx.Node, value: Tensor) -> None:
        """Put another value of the same shape where a parameter is read."""
        set_tensor(self.module, str(constant.target), value, parameter=True)

    def done(self) -> Program:
        """The program with the copy, and without what nothing reads any more."""
        self.graph.eliminate_dead_code()
        self.module.recompile()
        return replace(self.program, graph=fx.GraphModule(self.module, self.graph))
