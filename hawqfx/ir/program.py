"""The value that flows through the passes: a graph, the places where bits are chosen, and what is known of them."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from hawqfx.ir.facts import Account, ChosenFormat, ErrorProducts, Fact, FactTable
from hawqfx.maths.formats import Scheme, layer_scheme
from hawqfx.maths.latency_model import LatencyModel

SCALE = "_scale"  # the buffer with the scale of a site's quantizer is named KEY_scale

Tap = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """One use of a weight: the fx node that multiplies an activation by it, and how often."""

    node: str
    operator: str
    weight: str
    bias: str | None
    input: str
    macs: int


@dataclass(frozen=True)
class Product:
    """The fx node that multiplies two activations, the sites of both, and how often it multiplies."""

    node: str
    operator: str
    inputs: tuple[str, str]
    macs: int


@dataclass(frozen=True)
class WeightSite:
    """A parameter whose bits are chosen.  `key` is its qualified name, also when several layers share it."""

    key: str
    kind: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class ActivationSite:
    """Tensors that share one quantizer.  `key` is the name of the first of `nodes`, the fx nodes that make them.

    `carriers` only move values of these tensors about (reshape, max-pool, concat): they keep the same quantizer.
    `shape` is that of one sample at the first node; `numel` counts the elements of one sample over all of `nodes`.
    `nonnegative`: rectifiers make all of them; `ceiling`: the largest value that these let pass.
    """

    key: str
    kind: str
    shape: tuple[int, ...]
    numel: int
    nodes: tuple[str, ...]
    data_movement: tuple[str, ...]
    nonnegative: bool
    ceiling: float = math.inf


Site = WeightSite | ActivationSite


@dataclass(frozen=True)
class Step:
    """One pass that ran."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Program:
    """An immutable value; a pass returns a new one.

    `layers`, `products` and `elementwise`: the nodes that compute with integers where their sites have them.
    `left_float` maps each node that multiplies but stays in float to the reason.  `timetable`: what was measured of
    its latency, if it was.  `interactions`: what errors of
    weights do together, if that was measured.  `account`: what the chosen plan takes of its limits.
    `original`: the float network before its operators were written as ones that have integer kernels, if it was kept.
    """

    graph: fx.GraphModule
    sites: tuple[Site, ...] = ()
    layers: tuple[Layer, ...] = ()
    products: tuple[Product, ...] = ()
    elementwise: tuple[str, ...] = ()
    left_float: Mapping[str, str] = field(default_factory=dict)
    latency_model: LatencyModel | None = None
    interactions: ErrorProducts | None = None
    account: Account | None = None
    original: fx.GraphModule | None = None
    facts: FactTable = field(default_factory=FactTable)
    history: tuple[Step, ...] = ()

    @property
    def weights(self) -> tuple[WeightSite, ...]:
        return tuple(site for site in self.sites if isinstance(site, WeightSite))

    @property
    def activations(self) -> tuple[ActivationSite, ...]:
        return tuple(site for site in self.sites if isinstance(site, ActivationSite))

    def learn(self, facts: Mapping[str, Fact]) -> "Program":
        return replace(self, facts=self.facts.with_facts(facts))

    def bits(self) -> dict[str, int]:
        """The chosen width of every site."""
        return {site.key: self.facts.get(site.key, ChosenFormat).bits for site in self.sites}

    def schemes(self) -> dict[str, Scheme]:
        """How each layer computes with the chosen widths, by its node."""
        bits = self.bits()
        return {layer.node: layer_scheme(bits[layer.weight], bits[layer.input]) for layer in self.layers}

    def tensor(self, key: str) -> Tensor:
        """The parameter or buffer with this qualified name."""
        return tensor_of(self.graph, key)

    def float_bytes(self) -> int:
        """Bytes of the float32 network's parameters and constants, the 100% of a relative size."""
        graph = self.graph if self.original is None else self.original
        return sum(_float_bytes(tensor) for tensor in _constants(graph).values())

    def fixed_bytes(self) -> int:
        """Bytes of those that no site covers, so that they stay as they are."""
        covered = {site.key for site in self.weights} | {layer.bias for layer in self.layers}
        return sum(_float_bytes(tensor) for key, tensor in self.constants().items() if key not in covered)

    @property
    def dynamic_batch(self) -> bool:
        """Whether the graph takes any number of samples at once."""
        first = next(iter(self.graph.graph.find_nodes(op="placeholder")))
        return not isinstance(first.meta["val"].shape[0], int)

    def forward_bytes(self) -> int:
        """Bytes of all tensors that one sample makes on its way through the graph, as far as the capture recorded."""
        values = [node.meta.get("val") for node in self.graph.graph.nodes if node.op == "call_function"]
        (batch, *_), *_ = [node.meta["val"].shape for node in self.graph.graph.find_nodes(op="placeholder")]
        total = sum(_hint(value.numel()) * value.element_size() for value in values if isinstance(value, Tensor))
        return total // _hint(batch)

    def constants(self) -> dict[str, Tensor]:
        """The parameters and buffers that the graph reads."""
        return _constants(self.graph)

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        tap: Tap | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        at: Iterable[str] | None = None,
        operators: Mapping[Any, Callable[..., Any]] | None = None,
    ) -> Any:
        """The model's output.  `tap` may look at, and replace, tensors as they are made: those of the activation
        sites, or those of the nodes `at`.  `tensors` stand in for parameters of the same name, and `operators` for
        what nodes call."""
        spots = set(at) if at is not None else {node for site in self.activations for node in site.nodes}
        interpreter = _Interpreter(self.graph, spots, tap, tensors or {}, operators or {})
        output = interpreter.run(*self.flat_inputs(args, kwargs), enable_io_processing=False)
        return self.graph.graph.process_outputs(output)

    def flat_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The values of the graph's placeholders, in their order."""
        spec = self.graph.graph._codegen.pytree_info.in_spec  # type: ignore[attr-defined]
        ordered = dict(kwargs)
        if len(spec.children()) == 2 and spec.children()[1].context:
            ordered = {name: kwargs[name] for name in spec.children()[1].context}
        return pytree.tree_leaves((args, ordered))


