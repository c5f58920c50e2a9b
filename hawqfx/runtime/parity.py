"""Does the file compute what the lowered graph computes?  Checked site by site, and end to end.

With onnxruntime's optimizations off the same float operations run on both sides, and sums in another order differ in
the last bits.  Where a value lies on a rounding tie, that flips a code; one flipped code changes everything after it.
So each quantized tensor is compared with the values that onnxruntime itself had at those before: `flips` counts codes
that differ there, and `worst` is the largest relative difference of an output computed from equal codes.
With optimizations on, integer kernels run, and only outputs are compared.
"""

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hawqfx.export.exporter import expose_sites, operators
from hawqfx.frontend.context import Batch
from hawqfx.ir.custom_ops import FAKE_QUANTIZE
from hawqfx.ir.operators import operands
from hawqfx.ir.program import SCALE, Program
from hawqfx.runtime import ort


@dataclass(frozen=True)
class Parity:
    """flips of `codes` compared; worst relative difference of the outputs, to the largest of them, from equal codes.

    mean_difference and agreement: of the optimized file's outputs, mean absolute difference and equal top-1."""

    codes: int
    flips: int
    worst: float
    mean_difference: float
    agreement: float


@torch.no_grad()
def compare(program: Program, path: str | Path, batch: Batch) -> Parity:
    """The lowered program against the file that was exported from it, on one batch."""
    inputs = [tensor.numpy() for tensor in batch.tensors]
    content, keys = expose_sites(path)
    values = ort.run(ort.session(content, optimize=False), inputs)
    outputs = len(values) - len(keys)
    counts = {"codes": 0, "flips": 0}
    nodes = _quantizers(program)
    for name in _parted(program, nodes, keys):
        del nodes[name]
    assert [key for key, _ in nodes.values()] == keys, "the file quantizes other tensors than the graph"
    theirs = {name: torch.from_numpy(value) for name, value in zip(nodes, values[outputs:], strict=True)}

    def follow(name: str, value: Tensor) -> Tensor:
        counts["codes"] += value.numel()
        counts["flips"] += int(((value - theirs[name]).abs() > nodes[name][1] / 2).sum())
        return theirs[name]

    followed = _first(program.run(batch.args, batch.kwargs, follow, at=nodes))
    reference = torch.from_numpy(values[0])
    free = _first(program.run(batch.args, batch.kwargs))
    optimized = torch.from_numpy(ort.run(ort.session(path), inputs)[0])
    return Parity(
        codes=counts["codes"],
        flips=counts["flips"],
        worst=float((followed - reference).abs().max() / reference.abs().max()),
        mean_difference=float((optimized - free).abs().mean()),
        agreement=float((optimized.argmax(1) == free.argmax(1)).float().mean()),
    )


def kernels(path: str | Path) -> dict[str, int]:
    """How often each operator stands in the graph that onnxruntime runs on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "optimized.onnx"
        ort.session(path, save=saved)
        return dict(operators(saved))


def _quantizers(program: Program) -> dict[str, tuple[str, float]]:
    """The fake-quantize nodes of activations -> the key of the site and its scale."""
    sites = {site.key for site in program.activations}
    found: dict[str, tuple[str, float]] = {}
    for node in program.graph.graph.find_nodes(op="call_function", target=FAKE_QUANTIZE):
        key = str(getattr(node.args[1], "target", "")).removesuffix(SCALE)
        if key in sites:
            found[node.name] = key, float(program.tensor(key + SCALE))
    return found


def _parted(program: Program, nodes: Mapping[str, tuple[str, float]], keys: Collection[str]) -> list[str]:
    """Quantizers of inputs that the file has not, since it quantizes blocks of their pixels: the same values elsewhere,
    of which no sums are taken."""
    of_inputs = {n.name for n in program.graph.graph.nodes if n.name in nodes and operands(n)[0].op == "placeholder"}
    return [name for name, (key, _) in nodes.items() if name in of_inputs and key not in keys]


def _first(output: Any) -> Tensor:
    leaf = pytree.tree_leaves(output)[0]
    assert isinstance(leaf, Tensor)
    return leaf
