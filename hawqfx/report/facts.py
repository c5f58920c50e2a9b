"""What a page shows of a compiled network: plain values, which JSON holds."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """An entry of the headline or of how to reproduce: a label, its value, and a remark."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Point:
    """A plan beside others.

    Args:
        kind: "mixed precision", "uniform bits" or "this network".
        name: the budget, or the bits.
        amount: that it takes of the limit along which the plans are compared.
        loss: the predicted increase.
        share: `amount` over that of the float network.
    """

    kind: str
    name: str
    amount: float
    loss: float
    share: float


@dataclass(frozen=True)
class Curve:
    """Plans along a limit: its name, the unit of its amounts, and the plans."""

    limit: str
    unit: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class SiteRow:
    """A site.

    Args:
        key: of the site.
        name: that users call it.
        kind: "weight" or "activation".
        operator: the layer of a weight, or what makes an activation.
        shape: of the tensor; of one sample, for an activation.
        elements: their number.
        bits: of an element; 32 is float.
        format: in words.
        bytes: in the file (weight), or of one sample (activation).
        increase: of the loss, predicted.
        curvature: see Sensitivity; None where nothing was measured.
        stderr: of the curvature.
        noise: signal-to-noise ratio of the lowered tensor against the float one, in dB; infinite where both are equal.
        reason: for the bits.
    """

    key: str
    name: str
    kind: str
    operator: str
    shape: str
    elements: int
    bits: int
    format: str
    bytes: int | None
    increase: float
    curvature: float | None
    stderr: float | None
    noise: float
    reason: str


@dataclass(frozen=True)
class NodeRow:
    """A node of the graph.

    Args:
        key: name of the fx node.
        name: that users call its value.
        operator: that it calls.
        shape: of its value, as captured.
        inputs: keys of the nodes that it reads.
        weight: key of the weight that it multiplies by, if there is one.
        site: key of the activation site of its value, if it has one.
        floating: why it multiplies in float; empty if it does not.
    """

    key: str
    name: str
    operator: str
    shape: str
    inputs: tuple[str, ...]
    weight: str | None
    site: str | None
    floating: str


@dataclass(frozen=True)
class MemoryRow:
    """The bytes of one sample's activations that are live at a node, which has the name of its value: in the chosen
    formats and in float32."""

    step: int
    node: str
    bytes: int
    floating: int


@dataclass(frozen=True)
class KernelRow:
    """A kernel of onnxruntime: the name of its value, its weight, how it runs in the chosen formats, its seconds, and
    those in float."""

    node: str
    weight: str | None
    kernel: str
    seconds: float
    floating: float


@dataclass(frozen=True)
class Facts:
    """All that the page shows.

    Args:
        title: of the page.
        headline: the figures at the top.
        curve: the frontier; None if it is not known.
        sites: in the order of the network.
        nodes: of the float graph, in its order, without constants and sizes.
        memory: along the schedule.
        kernels: with their latencies; empty if these were not measured.
        noise_data: the samples that the noise was computed on, in words.
        reproduce: versions, seed and digests.
        summary: the text of Compiled.summary().
        absent: section -> why it is left out.
    """

    title: str
    headline: tuple[Figure, ...]
    curve: Curve | None
    sites: tuple[SiteRow, ...]
    nodes: tuple[NodeRow, ...]
    memory: tuple[MemoryRow, ...]
    kernels: tuple[KernelRow, ...]
    noise_data: str
    reproduce: tuple[Figure, ...]
    summary: str
    absent: dict[str, str]

    def to_json(self) -> str:
        """As JSON, with null for what is not finite."""
        return json.dumps(_finite(asdict(self)), allow_nan=False, separators=(",", ":"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
