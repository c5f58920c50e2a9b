"""Which nodes compute with integers.

Layers and products of activations do, always.  An addition, a multiplication, a pooling, a sigmoid or what only moves
values about has an integer kernel too, but beside a float operator it would have to convert what goes in and out.  So
those run in integers where that makes the fewest values cross between float and integers: a minimum cut of the graph,
in which the tensors that any node reads are weighed by their elements.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import networkx
from torch import Tensor, fx

from hawqfx.ir.operators import (
    WEIGHTED_LAYERS,
    ceiling,
    elementwise,
    is_constant,
    is_data_movement,
    is_product,
    is_tensor,
    operands,
    value_readers,
)

INTEGER, FLOAT = "integer", "float"  # the two ends of the cut
FORCED = float("inf")


@dataclass(frozen=True)
class Partition:
    """kernels: layers, products and elementwise operators that compute with integers, in order; carriers: nodes that
    move integers about; makes: the tensors that come out of either as integers, so that they need a quantizer."""

    kernels: tuple[fx.Node, ...]
    data_movement: frozenset[fx.Node]
    makes: frozenset[fx.Node]

    def reads(self, node: fx.Node, tensor: fx.Node) -> bool:
        """Whether `node` reads this tensor as integers."""
        return node in self.data_movement or (node in self.kernels and tensor in taken(node))


def taken(kernel: fx.Node) -> tuple[fx.Node, ...]:
    """The activations that a kernel multiplies, adds or averages."""
    if kernel.target in WEIGHTED_LAYERS:
        return operands(kernel)[:1]
    return operands(kernel)[:2] if is_product(kernel) else elementwise(kernel)


def is_layer(node: fx.Node) -> bool:
    return node.target in WEIGHTED_LAYERS and is_constant(operands(node)[1]) and is_tensor(operands(node)[0])


def find(graph: fx.Graph, keeps_float: Callable[[fx.Node], bool] = lambda layer: False) -> Partition:
    """`keeps_float`: whether a layer is to stay in float."""
    fixed = [node for node in graph.nodes if (is_layer(node) and not keeps_float(node)) or is_product(node)]
    free = {node for node in graph.nodes if elementwise(node) or is_data_movement(node)}
    side = _Cut(graph, fixed, free).solve() if fixed else set()
    kernels = tuple(
        node for node in graph.nodes if node in fixed or (node in free and node in side and elementwise(node))
    )
    data_movement = frozenset(node for node in free if node in side and not elementwise(node))
    makes = {end(node) for node in kernels if end(node) in side} | data_movement
    return Partition(kernels, data_movement, frozenset(makes))


def end(kernel: fx.Node) -> fx.Node:
    """The tensor that a kernel ends in: its rectifier's, if nothing else reads the value before and if the quantizer
    after the rectifier can start at zero, so that onnxruntime may drop the rectifier."""
    readers = value_readers(kernel)
    if len(readers) == 1:
        (user,) = readers
        if ceiling(user) is not None and cut_alike(_carried_with(user)):
            return user
    return kernel


def cut_alike(tensors: Iterable[fx.Node]) -> bool:
    """Whether rectifiers make all these tensors and cut them off at the same ceiling: then a quantizer that they share
    can do the rectifiers' work."""
    ceilings = {ceiling(tensor) for tensor in tensors if not is_data_movement(tensor)}
    return len(ceilings) == 1 and None not in ceilings


def _carried_with(tensor: fx.Node) -> set[fx.Node]:
    """The tensors that would share a quantizer with this one, if all carriers carried integers."""
    found, waiting = {tensor}, [tensor]
    while waiting:
        node = waiting.pop()
        around = [user for user in node.users if is_data_movement(user)]
        around += [source for source in node.all_input_nodes if is_data_movement(node) and is_tensor(source)]
        waiting += [other for other in around if other not in found]
        found.update(around)
    return found


class _Cut:
    """A node on the integer side computes with integers and makes integers.  A tensor made on one side and read on the
    other is converted once, however many read it: a vertex of its own stands for the conversion."""

    def __init__(self, graph: fx.Graph, fixed: list[fx.Node], free: set[fx.Node]) -> None:
        self.edges: networkx.DiGraph[object] = networkx.DiGraph()
        self.edges.add_nodes_from((INTEGER, FLOAT))
        self.graph, self.fixed, self.free = graph, set(fixed), free
        self.unit = len(graph.nodes) ** 2  # of an element: more than all preferences together
        self.kernel_of = {end(node): node for node in graph.nodes if node in self.fixed or elementwise(node)}
        for node in graph.nodes:
            if is_tensor(node) and not self._inside(node):
                self._tensor(node)

    def solve(self) -> set[object]:
        """What is on the integer side."""
        _, (integer, _) = networkx.minimum_cut(self.edges, INTEGER, FLOAT)
        return set(integer)

    def _inside(self, node: fx.Node) -> bool:
        """Whether a rectifier after the node belongs to the same kernel."""
        return (node in self.fixed or bool(elementwise(node))) and end(node) is not node

    def _tensor(self, node: fx.Node) -> None:
        size = elements(node)
        kernel = self.kernel_of.get(node, node)
        if kernel in self.fixed:
            if not _may_leave_floats(kernel, node):
                self._join(INTEGER, node)
        elif kernel in self.free:
            if kernel is not node:  # what makes the rectifier's output is the same kernel
                self._join(kernel, node)
                self._join(node, kernel)
            if len(node.all_input_nodes) > 1 and is_data_movement(
                node
            ):  # where it makes no difference, share no quantizer
                self.edges.add_edge(node, FLOAT, capacity=self.unit // len(self.graph.nodes))
            elif is_data_movement(node):  # and quantize before values are moved
                self.edges.add_edge(INTEGER, node, capacity=1)
        else:
            self._join(node, FLOAT)
        readers = [self._reader(user) for user in value_readers(node)]
        for reader in dict.fromkeys(readers):
            self._join(("dequantize", node), reader)
            self._join(reader, ("quantize", node))
        if readers:
            self.edges.add_edge(node, ("dequantize", node), capacity=size * self.unit)
            self.edges.add_edge(("quantize", node), node, capacity=size * self.unit)

    def _reader(self, user: fx.Node) -> object:
        if user in self.fixed:
            return INTEGER
        return user if user in self.free else FLOAT

    def _join(self, one: object, other: object) -> None:
        """`one` is not on the integer side without `other`."""
        if one != other:
            self.edges.add_edge(one, other, capacity=FORCED)


def _may_leave_floats(kernel: fx.Node, tensor: fx.Node) -> bool:
    """Linear layers and products have integer kernels that hand out floats, without a rectifier; convolutions none."""
    return tensor is kernel and (is_product(kernel) or WEIGHTED_LAYERS[kernel.target] == "linear")


def elements(node: fx.Node) -> int:
    """Of a tensor, with the batch that it was captured with."""
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    total = 1
    for size in value.shape:
        total *= size if isinstance(size, int) else int(size.node.hint)
    return total
