"""A network of torch's own modules as JSON beside its tensors: what loads it runs nothing but torch.

    {"modules": {name: [class of torch.nn, {argument: value}]}, "nodes": [[op, target, args, kwargs], ...]}

Arguments of nodes are nested lists that begin with what they are: ["node", number], ["slice", start, stop, step],
["list", ...], ["tuple", ...] or ["value", a number, a text or nothing].  Functions have their names in torch, in
torch.nn.functional or in operator, and may be no others.
"""

import inspect
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

Json = Any
_FUNCTIONS = {
    f"{place.__name__}.{name}": function
    for place in (operator, torch.nn.functional, torch)
    for name, function in vars(place).items()
    if callable(function) and not name.startswith("_") and not isinstance(function, type)
}
_NAMES = {function: name for name, function in reversed(_FUNCTIONS.items())}


def described(network: fx.GraphModule) -> Json:
    """What `built` makes the network of again, but for its tensors.

    Raises:
        TypeError: if it has a module, a function or an argument that is not torch's own.
    """
    modules = {name: _module(network.get_submodule(name)) for name in _targets(network, "call_module")}
    numbers = {node: number for number, node in enumerate(network.graph.nodes)}
    nodes = [
        [node.op, _target(node), _written(node.args, numbers), _written(dict(node.kwargs), numbers)]
        for node in network.graph.nodes
    ]
    return {"modules": modules, "nodes": nodes}


def built(network: Json, tensors: dict[str, Tensor]) -> fx.GraphModule:
    """The network of a description and of its tensors by name, in eval mode."""
    root, graph = nn.Module(), fx.Graph()
    nodes: list[fx.Node] = []
    for name, (kind, options) in network["modules"].items():
        _put(root, name, getattr(nn, kind)(**{key: _sizes(value) for key, value in options.items()}))
    for op, target, args, kwargs in network["nodes"]:
        if op == "get_attr":
            _put(root, target, nn.Parameter(torch.empty_like(tensors[target]), tensors[target].is_floating_point()))
        function = _FUNCTIONS[target] if op == "call_function" else target
        nodes.append(graph.create_node(op, function, _read(args, nodes), _read(kwargs, nodes)))
    made = fx.GraphModule(root, graph)
    made.load_state_dict(tensors)
    return made.eval()


def _targets(network: fx.GraphModule, op: str) -> list[str]:
    return list(dict.fromkeys(str(node.target) for node in network.graph.find_nodes(op=op)))


def _module(module: nn.Module) -> Json:
    """The class of a module, and the arguments that make it again, which modules of torch keep under their names."""
    kind = type(module)
    if getattr(nn, kind.__name__, None) is not kind:
        raise TypeError(f"{kind.__qualname__} is no module of torch.nn")
    names = [name for name in inspect.signature(kind).parameters if hasattr(module, name)]
    options = {name: getattr(module, name) for name in names}
    return [kind.__name__, options | {"bias": options["bias"] is not None} if "bias" in options else options]


def _target(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if node.target not in _NAMES:
        raise TypeError(f"{node.target} is no function of torch or operator")
    return _NAMES[node.target]


def _written(value: Any, numbers: dict[fx.Node, int]) -> Json:
    if isinstance(value, fx.Node):
        return ["node", numbers[value]]
    if isinstance(value, slice):
        return ["slice", *(_written(each, numbers) for each in (value.start, value.stop, value.step))]
    if isinstance(value, dict):
        return {key: _written(each, numbers) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return ["tuple" if isinstance(value, tuple) else "list", *(_written(each, numbers) for each in value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return ["value", value]
    raise TypeError(f"{value!r} cannot be written as JSON")


def _read(value: Json, nodes: list[fx.Node]) -> Any:
    if isinstance(value, dict):
        return {key: _read(each, nodes) for key, each in value.items()}
    kind, *rest = value
    if kind in ("node", "value"):
        return nodes[rest[0]] if kind == "node" else rest[0]
    parts = [_read(each, nodes) for each in rest]
    return slice(*parts) if kind == "slice" else tuple(parts) if kind == "tuple" else parts


def _sizes(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _put(root: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    """A module or parameter under a dotted name."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    setattr(root, last, value)
