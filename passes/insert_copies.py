"""Where a tensor that float operators make is read both in float and as integers, the integer kernels read a copy.

The copy is what is quantized, so that the readers in float keep the exact values: the sum of a residual network in
float, say, of which a linear layer reads the normalised copy.  (A tensor that integer kernels make is quantized for
all of its readers.)
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from hawqfx.analysis import partition
from hawqfx.ir.operators import COPY, is_tensor, kept_in_float, value_readers
from hawqfx.ir.program import Program, copy_graph
from hawqfx.pass_manager.base import Rewrite


@dataclass(frozen=True)
class InsertCopies(Rewrite):
    """`keep_float`: patterns, as in a shell, of the names of weights whose layers stay in float."""

    keep_float: tuple[str, ...] = ()
    tolerance: ClassVar[float] = 0.0

    def rewrite(self, program: Program) -> Program:
        module = copy_graph(program.graph)
        graph = module.graph
        found = partition.find(graph, lambda layer: kept_in_float(layer, self.keep_float))
        for node in list(graph.nodes):
            if not is_tensor(node) or node in found.makes:
                continue
            readers = value_readers(node)
            reading = [user for user in readers if found.reads(user, node)]
            if not reading or len(reading) == len(readers):
                continue
            after = node if node.op != "placeholder" else list(graph.find_nodes(op="placeholder"))[-1]
            with graph.inserting_after(after):
                copy = graph.call_function(COPY, (node,))
            copy.meta["val"] = node.meta["val"]
            for user in reading:
                user.replace_input_with(node, copy)
        module.recompile()
        return replace(program, graph=fx.GraphModule(module, graph))
