"""Compare the exported file with the lowered graph, site by site and end to end.

With onnxruntime's optimizations off, the same float operations run on both sides; sums in another order differ in the
last bits.  Where a value lies on a rounding tie, this difference flips a code, and one flipped code changes all tensors
after it.  So the graph computes each quantized tensor from the values that onnxruntime had at the sites before it:
`flips` counts the codes that differ then, and `worst` is the largest relative difference of an output that is computed
from equal codes.  With optimizations on, integer kernels run, those that do not saturate (hawqfx.runtime.check), and
only outputs are compared.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from hawqfx.atomic_write import scratch_folder
from hawqfx.errors import ExportError
from hawqfx.export.inspection import expose_codes, expose_sites, operators
from hawqfx.frontend.data import Batch
from hawqfx.ir.custom_ops import FAKE_QUANTIZE, FAKE_QUANTIZE_BLOCKS, FAKE_QUANTIZE_DYNAMIC
from hawqfx.ir.operators import operands
from hawqfx.ir.program import SCALE, Program
from hawqfx.runtime import ort


@dataclass(frozen=True)
class Parity:
    """The differences between a file and the graph that it was exported from.

    Args:
        codes: codes of activations that were compared.
        flips: codes that differ.
        worst: largest difference of an output that is computed from equal codes, relative to the largest output.
        mean_difference: mean absolute difference of the optimized file's outputs.
        agreement: share of samples for which the optimized file has the same largest output.
    """

    codes: int
    flips: int
    worst: float
    mean_difference: float
    agreement: float


@dataclass(frozen=True)
class SiteCodes:
    """The codes of one tensor of a site, in two computations.

    Args:
        key: of the site.
        codes: their number.
        flips: codes that differ.
        largest: by how many steps, at most.
    """

    key: str
    codes: int
    flips: int
    largest: int

    @staticmethod
    def of(key: str, one: Tensor, other: Tensor, scale: float = 1.0) -> "SiteCodes":
        """The comparison of two tensors whose steps are `scale`."""
        steps = ((one.double() - other.double()) / scale).abs().round()
        return SiteCodes(key, steps.numel(), int((steps > 0).sum()), int(steps.max()) if steps.numel() else 0)


@torch.no_grad()
def sites(program: Program, path: str | Path, batch: Batch) -> list[SiteCodes]:
    """The codes of each quantized activation, in the order of the graph: by the graph, from the values that the file
    has at the sites before, and by the file, with onnxruntime's optimizations off."""
    inputs = [tensor.cpu().numpy() for tensor in batch.tensors]
    scales, _, exposed = _run_exposed(program, path, inputs)
    return _followed(program, batch, scales, exposed)[0]


def optimized_sites(program: Program, path: str | Path, inputs: ort.Arrays) -> list[SiteCodes]:
    """The codes of each quantized activation of a file, in its order: by onnxruntime's exact integer kernels, and with
    its optimizations off."""
    content, keys = expose_codes(path)
    both = _run_plainly(program, content, inputs), ort.run_exactly(content, inputs)
    plain, optimized = (outputs[-len(keys) or None :] for outputs in both)
    return [
        SiteCodes.of(key, torch.from_numpy(one), torch.from_numpy(other))
        for key, one, other in zip(keys, plain, optimized, strict=bool(keys))
    ]


@torch.no_grad()
def compare(program: Program, path: str | Path, batch: Batch) -> Parity:
    """Compare the first output and all quantized activations of a lowered program and of its file, on one batch.

    Args:
        program: lowered.
        path: the file that was exported from it.
        batch: the inputs.
    """
    inputs = [tensor.cpu().numpy() for tensor in batch.tensors]
    scales, reference, exposed = _run_exposed(program, path, inputs)
    found, followed = _followed(program, batch, scales, exposed)
    free = _first(program.run(batch.args, batch.kwargs))
    optimized = torch.from_numpy(ort.run_exactly(path, inputs)[0])
    return Parity(
        codes=sum(site.codes for site in found),
        flips=sum(site.flips for site in found),
        worst=float((followed - reference).abs().max() / reference.abs().max()),
        mean_difference=float((optimized - free).abs().mean()),
        agreement=float((optimized.argmax(1) == free.argmax(1)).float().mean()),
    )


