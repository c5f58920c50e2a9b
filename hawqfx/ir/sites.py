"""The places of a graph where bits are chosen, and the nodes that multiply."""

import math
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Layer:
    """A use of a weight: the fx node that multiplies an activation by it.

    Args:
        node: name of the fx node.
        operator: such as "conv2d" or "linear".
        weight: key of the weight's site.
        bias: qualified name of the bias, if there is one.
        input: key of the input's site.
        macs: multiplications of one sample.
    """

    node: str
    operator: str
    weight: str
    bias: str | None
    input: str
    macs: int


@dataclass(frozen=True)
class Product:
    """An fx node that multiplies two activations, the keys of both sites, and the multiplications of one sample."""

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
    def name(self) -> str:
        """What users call it."""
        return self.key

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class ActivationSite:
    """Tensors that share one quantizer.

    Args:
        key: name of the first of `nodes`.
        kind: the operator that makes the first tensor, or "input".
        shape: of one sample at the first node.
        numel: elements of one sample over all of `nodes`.
        nodes: names of the fx nodes that compute the tensors.
        data_movement: names of nodes that only move values of these tensors (reshape, max-pool, concat); they keep the
            same quantizer.
        nonnegative: whether rectifiers make all of the tensors.
        ceiling: the largest value that these rectifiers let pass.
        name: what users call it (hawqfx.ir.names); no part of what the site is, so that measurements are found again.
    """

    key: str
    kind: str
    shape: tuple[int, ...]
    numel: int
    nodes: tuple[str, ...]
    data_movement: tuple[str, ...]
    nonnegative: bool
    ceiling: float = math.inf
    name: str = field(default="", repr=False, compare=False)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all nodes whose tensors have this quantizer."""
        return (*self.nodes, *self.data_movement)


Site = WeightSite | ActivationSite
