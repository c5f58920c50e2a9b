"""The law of the graph: conditions that every Program fulfils between passes.

The graph is well-formed for fx, and calls only operators.  Every parameter or buffer that it reads exists, and so does
every node or weight that a site names.  No two sites have the same key.
"""

from torch import fx
from torch._ops import OpOverload

from hawqfx.errors import PassError
from hawqfx.ir.program import Program


def verify(program: Program) -> None:
    """Check the law of the graph.

    Args:
        program: any program.

    Raises:
        PassError: if the program breaks the law; the message names the node or site.
    """
    graph = program.graph.graph
    try:
        graph.lint()
    except RuntimeError as error:
        raise PassError(f"the graph is malformed: {error}") from error
    names = {node.name for node in graph.nodes}
    for node in graph.nodes:
        _check_node(program, node)
    for site in program.weights:
        program.tensor(site.key)
    for activation in program.activations:
        for name in (*activation.nodes, *activation.data_movement):
            if name not in names:
                raise PassError(
                    f"activation site {activation.key!r} speaks of node {name!r}, which is not in the graph"
                )
    keys = [site.key for site in program.sites]
    if len(keys) != len(set(keys)):
        raise PassError("two sites have the same key")


def _check_node(program: Program, node: fx.Node) -> None:
    if node.op in ("placeholder", "output"):
        return
    if node.op == "get_attr":
        try:
            program.tensor(str(node.target))
        except (AttributeError, AssertionError) as error:
            raise PassError(f"node {node.name!r} gets {node.target!r}, which is no tensor of the graph") from error
        return
    if node.op != "call_function":
        raise PassError(f"node {node.name!r} is a {node.op}: only functions may be called")
    target = node.target
    known = isinstance(target, OpOverload) or getattr(target, "__module__", "") in ("_operator", "math", "torch")
    if not known:
        raise PassError(f"node {node.name!r} calls {target!r}, which is no operator")
