"""Find every place where bits are chosen, and tie the tensors that must share a quantizer.

A weight is a site if a layer multiplies by it.  A tensor is a site if an integer kernel reads it, or if one makes it:
onnxruntime fuses a convolution or an addition into an integer kernel only when its output is quantized too.  A
rectifier after a layer belongs to the layer's quantizer, whose range starts at zero.  Carriers (reshape, max-pool,
concat) only move values, so what goes in and what comes out share a quantizer; the groups are the connected
components of the graph of carriers.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import ClassVar

import networkx
import torch
from torch import fx

from hawqfx.contract import Analysis, Kind
from hawqfx.errors import CaptureError, NothingToQuantize
from hawqfx.program import ActivationSite, Layer, Program, WeightSite
from hawqfx.study import Study
from hawqfx.vocabulary import (
    BATCH_NORM,
    BINARY,
    FLOAT_ONLY,
    WEIGHTED,
    ceiling,
    is_carrier,
    is_constant,
    is_tensor,
    operands,
)


def _sizes(node: fx.Node) -> list[int]:
    """The shape that a node had when it was captured, with the batch of the example."""
    return [size if isinstance(size, int) else int(size.node.hint) for size in node.meta["val"].shape]


def _sample_shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of one sample: the dimension that the batch is part of is divided by it, and dropped if it is 1."""
    batch = _sizes(next(iter(node.graph.find_nodes(op="placeholder"))))[0]
    sizes = _sizes(node)
    at = next((axis for axis, size in enumerate(sizes) if size % batch == 0), None)
    if at is None:
        raise CaptureError(f"{node.name} has shape {tuple(sizes)}, of which the batch of {batch} is no part")
    each = sizes[at] // batch
    return (*sizes[:at], *([each] if each > 1 else []), *sizes[at + 1 :])


def _is_kernel(node: fx.Node) -> bool:
    """Whether onnxruntime has an integer kernel for this node: a layer with a constant weight, or an addition."""
    if node.target in WEIGHTED:
        return is_constant(operands(node)[1]) and is_tensor(operands(node)[0])
    return node.target in BINARY and all(map(is_tensor, operands(node)[:2])) and not node.kwargs


def _reads(kernel: fx.Node) -> tuple[fx.Node, ...]:
    """The activations that a kernel multiplies or adds."""
    return operands(kernel)[: 1 if kernel.target in WEIGHTED else 2]


def _carried(node: fx.Node) -> list[fx.Node]:
    """The tensors that a carrier moves about."""
    return [argument for argument in node.all_input_nodes if is_tensor(argument)]


