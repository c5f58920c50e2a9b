"""What users call the values of a graph: by the path of the module that makes them, as in the model's own code.

| name | value |
| --- | --- |
| `layer1.0.relu` | what the module layer1.0.relu returns |
| `layer1.0 add` | of the operator add in the code of layer1.0 itself |
| `add` | of the operator add in the model's own code |
| `layer1.0.relu#2` | of the second call |
| `lstm[0]` | the first of several that the module lstm returns |
| `input x` | the input x |

An activation is called by the name of its first value and `output`, as in `layer1.0.relu output`.  The paths are those
that torch.export records; nodes that passes make have the path of the node that they stand for (hawqfx.ir.rewriter).
"""

import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch

from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from hawqfx.errors import BudgetError
from hawqfx.ir.operators import COPY, is_constant, is_data_movement

PATHS = "nn_module_stack"  # of a node's meta: call of a module -> (its path, its class), from the model inwards
SCALED = "hawqfx_scaled"  # of a node's meta: it has the values of a tensor times constants, and goes by its name


def operator_name(node: fx.Node) -> str:
    """The operator that a node calls, such as `conv2d`; `input` and `output` for the ends of the graph."""
    if node.op != "call_function":
        return "input" if node.op == "placeholder" else node.op
    if isinstance(node.target, OpOverload):
        return node.target._opname
    return str(getattr(node.target, "__name__", node.target))


def sizes_in_words(sizes: Mapping[str, int]) -> str:
    """Sizes of dimensions by name, such as `batch=1, sequence=1`."""
    return ", ".join(f"{name}={size}" for name, size in sizes.items())


def sizes_of(text: str, stands: str = "") -> dict[str, int]:
    """Sizes of dimensions from text such as `sequence=1@past=128`.

    Args:
        text: NAME=SIZE, one or more, with @ between.
        stands: what the text follows, for the message.

    Raises:
        BudgetError: if it does not parse.
    """
    sizes: dict[str, int] = {}
    for part in text.split("@"):
        name, equals, size = (piece.strip() for piece in part.rpartition("="))
        if not equals or not name:
            raise BudgetError(f"{stands}{part}: write NAME=SIZE, with @ between, as in sequence=1@past=128")
        if not (size.isascii() and size.isdecimal()):
            raise BudgetError(f"{stands}{part}: the size {size!r} is no whole number")
        if name in sizes:
            raise BudgetError(f"{stands}{part}: {name} stands twice")
        sizes[name] = int(size)
    return sizes


def names_of(graph: fx.Graph) -> dict[fx.Node, str]:
    """The name of every value of a captured graph; those of constants are the model's own."""
    computed: defaultdict[str, int] = defaultdict(int)  # call of a module -> the tensors that its own code computes
    for node in graph.nodes:
        if _computes(node):
            computed[_call(node)[0]] += 1
    paths = {_call(node)[1] for node in graph.nodes}
    parents = {path[:end] for path in paths for end, letter in enumerate(path) if letter == "."} | {""}
    names: dict[fx.Node, str] = {}
    seen: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == "get_attr":
            names[node] = str(node.target)
            continue
        call, path = _call(node)
        if original(node) is not node:
            names[node] = names[original(node)]
            continue
        if node.target is operator.getitem:
            names[node] = f"{names[node.all_input_nodes[0]]}[{node.args[1]}]"
            continue
        name = f"input {node.target}" if node.op == "placeholder" else f"{path} {operator_name(node)}".strip()
        if _computes(node) and path not in parents and computed[call] == 1:
            name = path
        seen[name] += 1
        names[node] = name if seen[name] == 1 else f"{name}#{seen[name]}"
    return names


def original(node: fx.Node) -> fx.Node:
    """The node whose value a copy has, times constants or not; the node itself, if it copies no activation."""
    while SCALED in node.meta or (node.target is COPY and not is_constant(node.args[0])):
        node = next(source for source in node.all_input_nodes if not is_constant(source))
    return node


def activation_name(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    """The name of an activation whose first value is that of a node, given the names of all values."""
    node = original(node)
    return names[node] if node.op == "placeholder" else f"{names[node]} output"


def some_of(names: Iterable[str], most: int = 8) -> str:
    """The first of some names, for a message."""
    listed = list(names)
    return ", ".join(listed[:most] + ["..."] * (len(listed) > most))


def matches(pattern: str, *names: str) -> bool:
    """Whether one of the names of a site is the pattern, or matches it as in a shell."""
    return any(name == pattern or fnmatch(name, pattern) for name in names)


def _computes(node: fx.Node) -> bool:
    """Whether a node computes floats of other tensors."""
    if node.op != "call_function" or node.target in (COPY, operator.getitem):
        return False
    if SCALED in node.meta or is_data_movement(node):
        return False
    made = (leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor))
    read = (source.meta.get("val") for source in node.all_input_nodes)
    return any(leaf.is_floating_point() for leaf in made) and any(isinstance(value, Tensor) for value in read)


def _call(node: fx.Node) -> tuple[str, str]:
    """The innermost call of a module whose code made a node, and the path of the module; empty for the model itself,
    and where torch.export recorded none."""
    call, (path, _) = next(reversed((node.meta.get(PATHS) or {"": ("", "")}).items()))
    return (call, path) if isinstance(path, str) and not path.startswith("_empty_nn_module_stack") else ("", "")
