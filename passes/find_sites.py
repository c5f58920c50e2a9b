"""Find every place where bits are chosen, and tie the tensors that must share a quantizer.

A weight is a site if a layer multiplies by it, or if an embedding gathers rows of it.  A tensor is a site if an integer
kernel reads it or makes it (hawqfx.analysis.partition), because onnxruntime fuses a convolution or an addition into an
integer kernel only when its output is quantized too.  A rectifier after a layer belongs to the layer's quantizer, whose
range starts at 0.  Data-movement operators (reshape, max-pool, concat) change no value, so their inputs and outputs
share a quantizer: the groups of such tensors are the connected components of the graph whose edges are data movements.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import ClassVar

import torch
from torch import fx

from hawqfx.analysis import partition
from hawqfx.analysis.partition import Partition
from hawqfx.errors import CaptureError, NothingToQuantize, UsageError
from hawqfx.frontend.context import Context
from hawqfx.ir.graph import batch_size, captured_shape
from hawqfx.ir.names import activation_name, names_of, operator_name, original, some_of
from hawqfx.ir.operators import (
    BATCH_NORM,
    EMBEDDING,
    FLOAT_ONLY,
    GATHERS,
    NO_PRODUCTS,
    PRODUCTS,
    WEIGHTED_LAYERS,
    ceiling,
    elementwise,
    is_constant,
    is_product,
    is_tensor,
    kept_in_float,
    matches,
    operands,
)
from hawqfx.ir.program import KEPT_IN_FLOAT, Program
from hawqfx.ir.sites import ActivationSite, Layer, Product, WeightSite
from hawqfx.pass_manager.base import Analysis, Kind, option


def _sample_shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's tensor for one sample.

    The first dimension that is a multiple of the batch is divided by the batch, and dropped if it is 1 then.
    """
    batch = batch_size(node.graph)
    sizes = captured_shape(node)
    at = next((axis for axis, size in enumerate(sizes) if size % batch == 0), None)
    if at is None:
        name = names_of(node.graph)[node]
        raise CaptureError(f"{name!r} has shape {tuple(sizes)}, of which the batch of {batch} is no part")
    per_sample = sizes[at] // batch
    return (*sizes[:at], *([per_sample] if per_sample > 1 else []), *sizes[at + 1 :])


def _groups(graph: fx.Graph, parts: Partition) -> dict[fx.Node, set[fx.Node]]:
    """Node -> the nodes whose tensors share a quantizer with its tensor, itself among them."""
    import networkx  # `hawqfx.compile` loads without it

    ties: networkx.Graph[fx.Node] = networkx.Graph()
    for node in graph.nodes:
        if is_tensor(node):
            ties.add_node(node)
        if node in parts.data_movement:
            ties.add_edges_from((node, source) for source in node.all_input_nodes if is_tensor(source))
    return {node: group for group in networkx.connected_components(ties) for node in group}


def _activation_sites(graph: fx.Graph, parts: Partition) -> list[ActivationSite]:
    """The groups of tensors that an integer kernel reads or makes, in the order of the graph."""
    groups, names = _groups(graph, parts), names_of(graph)
    order = {node: number for number, node in enumerate(graph.nodes)}
    sites = []
    for node in groups:
        if node in parts.data_movement or not (
            node in parts.integer_outputs or any(parts.reads_integers(user, node) for user in node.users)
        ):
            continue
        group = sorted(groups[node], key=order.__getitem__)
        origins = [member for member in group if member not in parts.data_movement]
        if node is not origins[0]:
            continue
        shapes = [_sample_shape(origin) for origin in origins]
        rectified = partition.share_ceiling(origins)
        sites.append(
            ActivationSite(
                key=node.name,
                kind=operator_name(original(node)),
                shape=shapes[0],
                numel=sum(torch.Size(shape).numel() for shape in shapes),
                nodes=tuple(origin.name for origin in origins),
                data_movement=tuple(member.name for member in group if member in parts.data_movement),
                nonnegative=rectified,
                ceiling=min(ceiling(origin) or math.inf for origin in origins),
                name=activation_name(node, names),
            )
        )
    return sites


def _layers(program: Program, kernels: Iterable[fx.Node], site_of: Mapping[str, str]) -> list[Layer]:
    """The layers among integer kernels; `site_of` maps the name of a node to the key of its activation site."""
    layers = []
    for node in kernels:
        if node.target not in WEIGHTED_LAYERS:
            continue
        source, weight_node, bias = (*operands(node), None)[:3]
        assert isinstance(source, fx.Node)
        assert isinstance(weight_node, fx.Node)
        weight = program.tensor(str(weight_node.target))
        positions = torch.Size(_sample_shape(node)).numel() // weight.shape[0]
        layers.append(
            Layer(
                node=node.name,
                operator=WEIGHTED_LAYERS[node.target],
                weight=str(weight_node.target),
                bias=str(bias.target) if isinstance(bias, fx.Node) else None,
                input=site_of[source.name],
                macs=positions * weight.numel(),
            )
        )
    return layers


