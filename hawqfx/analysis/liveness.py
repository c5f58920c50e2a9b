"""The tensors that are in memory while a node of the graph runs.

The schedule is the order of the graph.  A storage is live from the node that makes it to the last node that reads it;
inputs are live from the start, and outputs to the end.  Views and in-place operators share the storage of their source,
as their schemas say; the quantized copy of a float tensor has a storage of its own.  A rectifier shares the storage of
the kernel before it, if nothing else reads that storage, because both fuse.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from hawqfx.ir.graph import batch_size, captured_size
from hawqfx.ir.operators import COPY, ceiling
from hawqfx.ir.program import Program
from hawqfx.maths.formats import FLOAT_BITS, Format
from hawqfx.maths.packing import packed_bytes


@dataclass(frozen=True)
class Live:
    """The memory that one sample takes while a node runs.

    Args:
        node: name of the fx node.
        fixed: bytes that no choice of formats changes.
        elements: key of an activation site -> the elements of all its storages.
    """

    node: str
    fixed: int
    elements: Mapping[str, tuple[int, ...]]

    def bytes(self, formats: Mapping[str, Format]) -> int:
        """The memory where the sites have these formats."""
        return self.fixed + sum(stored_bytes(elements, formats[key]) for key, elements in self.elements.items())


def stored_bytes(elements: Sequence[int], width: Format) -> int:
    """Bytes of storages with so many elements each, packed in a format."""
    # a dynamic tensor lives as floats, until its reader quantizes it
    bits = width.bits if width.is_static else FLOAT_BITS
    return sum(packed_bytes(count, bits) for count in elements)


def live(program: Program) -> list[Live]:
    """The memory at the nodes where it may be largest.

    Args:
        program: with activation sites.

    Returns:
        The memory of one sample, in the order of the graph.  A node is left out if the memory at another node is at
        least as large in all formats.
    """
    steps = schedule(program)
    first = {(step.fixed, tuple(step.elements.items())): step for step in reversed(steps)}
    distinct = sorted(first.values(), key=steps.index)
    return [step for step in distinct if not any(other is not step and _within(step, other) for other in distinct)]


def schedule(program: Program) -> list[Live]:
    """The memory of one sample at every node that makes a storage, and at the output, in the order of the graph.

    Args:
        program: with activation sites.
    """
    storages = _storages(program)
    steps = []
    for step, node in enumerate(program.graph.graph.nodes):
        if any(storage.start == step for storage in storages) or node.op == "output":
            present = [storage for storage in storages if storage.start <= step <= storage.end]
            sites = {storage.site for storage in present if storage.site is not None}
            steps.append(
                Live(
                    node.name,
                    sum(storage.bytes for storage in present if storage.site is None),
                    {site: tuple(sorted(s.elements for s in present if s.site == site)) for site in sorted(sites)},
                )
            )
    return steps


def _within(step: Live, other: Live) -> bool:
    """Whether the memory at `other` is at least as large as that at `step`, in all formats."""
    return step.fixed <= other.fixed and all(
        sum(elements) <= sum(other.elements.get(site, ())) and set(elements) <= set(other.elements.get(site, ()))
        for site, elements in step.elements.items()
    )


@dataclass(frozen=True)
class _Storage:
    """A piece of memory.

    Args:
        start: position in the graph of the first node that it is live at.
        end: position of the last such node.
        elements: of one sample.
        bytes: of one sample, in the types of the float graph.
        site: key of the activation site, if the storage belongs to one.
    """

    start: int
    end: int
    elements: int
    bytes: int
    site: str | None


def _storages(program: Program) -> list[_Storage]:
    """The storages of a graph: the connected components, if nodes are tied to the source of their storage."""
    import networkx  # `hawqfx.compile` loads without it

    nodes = list(program.graph.graph.nodes)
    step = {node: number for number, node in enumerate(nodes)}
    batch = batch_size(program.graph.graph)
    site_of = program.site_of
    shared: networkx.Graph[fx.Node] = networkx.Graph()
    for node in nodes:
        if node.op != "get_attr" and _tensors(node):
            shared.add_node(node)
            source = _storage_source(node)
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
                elements=sum(captured_size(tensor.numel()) for tensor in tensors) // batch,
                bytes=sum(captured_size(tensor.numel()) * tensor.element_size() for tensor in tensors) // batch,
                site=min(sites, default=None),
            )
        )
    return storages


def _storage_source(node: fx.Node) -> fx.Node | None:
    """The node whose storage this node shares; None if it has a storage of its own."""
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
    """The tensors that a node returns, as recorded at capture."""
    return [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
