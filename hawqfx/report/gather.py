"""From the programs of a compiled network to the rows of its page."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx

from hawqfx.analysis.liveness import schedule
from hawqfx.frontend.data import Batch
from hawqfx.ir.custom_ops import FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC
from hawqfx.ir.facts import ByteCost, ChosenFormat, Sensitivity
from hawqfx.ir.names import names_of, operator_name
from hawqfx.ir.program import Program
from hawqfx.maths.formats import FLOAT
from hawqfx.maths.latency_model import LatencyModel
from hawqfx.report.facts import KernelRow, MemoryRow, NodeRow, SiteRow

AT_ONCE = 8  # samples that noise is computed on together: all tensors of the float network are kept meanwhile


@torch.no_grad()
def noise_of(planned: Program, lowered: Program, batch: Batch) -> dict[str, float]:
    """The signal-to-noise ratio of every site: float tensors against those of the lowered network, with the errors of
    all sites before them.

    Args:
        planned: the float program with the chosen formats.
        lowered: made of it.
        batch: inputs to run both on.

    Returns:
        Site -> 10 log10(||x||^2 / ||x' - x||^2) in dB, over all tensors of the site; infinity where both are equal.
    """
    signal: defaultdict[str, float] = defaultdict(float)
    error: defaultdict[str, float] = defaultdict(float)

    def add(key: str, exact: Tensor, found: Tensor) -> None:
        exact, found = exact.detach().double(), found.detach().double()
        signal[key] += float(exact.square().sum())
        error[key] += float((found - exact).square().sum())

    for site in planned.weights:
        add(site.key, planned.tensor(site.key), lowered.tensor(site.key))
    site_of = {name: site.key for site in planned.activations for name in site.nodes}
    made = _quantized(lowered, site_of)
    for part in batch.split(AT_ONCE) if planned.dynamic_batch else [batch]:
        exact: dict[str, Tensor] = {}

        def keep(name: str, value: Tensor, exact: dict[str, Tensor] = exact) -> Tensor:
            exact[name] = value.clone()  # an operator in place may write into it later
            return value

        def compare(name: str, value: Tensor, exact: dict[str, Tensor] = exact) -> Tensor:
            add(site_of[made[name]], exact.pop(made[name]), value)
            return value

        planned.run(part.args, part.kwargs, keep, at=site_of)
        lowered.run(part.args, part.kwargs, compare, at=made)
    return {site.key: _decibels(signal[site.key], error[site.key]) for site in planned.sites}


def _quantized(lowered: Program, names: Mapping[str, str]) -> dict[str, str]:
    """Node of the lowered graph that has the quantized value -> the node of the float graph that has the exact one."""
    found = {}
    for node in lowered.graph.graph.nodes:
        if node.name in names:
            readers = [user for user in node.users if user.target in (FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC)]
            found[readers[0].name if readers else node.name] = node.name
    return found


def _decibels(signal: float, error: float) -> float:
    if error == 0:
        return math.inf
    return 10 * math.log10(signal / error) if signal else -math.inf


def site_rows(planned: Program, noise: Mapping[str, float], reasons: Mapping[str, str]) -> tuple[SiteRow, ...]:
    """The sites in the order in which the graph reads or makes them.

    Args:
        planned: the float program with the chosen formats.
        noise: of every site.
        reasons: for the bits of every site.
    """
    order = {
        str(node.target) if node.op == "get_attr" else node.name: number
        for number, node in enumerate(_by_use(planned.graph.graph))
    }
    weights = {site.key for site in planned.weights}
    rows = []
    for site in sorted(planned.sites, key=lambda site: order[site.key]):
        choice = planned.facts.get(site.key, ChosenFormat)
        known = planned.facts.get(site.key, Sensitivity) if planned.facts.has(site.key, Sensitivity) else None
        cost = planned.facts.get(site.key, ByteCost).bytes if planned.facts.has(site.key, ByteCost) else {}
        rows.append(
            SiteRow(
                site.key,
                site.name,
                "weight" if site.key in weights else "activation",
                site.kind,
                _times(site.shape),
                site.numel,
                choice.format.bits,
                str(choice.format),
                cost.get(choice.format),
                choice.increase,
                None if known is None else known.curvature,
                None if known is None else known.stderr,
                noise[site.key],
                reasons[site.key],
            )
        )
    return tuple(rows)


def _by_use(graph: fx.Graph) -> list[fx.Node]:
    """The nodes, each constant just before the first node that reads it."""
    nodes: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op != "get_attr":
            nodes |= dict.fromkeys(source for source in node.all_input_nodes if source.op == "get_attr")
            nodes[node] = None
    return list(nodes)


def node_rows(planned: Program) -> tuple[NodeRow, ...]:
    """The nodes of the float graph, without constants and sizes."""
    weight_of = {layer.node: layer.weight for layer in planned.layers}
    names, varying = names_of(planned.graph.graph), _varying(planned)
    hidden = {node for node in names if node.op == "get_attr" or isinstance(node.meta.get("val"), torch.SymInt)}
    shown = {node: name for node, name in names.items() if node not in hidden}
    return tuple(
        NodeRow(
            node.name,
            name,
            operator_name(node),
            _shape(node, varying),
            tuple(source.name for source in node.all_input_nodes if source in shown),
            weight_of.get(node.name),
            planned.site_of.get(node.name),
            planned.left_float.get(node.name, ""),
        )
        for node, name in shown.items()
    )


def memory_rows(planned: Program) -> tuple[MemoryRow, ...]:
    """The activation memory of one sample, packed in the chosen formats, at every node that makes a storage."""
    formats, names = planned.formats(), _by_key(planned)
    floating = dict.fromkeys(formats, FLOAT)
    return tuple(
        MemoryRow(number, names[step.node], step.bytes(formats), step.bytes(floating))
        for number, step in enumerate(schedule(planned))
    )


def kernel_rows(planned: Program) -> tuple[KernelRow, ...]:
    """The kernels with their latencies, slowest first; none, where nothing was timed."""
    if not planned.knows(LatencyModel):
        return ()
    formats, names = planned.formats(), _by_key(planned)
    rows = (
        KernelRow(names[each.node], each.weight, each.kernel(formats), each.seconds(formats), each.floating)
        for each in planned.about(LatencyModel).timed
    )
    return tuple(sorted(rows, key=lambda row: -row.seconds))


def _by_key(planned: Program) -> dict[str, str]:
    """Name of an fx node -> what users call its value."""
    return {node.name: name for node, name in names_of(planned.graph.graph).items()}


def _varying(program: Program) -> dict[str, str]:
    """Symbol of a size that varies -> the name of its dimension."""
    return {
        str(node.meta["val"].shape[number]): name
        for node in program.graph.graph.find_nodes(op="placeholder")
        for number, name in program.dimensions.get(node.name, {}).items()
    }


def _shape(node: fx.Node, names: Mapping[str, str]) -> str:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    return _times(re.sub(r"\w+", lambda part: names.get(part[0], part[0]), str(size)) for size in value.shape)


def _times(shape: Iterable[int | str]) -> str:
    return " × ".join(map(str, shape))  # noqa: RUF001
