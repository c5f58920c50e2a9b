"""The value that flows through the passes: a graph, its sites, and the facts known about them."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from hawqfx.ir.facts import NETWORK, ByteCost, ChosenFormat, F, Fact, FactTable, FloatNetwork, NetworkFact
from hawqfx.ir.graph import batch_size, captured_size, constants_of, first_input, tensor_of
from hawqfx.ir.sites import ActivationSite, Layer, Product, Site, WeightSite
from hawqfx.maths.formats import Format, Scheme, layer_scheme

SCALE = "_scale"  # the buffer with the scale of a site's quantizer is named KEY_scale
KEPT_IN_FLOAT = "kept in float by the user"  # the reason of nodes whose weights keep_float= names

Hook = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """A pass that ran, and its time."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Program:
    """An immutable value; a pass returns a new one.

    Args:
        graph: the fx graph and its tensors.
        sites: the weights and activations whose formats are chosen.
        layers: the nodes that multiply by a weight, and compute with integers where their sites are quantized.
        products: the nodes that multiply two activations, likewise.
        elementwise: names of nodes without weights that have an integer kernel.
        left_float: node that multiplies in float -> the reason.
        facts: see hawqfx.ir.facts.
        history: the passes that ran.
        dimensions: input -> the names of its dimensions that vary, by number.
        notes: what of the model was captured in another form, in sentences.
    """

    graph: fx.GraphModule
    sites: tuple[Site, ...] = ()
    layers: tuple[Layer, ...] = ()
    products: tuple[Product, ...] = ()
    elementwise: tuple[str, ...] = ()
    left_float: Mapping[str, str] = field(default_factory=dict)
    facts: FactTable = field(default_factory=FactTable)
    history: tuple[Step, ...] = ()
    dimensions: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> tuple[WeightSite, ...]:
        return tuple(site for site in self.sites if isinstance(site, WeightSite))

    @property
    def activations(self) -> tuple[ActivationSite, ...]:
        return tuple(site for site in self.sites if isinstance(site, ActivationSite))

    @property
    def site_of(self) -> dict[str, str]:
        """Name of a node that makes or moves a quantized tensor -> the key of the tensor's site."""
        return {name: site.key for site in self.activations for name in site.tensors}

    def with_graph(self, graph: fx.GraphModule) -> "Program":
        """Another graph with the same inputs and facts, and without sites."""
        return Program(graph, facts=self.facts, dimensions=self.dimensions, notes=self.notes)

    def learn(self, facts: Mapping[str, Fact]) -> "Program":
        """The program that also knows these facts, by site key."""
        return replace(self, facts=self.facts.with_facts(facts))

    def learn_about_network(self, fact: NetworkFact) -> "Program":
        """The program that also knows this fact about the whole network."""
        return replace(self, facts=self.facts.with_facts({NETWORK: fact}))

    def about(self, kind: type[F]) -> F:
        """The fact of this class about the whole network.

        Raises:
            PassError: if no pass has given it.
        """
        return self.facts.get(NETWORK, kind)

    def knows(self, kind: type[Fact]) -> bool:
        """Whether a fact of this class about the whole network is known."""
        return self.facts.has(NETWORK, kind)

    def formats(self) -> dict[str, Format]:
        """The chosen format of every site."""
        return {site.key: self.facts.get(site.key, ChosenFormat).format for site in self.sites}

    def schemes(self) -> dict[str, Scheme]:
        """Node of each layer -> the scheme by which it computes in the chosen formats."""
        formats = self.formats()
        return {layer.node: layer_scheme(formats[layer.weight], formats[layer.input]) for layer in self.layers}

    def tensor(self, key: str) -> Tensor:
        """The parameter or buffer with this qualified name."""
        return tensor_of(self.graph, key)

    def constants(self) -> dict[str, Tensor]:
        """The parameters and buffers that the graph reads, by name."""
        return constants_of(self.graph)

    def weights_of(self, node: fx.Node) -> list[str]:
        """The names of the constants with two dimensions or more that a node reads."""
        names = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
        return [name for name in names if self.tensor(name).is_floating_point() and self.tensor(name).ndim >= 2]

    def float_weights(self) -> dict[str, str]:
        """The weights that are no sites, since the nodes that read them multiply in float: name -> the reason."""
        sites = {site.key for site in self.weights}
        nodes = {node.name: node for node in self.graph.graph.nodes}
        read = [(name, reason) for node, reason in self.left_float.items() for name in self.weights_of(nodes[node])]
        return {name: reason for name, reason in read if name not in sites}

    def share_in_float(self, node: str) -> float:
        """The part of the file's bytes of weights that a node reads in float."""
        (found,) = (each for each in self.graph.graph.nodes if each.name == node)
        sites = {site.key for site in self.weights}
        read = {name for name in self.weights_of(found) if name not in sites}
        return sum(_float_bytes(self.tensor(name)) for name in read) / self.weight_bytes()

    def float_bytes(self) -> int:
        """Bytes of the float32 network's parameters and constants: 100% of a size."""
        graph = self.about(FloatNetwork).graph if self.knows(FloatNetwork) else self.graph
        return sum(_float_bytes(tensor) for tensor in constants_of(graph).values())

    def fixed_bytes(self) -> int:
        """Bytes of the constants that belong to no site and stay as they are."""
        covered = {site.key for site in self.weights} | {layer.bias for layer in self.layers}
        return sum(_float_bytes(tensor) for key, tensor in self.constants().items() if key not in covered)

    def weight_bytes(self) -> int:
        """Bytes of the exported file that belong to weights in the chosen formats, and to constants of no site."""
        formats = self.formats()
        return self.fixed_bytes() + sum(self.facts.get(s.key, ByteCost).bytes[formats[s.key]] for s in self.weights)

    @property
    def dynamic_batch(self) -> bool:
        """Whether the graph takes any number of samples at once."""
        return not isinstance(first_input(self.graph.graph).meta["val"].shape[0], int)

    def forward_bytes(self) -> int:
        """Bytes of all tensors that a forward pass of one sample makes, as far as the capture recorded them."""
        values = [node.meta.get("val") for node in self.graph.graph.nodes if node.op == "call_function"]
        total = sum(
            captured_size(value.numel()) * value.element_size() for value in values if isinstance(value, Tensor)
        )
        return total // batch_size(self.graph.graph)

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        hook: Hook | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        at: Iterable[str] | None = None,
        operators: Mapping[Any, Callable[..., Any]] | None = None,
        known: Mapping[fx.Node, Any] | None = None,
    ) -> Any:
        """The model's output.

        Args:
            args: positional inputs of the model.
            kwargs: keyword inputs of the model.
            hook: sees (name of the node, tensor) as tensors are made, and returns the tensor to go on with.
            tensors: stand in for parameters of the same name.
            at: the nodes that the hook sees; by default those of the activation sites.
            operators: stand in for the functions that nodes call.
            known: values of nodes that are not computed again; the hook does not see them.
        """
        hooked = set(at) if at is not None else {node for site in self.activations for node in site.nodes}
        interpreter = _Interpreter(self.graph, hooked, hook, tensors or {}, operators or {})
        start = dict(known or {})
        places = zip(self.graph.graph.find_nodes(op="placeholder"), self.flat_inputs(args, kwargs), strict=True)
        inputs = [value for node, value in places if node not in start]  # fx takes none for an input that is known
        output = interpreter.run(*inputs, initial_env=start, enable_io_processing=False)
        return self.graph.graph.process_outputs(output)

    def values(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, dict[fx.Node, Any]]:
        """The model's output, and the value of every node but the output."""
        interpreter = _Interpreter(self.graph, set(), None, {}, {}, keep=True)
        output = interpreter.run(*self.flat_inputs(args, kwargs), enable_io_processing=False)
        kept = {node: value for node, value in interpreter.env.items() if node.op != "output"}
        return self.graph.graph.process_outputs(output), kept

    def evaluate(
        self,
        wanted: Iterable[fx.Node],
        known: Mapping[fx.Node, Any],
        hook: Hook | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> dict[fx.Node, Any]:
        """The values of some nodes, by as much of the graph as is needed between known values and them.

        Args:
            wanted: the nodes.
            known: values that are not computed; those of the inputs, at least.
            hook: as for `run`, on nodes that are computed.
            tensors: stand in for parameters of the same name.
        """
        wanted = list(wanted)
        needed, waiting = set(), [node for node in wanted if node not in known]
        while waiting:
            node = waiting.pop()
            if node not in needed:
                needed.add(node)
                waiting += [source for source in node.all_input_nodes if source not in known]
        hooked = {node for site in self.activations for node in site.nodes}
        interpreter = _Interpreter(self.graph, hooked, hook, tensors or {}, {})
        interpreter.env = dict(known)
        for node in self.graph.graph.nodes:
            if node in needed:
                interpreter.env[node] = interpreter.run_node(node)
        return {node: interpreter.env[node] for node in wanted}

    @property
    def with_own_bias(self) -> set[str]:
        """The nodes of the layers that have a bias, and share neither it nor the weight with another."""
        weights, biases = (Counter(getattr(layer, part) for layer in self.layers) for part in ("weight", "bias"))
        own = (layer for layer in self.layers if layer.bias is not None)
        return {layer.node for layer in own if weights[layer.weight] == biases[layer.bias] == 1}

    def flat_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The values of the graph's placeholders, in their order."""
        spec = self.graph.graph._codegen.pytree_info.in_spec  # type: ignore[attr-defined]
        ordered = dict(kwargs)
        if len(spec.children()) == 2 and spec.children()[1].context:
            ordered = {name: kwargs[name] for name in spec.children()[1].context}
        return pytree.tree_leaves((args, ordered))


def _float_bytes(tensor: Tensor) -> int:
    return tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size())


class _Interpreter(fx.Interpreter):
    """Runs the graph with other tensors, other operators, and a hook on some nodes."""

    def __init__(
        self,
        graph: fx.GraphModule,
        hooked: set[str],
        hook: Hook | None,
        tensors: Mapping[str, Tensor],
        operators: Mapping[Any, Callable[..., Any]],
        keep: bool = False,
    ) -> None:
        super().__init__(graph, garbage_collect_values=not keep)
        self.hooked, self.hook, self.tensors, self.operators = hooked, hook, tensors, operators

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(self.operators.get(target, target), args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr" and n.target in self.tensors:
            return self.tensors[str(n.target)]
        value = super().run_node(n)
        if self.hook is not None and n.name in self.hooked:
            return self.hook(n.name, value)
        return value