def _groups(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """Node -> the tensors that share a quantizer with it, itself among them."""
    ties: networkx.Graph[fx.Node] = networkx.Graph()
    for node in graph.nodes:
        if is_tensor(node):
            ties.add_node(node)
        if is_carrier(node) and is_tensor(node):
            ties.add_edges_from((node, source) for source in _carried(node))
    return {node: group for group in networkx.connected_components(ties) for node in group}


def _nonnegative(tensors: Iterable[fx.Node]) -> bool:
    """Whether a quantizer that these tensors share can do the work of the rectifiers that make them: they all cut at
    zero, and at the same ceiling."""
    tensors = list(tensors)
    if len({ceiling(tensor) for tensor in tensors if not is_carrier(tensor)}) > 1:
        return False
    return all(ceiling(tensor) is not None for tensor in tensors if not is_carrier(tensor))


def _end(kernel: fx.Node, groups: Mapping[fx.Node, set[fx.Node]]) -> fx.Node:
    """The tensor that a kernel ends in: its rectifier's, if nothing else reads the value before, and if the
    quantizer after the rectifier starts at zero, so that onnxruntime may drop the rectifier."""
    if len(kernel.users) == 1:
        (user,) = kernel.users
        if ceiling(user) is not None and _nonnegative(groups[user]):
            return user
    return kernel


def _leaves_integers(kernel: fx.Node, end: fx.Node, wanted: set[fx.Node]) -> bool:
    """Whether the output of a kernel must be quantized.  A linear layer without a rectifier may hand out floats, at
    the edge of the integer part of the graph; with one, onnxruntime would fuse the two into a float kernel.
    Convolutions and additions have no integer kernel with a float output."""
    if WEIGHTED.get(kernel.target) == "linear":
        return end is not kernel or end in wanted
    return True


def _wanted(kernels: list[fx.Node], groups: Mapping[fx.Node, set[fx.Node]]) -> set[fx.Node]:
    """Every tensor that an integer kernel reads or makes."""
    wanted = {tensor for kernel in kernels for read in _reads(kernel) for tensor in groups[read]}
    for kernel in kernels:
        end = _end(kernel, groups)
        if _leaves_integers(kernel, end, wanted):
            wanted |= groups[end]
    return wanted


def _activation_sites(graph: fx.Graph, kernels: list[fx.Node]) -> list[ActivationSite]:
    groups = _groups(graph)
    wanted = _wanted(kernels, groups)
    order = {node: number for number, node in enumerate(graph.nodes)}
    sites = []
    for node in graph.nodes:
        if node not in wanted or is_carrier(node):
            continue
        group = sorted(groups[node], key=order.__getitem__)
        origins = [member for member in group if not is_carrier(member)]
        if node is not origins[0]:
            continue
        shapes = [_sample_shape(origin) for origin in origins]
        sites.append(
            ActivationSite(
                key=node.name,
                kind="input" if node.op == "placeholder" else str(node.target).split(".")[1],
                shape=shapes[0],
                numel=sum(torch.Size(shape).numel() for shape in shapes),
                nodes=tuple(origin.name for origin in origins),
                carriers=tuple(member.name for member in group if is_carrier(member)),
                nonnegative=_nonnegative(origins),
                ceiling=min(ceiling(origin) or math.inf for origin in origins),
            )
        )
    return sites


def _layers(program: Program, kernels: list[fx.Node], site_of: Mapping[str, str]) -> list[Layer]:
    layers = []
    for node in kernels:
        if node.target not in WEIGHTED:
            continue
        source, weight_node, bias = (*operands(node), None)[:3]
        assert isinstance(source, fx.Node)
        assert isinstance(weight_node, fx.Node)
        weight = program.tensor(str(weight_node.target))
        positions = torch.Size(_sample_shape(node)).numel() // weight.shape[0]
        layers.append(
            Layer(
                node=node.name,
                operator=WEIGHTED[node.target],
                weight=str(weight_node.target),
                bias=str(bias.target) if isinstance(bias, fx.Node) else None,
                input=site_of[source.name],
                macs=positions * weight.numel(),
            )
        )
    return layers


def _why_float(program: Program, node: fx.Node, kept: set[fx.Node]) -> str | None:
    """The reason why a node that multiplies becomes no integer kernel; None if it does, or does not multiply."""
    if node in kept:
        return "kept in float by the user"
    if node.target in WEIGHTED:
        return None if _is_kernel(node) else f"{WEIGHTED[node.target]} whose weight is computed in the graph"
    if node.target in FLOAT_ONLY:
        return f"{FLOAT_ONLY[node.target]} has no integer lowering yet"
    if node.target is BATCH_NORM:
        return "batch-norm that no single layer before it could take in"
    for argument in node.all_input_nodes if node.op == "call_function" else ():
        if is_constant(argument) and program.tensor(str(argument.target)).ndim >= 2:
            return f"{node.target} takes {argument.target} and is no layer"
    return None


@dataclass(frozen=True)
class FindSites(Analysis):
    """`keep_float`: patterns, as in a shell, of the names of weights whose layers stay in float."""

    keep_float: tuple[str, ...] = ()
    gives: ClassVar[tuple[Kind, ...]] = (WeightSite, ActivationSite)

    def learn(self, program: Program, study: Study) -> Program:
        graph = program.graph.graph
        kept = {node for node in graph.nodes if node.target in WEIGHTED and self._keeps(operands(node)[1])}
        kernels = [node for node in graph.nodes if _is_kernel(node) and node not in kept]
        reasons = {node.name: _why_float(program, node, kept) for node in graph.nodes}
        left_float = {name: reason for name, reason in reasons.items() if reason is not None}
        activations = _activation_sites(graph, kernels)
        site_of = {name: site.key for site in activations for name in (*site.nodes, *site.carriers)}
        layers = _layers(program, kernels, site_of)
        if not layers:
            raise NothingToQuantize(
                "the graph has no convolution or linear layer with constant weights to quantize"
                + "".join(f"\n  {node}: {reason}" for node, reason in left_float.items())
            )
        kinds = {layer.weight: layer.operator for layer in layers}
        weights = [WeightSite(key, kind, tuple(program.tensor(key).shape)) for key, kind in kinds.items()]
        return replace(program, sites=(*weights, *activations), layers=tuple(layers), left_float=left_float)

    def _keeps(self, weight: object) -> bool:
        name = str(weight.target) if isinstance(weight, fx.Node) else ""
        return any(fnmatch(name, pattern) for pattern in self.keep_float)