def _followed(
    program: Program, batch: Batch, scales: Mapping[str, float], exposed: Mapping[str, Tensor]
) -> tuple[list[SiteCodes], Tensor]:
    """The codes of each fake-quantize node, computed from the file's values at the nodes before, and the first output
    from the file's values; the arguments are what `_run_exposed` gives."""
    found: list[SiteCodes] = []
    keys = {name: key for name, (key, _) in _quantizers(program).items()}

    def follow(name: str, value: Tensor) -> Tensor:
        found.append(SiteCodes.of(keys[name], value.cpu(), exposed[name], scales[name]))
        return exposed[name].to(value.device)

    return found, _first(program.run(batch.args, batch.kwargs, follow, at=scales))


def kernels(path: str | Path) -> dict[str, int]:
    """Name of an operator -> its number of nodes in the graph that onnxruntime runs on this machine."""
    with scratch_folder() as folder:
        saved = folder / "optimized.onnx"
        ort.session(path, save=saved)
        return dict(operators(saved))


def _run_exposed(
    program: Program, path: str | Path, inputs: ort.Arrays
) -> tuple[dict[str, float], Tensor, dict[str, Tensor]]:
    """Run the file without optimizations, and look at its quantized activations.

    Returns:
        The name of each fake-quantize node that the file has too -> its scale; the first output of the file; the name
        of each of these nodes -> the tensor that the file has there.
    """
    content, keys = expose_sites(path)
    values = [torch.from_numpy(value) for value in _run_plainly(program, content, inputs)]
    quantizers = _quantizers(program)
    for name in _quantizers_in_parts(program, quantizers, keys):
        del quantizers[name]
    if [key for key, _ in quantizers.values()] != keys:
        raise ExportError("the file quantizes other tensors than the graph")
    scales = {name: scale for name, (_, scale) in quantizers.items()}
    return scales, values[0], dict(zip(quantizers, values[len(values) - len(keys) :], strict=True))


def _run_plainly(program: Program, content: bytes, inputs: ort.Arrays) -> list[NDArray[np.generic]]:
    """All outputs of a file, with no more of onnxruntime's optimizations than it takes to compute as the graph does.

    Integer kernels run whatever the optimizations in layers that quantize their input in each run.
    """
    targets = {node.target for node in program.graph.graph.nodes}
    if FAKE_QUANTIZE_DYNAMIC in targets:
        return ort.run_exactly(content, inputs, optimize=False)
    return ort.run(ort.session(content, optimize=False, folded=FAKE_QUANTIZE_BLOCKS in targets), inputs)


def _quantizers(program: Program) -> dict[str, tuple[str, float]]:
    """Name of each fake-quantize node of an activation -> the key of the site and the scale."""
    sites = {site.key for site in program.activations}
    quantizers: dict[str, tuple[str, float]] = {}
    for node in program.graph.graph.find_nodes(op="call_function", target=FAKE_QUANTIZE):
        key = str(getattr(node.args[1], "target", "")).removesuffix(SCALE)
        if key in sites:
            quantizers[node.name] = key, float(program.tensor(key + SCALE))
    return quantizers


def _quantizers_in_parts(
    program: Program, quantizers: Mapping[str, tuple[str, float]], keys: Collection[str]
) -> list[str]:
    """The quantizers of inputs that the file replaces: it quantizes blocks of their pixels.

    The values are the same at other places; no sums come before them, so that there is nothing to compare.
    """
    nodes = [node for node in program.graph.graph.nodes if node.name in quantizers]
    inputs = {node.name for node in nodes if operands(node)[0].op == "placeholder"}
    return [name for name, (key, _) in quantizers.items() if name in inputs and key not in keys]


def _first(output: Any) -> Tensor:
    leaf = pytree.tree_leaves(output)[0]
    assert isinstance(leaf, Tensor)
    return leaf