def output_names(graph: fx.GraphModule) -> list[str]:
    """Names of the tensors that a graph returns, in order: the keys or fields that lead to them, as in `logits` or
    `past_0`, else `output`, or `output_0`, ... where there are several."""
    (returned,) = next(iter(graph.graph.find_nodes(op="output"))).args
    spec = graph.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    paths = zip(pytree.tree_leaves(returned), _paths(spec, ()), strict=True)
    return ["_".join(path) or "output" for leaf, path in paths if isinstance(leaf, fx.Node)]


def _paths(spec: pytree.TreeSpec, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """What leads to each leaf."""
    children = spec.children()
    if spec.is_leaf():
        yield path
        return
    known: Any = getattr(spec.context, "_fields", spec.context)  # a named tuple's, or the keys of a dict and its like
    named = isinstance(known, (list, tuple)) and len(known) == len(children) and all(isinstance(k, str) for k in known)
    for key, child in zip(known if named else map(str, range(len(children))), children, strict=True):
        yield from _paths(child, (*(path or () if named else path or ("output",)), key))


def tensor_of(graph: fx.GraphModule, key: str) -> Tensor:
    """The parameter or buffer of a graph with this qualified name."""
    owner, _, name = key.rpartition(".")
    value = getattr(graph.get_submodule(owner), name)
    assert isinstance(value, Tensor)
    return value


def _constants(graph: fx.GraphModule) -> dict[str, Tensor]:
    nodes = graph.graph.find_nodes(op="get_attr")
    return {str(node.target): tensor_of(graph, str(node.target)) for node in nodes}


def _hint(size: Any) -> int:
    """A size as it was when the graph was captured."""
    return size if isinstance(size, int) else int(size.node.hint)


def _float_bytes(tensor: Tensor) -> int:
    return tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size())


class _Interpreter(fx.Interpreter):
    def __init__(
        self,
        graph: fx.GraphModule,
        spots: set[str],
        tap: Tap | None,
        tensors: Mapping[str, Tensor],
        operators: Mapping[Any, Callable[..., Any]],
    ) -> None:
        super().__init__(graph)
        self.spots, self.tap, self.tensors, self.operators = spots, tap, tensors, operators

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(self.operators.get(target, target), args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr" and n.target in self.tensors:
            return self.tensors[str(n.target)]
        value = super().run_node(n)
        if self.tap is not None and n.name in self.spots:
            return self.tap(n.name, value)
        return value


def copy_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """A graph that can be rewritten while the old one stays as it was; the tensors are shared."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    copied.set_codegen(graph.graph._codegen)
    return fx.GraphModule(graph, copied)


def set_tensor(graph: fx.GraphModule, key: str, value: Tensor, *, parameter: bool) -> None:
    """Put a parameter or a buffer at a qualified name, over what was there."""
    owner, _, name = key.rpartition(".")
    module: torch.nn.Module = graph
    for part in filter(None, owner.split(".")):
        if not isinstance(getattr(module, part, None), torch.nn.Module):
            module.add_module(part, torch.nn.Module())
        module = module.get_submodule(part)
    if name in module._parameters or name in module._buffers:
        delattr(module, name)
    if parameter:
        module.register_parameter(name, torch.nn.Parameter(value, requires_grad=value.is_floating_point()))
    else:
        module.register_buffer(name, value)
