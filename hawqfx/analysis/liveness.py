"""Which tensors are in memory while each node of the graph runs.

The schedule is the order of the graph.  A storage is live from the node that makes it to the last that reads it, inputs
from the start and outputs to the end.  Views and in-place operators share the storage that they look at, as their
schemas say; what is quantized beside the float tensor that it copies has a storage of its own.  A rectifier shares
one with the kernel before it, if nothing else reads that one: both fuse.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import networkx
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from hawqfx.ir.operators import COPY, ceiling
from hawqfx.ir.program import Program


@dataclass(frozen=True)
class Live:
    """What is in memory while `node` runs, of one sample: bytes that no choice of bits changes, and by activation site
    the elements of each of its storages."""

    node: str
    fixed: int
    elements: Mapping[str, tuple[int, ...]]


def live(program: Program) -> list[Live]:
    """Of every node that makes a storage, in order; nodes at which no more is live than at another are left out."""
    storages = _storages(program)
    found = []
    for step, node in enumerate(program.graph.graph.nodes):
        if any(storage.start == step for storage in storages) or node.op == "output":
            there = [storage for storage in storages if storage.start <= step <= storage.end]
            sites = {storage.site for storage in there if storage.site is not None}
            found.append(
                Live(
                    node.name,
                    sum(storage.bytes for storage in there if storage.site is None),
                    {site: tuple(sorted(s.elements for s in there if s.site == site)) for site in sorted(sites)},
                )
            )
    distinct = {(step.fixed, tuple(step.elements.items())): step for step in reversed(found)}
    steps = sorted(distinct.values(), key=found.index)
    return [step for step in steps if not any(other is not step and _within(step, other) for other in steps)]


def _within(step: Live, other: Live) -> bool:
    """Whether the other step has all that is live at this one, whatever the bits."""
    return step.fixed <= other.fixed and all(
        sum(elements) <= sum(other.elements.get(site, ())) and set(elements) <= set(other.elements.get(site, ()))
        for site, elements in step.elements.items()
    )


@dataclass(frozen=True)
class _Storage:
    start: int
    end: int
    elements: int
    bytes: int
    site: str | None


def _storages(program: Program) -> list[_Storage]:
    nodes = list(program.graph.graph.nodes)
    step = {node: number for number, node in enumerate(nodes)}
    batch = _batch(program)
    site_of = {name: site.key for site in program.activations for name in (*site.nodes, *site.data_movement)}
    shared: networkx.Graph[fx.Node] = networkx.Graph()
    for node in nodes:
        if node.op != "get_attr" and _tensors(node):
            shared.add_node(node)
            source = _looks_at(node)
            if source is not None and source.op != "get_attr":
                shared.add_edge(node, source)
    storages = []
    for members in networkx.connected_components(shared):
        first = min(members, key=step.__getitem__)
        sites = {site_of[member.name] for member in members if member.name in site_of}
        tensors = _tensors(first)
        storages.append(
            _Storage(
                start=0 if first.op == "placeholder" else step[first],
                end=max(step[user] for member in members for user in (member, *member.users)),
                elements=sum(_hint(tensor.numel()) for tensor in tensors) // batch,
                bytes=sum(_hint(tensor.numel()) * tensor.element_size() for tensor in tensors) // batch,
                site=min(sites, default=None),
            )
        )
    return storages


def _looks_at(node: fx.Node) -> fx.Node | None:
    """The node whose storage this one shares."""
    sources = node.all_input_nodes
    if node.target is COPY:
        return None
    if node.target is operator.getitem:
        return sources[0]
    if ceiling(node) is not None and len(sources[0].users) == 1:
        return sources[0]
    if isinstance(node.target, OpOverload) and any(r.alias_info is not None for r in node.target._schema.returns):
        return sources[0]
    return None


def _tensors(node: fx.Node) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]


def _batch(program: Program) -> int:
    first = next(iter(program.graph.graph.find_nodes(op="placeholder")))
    return _hint(first.meta["val"].shape[0])


def _hint(size: object) -> int:
    """A size as it was when the graph was captured."""
    return size if isinstance(size, int) else int(size.node.hint)  # type: ignore[attr-defined]
