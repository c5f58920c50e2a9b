"""Give integer kernels a copy of a tensor that float operators make and others read in float.

The copy is quantized, so that the readers in float keep the exact values: the sum of a residual network in float, for
example, of which a linear layer reads the normalised copy.  (A tensor that integer kernels make is quantized for all
of its readers.)
"""

from dataclasses import dataclass
from typing import ClassVar

from hawqfx.analysis.partition import partition
from hawqfx.ir.operators import COPY, is_tensor, kept_in_float, value_readers
from hawqfx.ir.program import Program
from hawqfx.ir.rewriter import GraphRewriter
from hawqfx.pass_manager.base import Rewrite, option


@dataclass(frozen=True)
class InsertCopies(Rewrite):
    """Gives integer kernels a copy of a tensor that others read in float."""

    keep_float: tuple[str, ...] = option((), "patterns, as in a shell, of weights whose layers stay in float")
    tolerance: ClassVar[float] = 0.0

    def rewrite(self, program: Program) -> Program:
        rewriter = GraphRewriter(program)
        parts = partition(rewriter.graph, lambda layer: kept_in_float(layer, self.keep_float))
        inputs = list(rewriter.graph.find_nodes(op="placeholder"))
        for node in list(rewriter.graph.nodes):
            if not is_tensor(node) or node in parts.integer_outputs:
                continue
            readers = value_readers(node)
            integer = [user for user in readers if parts.reads_integers(user, node)]
            if not integer or len(integer) == len(readers):
                continue
            with rewriter.after(node if node.op != "placeholder" else inputs[-1]):
                copy = rewriter.call(COPY, node, like=node)
            for user in integer:
                user.replace_input_with(node, copy)
        return rewriter.done()
