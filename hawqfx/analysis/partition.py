"""The partition of a graph into nodes that compute with integers and nodes that compute in float.

Layers and products of activations always compute with integers.  An addition, a multiplication, a pooling, a sigmoid or
a data-movement operator has an integer kernel too, but beside a float operator this kernel has to convert its inputs
and outputs.  In the partition, the fewest values cross between float and integers: it is a minimum cut of the graph, in
which a tensor that a node reads weighs as much as it has elements.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import fx

from hawqfx.ir.graph import captured_shape
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
UNCUTTABLE = float("inf")


@dataclass(frozen=True)
class Partition:
    """The nodes of a graph that compute with integers.

    Args:
        kernels: layers, products and elementwise operators that compute with integers, in the order of the graph.
        data_movement: data-movement operators on integers.
        integer_outputs: the tensors that kernels and data movement hand out as integers; all of them need a quantizer.
    """

    kernels: tuple[fx.Node, ...]
    data_movement: frozenset[fx.Node]
    integer_outputs: frozenset[fx.Node]

    def reads_integers(self, node: fx.Node, tensor: fx.Node) -> bool:
        """Whether `node` reads `tensor` as integers."""
        return node in self.data_movement or (node in self.kernels and tensor in kernel_inputs(node))


def kernel_inputs(kernel: fx.Node) -> tuple[fx.Node, ...]:
    """The activations that a kernel multiplies, adds or averages."""
    if kernel.target in WEIGHTED_LAYERS:
        return operands(kernel)[:1]
    return operands(kernel)[:2] if is_product(kernel) else elementwise(kernel)


def is_layer(node: fx.Node) -> bool:
    """Whether a node multiplies an activation by a constant weight."""
    return node.target in WEIGHTED_LAYERS and is_constant(operands(node)[1]) and is_tensor(operands(node)[0])


def partition(graph: fx.Graph, keeps_float: Callable[[fx.Node], bool] = lambda layer: False) -> Partition:
    """The partition of a graph that converts the fewest values.

    Args:
        graph: captured, with the tensors of its nodes in `meta["val"]`.
        keeps_float: whether a layer stays in float.

    Returns:
        The partition; all its parts are empty where no layer and no product computes with integers.
    """
    fixed = [node for node in graph.nodes if (is_layer(node) and not keeps_float(node)) or is_product(node)]
    free = {node for node in graph.nodes if elementwise(node) or is_data_movement(node)}
    side = _MinimumCut(graph, fixed, free).integer_side() if fixed else set()
    kernels = tuple(
        node for node in graph.nodes if node in fixed or (node in free and node in side and elementwise(node))
    )
    data_movement = frozenset(node for node in free if node in side and not elementwise(node))
    integer_outputs = {fused_output(node) for node in kernels if fused_output(node) in side} | data_movement
    return Partition(kernels, data_movement, frozenset(integer_outputs))


def fused_output(kernel: fx.Node) -> fx.Node:
    """The node whose tensor a kernel hands out: the kernel itself, or the rectifier that onnxruntime fuses with it.

    The rectifier fuses if nothing else reads the kernel's own tensor, and if the quantizer after the rectifier can
    start at zero, so that onnxruntime may drop the rectifier.
    """
    readers = value_readers(kernel)
    if len(readers) == 1:
        (user,) = readers
        if ceiling(user) is not None and share_ceiling(_tied_tensors(user)):
            return user
    return kernel


def share_ceiling(tensors: Iterable[fx.Node]) -> bool:
    """Whether rectifiers with the same ceiling make all these tensors.

    Then a quantizer that the tensors share can do the work of the rectifiers.
    """
    ceilings = {ceiling(tensor) for tensor in tensors if not is_data_movement(tensor)}
    return len(ceilings) == 1 and None not in ceilings


def _tied_tensors(tensor: fx.Node) -> set[fx.Node]:
    """The tensors that share a quantizer with `tensor` if all data-movement operators work on integers."""
    tied, waiting = {tensor}, [tensor]
    while waiting:
        node = waiting.pop()
        neighbours = [user for user in node.users if is_data_movement(user)]
        neighbours += [source for source in node.all_input_nodes if is_data_movement(node) and is_tensor(source)]
        waiting += [neighbour for neighbour in neighbours if neighbour not in tied]
        tied.update(neighbours)
    return tied


class _MinimumCut:
    """The flow network whose minimum cut is the partition.

    A node on the integer side computes with integers and makes integers.  A tensor that is made on one side and read
    on the other is converted once, however many nodes read it: a vertex of its own stands for the conversion.

    Args:
        graph: a captured graph.
        fixed: the nodes that compute with integers in any case.
        free: the nodes whose side the cut decides.
    """

    def __init__(self, graph: fx.Graph, fixed: list[fx.Node], free: set[fx.Node]) -> None:
        self.capacities: dict[tuple[object, object], float] = {}
        self.graph, self.fixed, self.free = graph, set(fixed), free
        self.unit = len(graph.nodes) ** 2  # the weight of an element: more than all preferences together
        self.kernel_of = {fused_output(node): node for node in graph.nodes if node in self.fixed or elementwise(node)}
        for node in graph.nodes:
            if is_tensor(node) and not self._is_inside_kernel(node):
                self._add_tensor(node)

    def integer_side(self) -> set[object]:
        """The vertices on the integer side of the minimum cut."""
        import networkx  # `hawqfx.compile` loads without it

        edges: networkx.DiGraph[object] = networkx.DiGraph()
        edges.add_nodes_from((INTEGER, FLOAT))
        edges.add_edges_from((*ends, {"capacity": capacity}) for ends, capacity in self.capacities.items())
        _, (integer, _) = networkx.minimum_cut(edges, INTEGER, FLOAT)
        return set(integer)

    def _is_inside_kernel(self, node: fx.Node) -> bool:
        """Whether the tensor never leaves a kernel, because a rectifier after it belongs to the same kernel."""
        return (node in self.fixed or bool(elementwise(node))) and fused_output(node) is not node

    def _add_tensor(self, node: fx.Node) -> None:
        """Add the conversions of a tensor, with its number of elements as the cost."""
        self._add_maker(node)
        readers = [self._reader(user) for user in value_readers(node)]
        for reader in dict.fromkeys(readers):
            self._require(("dequantize", node), reader)
            self._require(reader, ("quantize", node))
        if readers:
            elements = math.prod(captured_shape(node))
            self.capacities[node, ("dequantize", node)] = elements * self.unit
            self.capacities[("quantize", node), node] = elements * self.unit

    def _add_maker(self, node: fx.Node) -> None:
        """Tie a tensor to the side of the kernel that makes it."""
        kernel = self.kernel_of.get(node, node)
        if kernel in self.fixed:
            if not _may_make_floats(kernel, node):
                self._require(INTEGER, node)
            return
        if kernel not in self.free:
            self._require(node, FLOAT)
            return
        if kernel is not node:  # the rectifier belongs to the kernel
            self._require(kernel, node)
            self._require(node, kernel)
        if is_data_movement(node):
            if len(node.all_input_nodes) > 1:  # preference: no shared quantizer where it makes no difference
                self.capacities[node, FLOAT] = self.unit // len(self.graph.nodes)
            else:  # preference: quantize before values are moved
                self.capacities[INTEGER, node] = 1

    def _reader(self, user: fx.Node) -> object:
        """The vertex of a node that reads a tensor."""
        if user in self.fixed:
            return INTEGER
        return user if user in self.free else FLOAT

    def _require(self, dependent: object, required: object) -> None:
        """Let `dependent` be on the integer side only if `required` is there too."""
        if dependent != required:
            self.capacities[dependent, required] = UNCUTTABLE


def _may_make_floats(kernel: fx.Node, tensor: fx.Node) -> bool:
    """Whether an integer kernel can hand out floats: linear layers and products without a rectifier can, convolutions
    cannot."""
    return tensor is kernel and (is_product(kernel) or WEIGHTED_LAYERS[kernel.target] == "linear")