def _products(kernels: Iterable[fx.Node], site_of: Mapping[str, str]) -> list[Product]:
    """The products of activations among integer kernels; `site_of` as for `_layers`."""
    products = []
    for node in kernels:
        if is_product(node):
            left, right = partition.kernel_inputs(node)
            macs = torch.Size(_sample_shape(node)).numel() * captured_shape(left)[-1]
            inputs = site_of[left.name], site_of[right.name]
            products.append(Product(node.name, PRODUCTS[node.target], inputs, macs))
    return products


def _tables(graph: fx.Graph, keep_float: tuple[str, ...]) -> list[str]:
    """The names of weights that embeddings gather rows of, but for those that the user keeps in float."""
    nodes = graph.find_nodes(op="call_function", target=EMBEDDING)
    return [
        str(node.args[0].target) for node in nodes if is_constant(node.args[0]) and not kept_in_float(node, keep_float)
    ]


def _why_float(program: Program, node: fx.Node, parts: Partition, keep_float: tuple[str, ...]) -> str | None:
    """The reason why a node multiplies in float; None if it is an integer kernel, or does not multiply."""
    if (node.target in WEIGHTED_LAYERS or node.target is EMBEDDING) and kept_in_float(node, keep_float):
        return KEPT_IN_FLOAT
    reason, weights = _obstacle(program, node, parts), program.weights_of(node)
    named = bool(weights) and all(matches(name, keep_float) for name in weights)
    return KEPT_IN_FLOAT if reason is not None and named else reason


def _obstacle(program: Program, node: fx.Node, parts: Partition) -> str | None:
    """The reason why a node multiplies in float, whatever the user wishes; None as for `_why_float`."""
    if node.target in WEIGHTED_LAYERS:
        return (
            None if node in parts.kernels else f"{WEIGHTED_LAYERS[node.target]} whose weight is computed in the graph"
        )
    if node.target in FLOAT_ONLY:
        return f"onnxruntime has no integer kernel for {FLOAT_ONLY[node.target]}"
    if node.target in PRODUCTS and node not in parts.kernels:
        return f"{PRODUCTS[node.target]} of a constant"
    if node.target is BATCH_NORM:
        return "batch-norm that no single layer before it could take in"
    table = operands(node)[0] if node.target in GATHERS else None
    if isinstance(table, fx.Node) and is_constant(table) and program.tensor(str(table.target)).ndim >= 3:
        return f"{node.target} chooses among the matrices of {table.target}, which no integer kernel does"
    multiplies = node.op == "call_function" and node.target is not EMBEDDING and node.target not in NO_PRODUCTS
    for argument in node.all_input_nodes if multiplies else ():
        if is_constant(argument) and program.tensor(str(argument.target)).ndim >= 2:
            return f"{node.target} takes {argument.target} and is no layer"
    return None


def _check_patterns(program: Program, keep_float: tuple[str, ...]) -> None:
    """Raises UsageError for a pattern that no parameter's name has."""
    names = list(program.constants())
    for pattern in keep_float:
        if not any(fnmatch(name, pattern) for name in names):
            raise UsageError(f"keep_float {pattern!r}: no weight has such a name; weights are {some_of(names)}")


@dataclass(frozen=True)
class FindSites(Analysis):
    """Finds the sites of a graph, ties the tensors that share a quantizer, and names the nodes that stay in float."""

    keep_float: tuple[str, ...] = option((), "patterns, as in a shell, of weights whose layers stay in float")
    gives: ClassVar[tuple[Kind, ...]] = (WeightSite, ActivationSite)

    def learn(self, program: Program, context: Context) -> Program:
        """The program with its sites, layers, products, elementwise kernels, and nodes that multiply in float.

        Raises:
            NothingToQuantize: if no layer has a constant weight that may be quantized.
            CaptureError: if the batch is no part of a tensor's shape.
        """
        graph = program.graph.graph
        _check_patterns(program, self.keep_float)
        parts = partition.partition(graph, lambda layer: kept_in_float(layer, self.keep_float))
        reasons = {node.name: _why_float(program, node, parts, self.keep_float) for node in graph.nodes}
        left_float = {name: reason for name, reason in reasons.items() if reason is not None}
        activations = _activation_sites(graph, parts)
        site_of = {name: site.key for site in activations for name in site.tensors}
        layers = _layers(program, parts.kernels, site_of)
        if not layers:
            names = {node.name: name for node, name in names_of(graph).items()}
            raise NothingToQuantize(
                "the graph has no convolution or linear layer with constant weights to quantize"
                + "".join(f"\n  {names[node]}: {reason}" for node, reason in left_float.items())
            )
        kinds = dict.fromkeys(_tables(graph, self.keep_float), "embedding")
        kinds |= {layer.weight: layer.operator for layer in layers}
        weights = [WeightSite(key, kind, tuple(program.tensor(key).shape)) for key, kind in kinds.items()]
        return replace(
            program,
            sites=(*weights, *activations),
            layers=tuple(layers),
            products=tuple(_products(parts.kernels, site_of)),
            elementwise=tuple(node.name for node in parts.kernels if elementwise(node)),
            left_float=left_float,
        )
