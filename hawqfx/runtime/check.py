"""The check of a file before it is given: does it compute in onnxruntime what the lowered graph computes?

Outputs are compared on one batch, with onnxruntime's optimizations on, as files are run.  Its integer kernels add
exactly, and round where the graph rounds: where outputs differ, by more than sums of floats in another order, the codes
are compared site by site with optimizations off (hawqfx.runtime.parity), and the first site that is wrong is named.

On x86 processors without VNNI, onnxruntime's fast kernels saturate sums of signed codes (hawqfx.export.targets).  The
check runs the exact kernels that onnxruntime has for such processors, which are for weights, and no integer kernels
where activations are multiplied by each other; then the fast ones, and tells how far they are off here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hawqfx.errors import ExportError
from hawqfx.export.inspection import has_signed_activations
from hawqfx.frontend.data import Batch
from hawqfx.ir.program import Program
from hawqfx.runtime import ort, parity
from hawqfx.runtime.parity import SiteCodes
from hawqfx.runtime.processor import saturates

SAME = 1e-4  # relative: sums of float32 in another order, through a deep network
ANYHOW = "check=False writes it all the same"
TIES = 0.01  # share of a site's codes that may lie on ties, where such a sum decides


def _most_ties(codes: int) -> float:
    """The most of so many codes that lie on ties: three standard errors of their number above the mean."""
    return 1 + TIES * codes + 3 * math.sqrt(TIES * codes)


@dataclass(frozen=True)
class FileCheck:
    """The difference between a file and the graph that it was made of, on some samples.

    Args:
        samples: their number.
        difference: of the outputs, relative to their norm; the largest over the outputs.
        agreement: share of the rows of the first output (along its last axis) whose largest entry is at the same place.
        flips: codes that differ between onnxruntime's integer kernels and none; None where outputs are alike.
        codes: codes that were compared.
        saturated: the difference with the fast kernels of this processor, where those saturate.
    """

    samples: int
    difference: float
    agreement: float
    flips: int | None = None
    codes: int = 0
    saturated: float | None = None

    def __str__(self) -> str:
        text = (
            f"outputs within {self.difference:.1e} of the graph's, the same largest entry in {self.agreement:.1%} of "
        )
        text += f"the rows, on {self.samples} samples"
        if self.flips is not None:
            text += f"; {self.flips} of {self.codes:,} codes differ, at ties"
        if self.saturated is not None:
            text += (
                f"; this processor has no VNNI and saturates sums of 8-bit codes: here the file is off by "
                f"{self.saturated:.1%}, elsewhere not (target='x86-avx2' is for such processors)"
            )
        return text


@torch.no_grad()
def check(program: Program, floating: Program, path: Path, batch: Batch) -> FileCheck:
    """Compare a file with the graph that it was exported from.

    Args:
        program: lowered.
        floating: the float network, which tells how much quantization changes.
        path: the file.
        batch: the inputs.

    Raises:
        BackendError: if the file does not load.
        ExportError: if it computes something else; the first site that differs is named.
    """
    inputs = [tensor.cpu().numpy() for tensor in batch.tensors]
    wanted = _answers(program, batch)
    integers = not (saturates() and has_signed_activations(path))
    found = _outputs(path, inputs, exact=True, integers=integers)
    difference, agreement = _compared(wanted, found)
    flips, codes = None, 0
    if difference > SAME:
        names = {site.key: site.name for site in program.activations}
        compared = parity.sites(program, path, batch)
        _refuse_wrong(compared, names, "the file computes other codes than the graph")
        optimized = parity.optimized_sites(program, path, inputs) if integers else compared
        _refuse_wrong(optimized, names, "onnxruntime's integer kernels compute other codes than the graph")
        noise, _ = _compared(_answers(floating, batch), wanted)
        if difference > noise:
            raise ExportError(
                f"the file's outputs differ from the graph's by {difference:.1e}, more than those from the float "
                f"network's by {noise:.1e}, though codes differ at ties alone; {ANYHOW}"
            )
        flips, codes = sum(site.flips for site in optimized), sum(site.codes for site in optimized)
    here, _ = _compared(found, _outputs(path, inputs))
    return FileCheck(batch.size, difference, agreement, flips, codes, here if here > max(SAME, difference) else None)


def _refuse_wrong(compared: Sequence[SiteCodes], names: Mapping[str, str], what: str) -> None:
    """Raises ExportError at the first site whose codes differ by more than ties, unless sites before it differ too:
    those may be the cause.  `names` are those of users for the keys of sites."""
    for site in compared:
        if site.largest > 1 or site.flips > _most_ties(site.codes):
            raise ExportError(
                f"{what} at {names.get(site.key, site.key)!r}: {site.flips:,} of {site.codes:,} differ, by up to "
                f"{site.largest}; {ANYHOW}"
            )
        if site.flips:
            return


def _answers(program: Program, batch: Batch) -> list[Tensor]:
    leaves = pytree.tree_leaves(program.run(batch.args, batch.kwargs))
    return [leaf.cpu() for leaf in leaves if isinstance(leaf, Tensor)]


def _outputs(path: Path, inputs: ort.Arrays, *, exact: bool = False, integers: bool = True) -> list[Tensor]:
    outputs = ort.run_exactly(path, inputs, optimize=integers) if exact else ort.run(ort.session(path), inputs)
    return [torch.from_numpy(output) for output in outputs]


def _compared(wanted: list[Tensor], found: list[Tensor]) -> tuple[float, float]:
    """The largest relative difference of outputs, and the share of rows of the first with the same largest entry.

    Raises:
        ExportError: if the file has other outputs.
    """
    shapes = [[tuple(tensor.shape) for tensor in each] for each in (wanted, found)]
    if shapes[0] != shapes[1]:
        raise ExportError(f"the file has outputs of shape {shapes[1]}, the graph of {shapes[0]}")
    differences = [0.0]
    for one, other in zip(wanted, found, strict=True):
        exact, given = one.double(), other.double()
        if not torch.equal(exact, given):  # infinities, as of masks, may be equal
            finite = torch.where(exact == given, 0.0, given - exact)
            size = torch.where(exact.isfinite(), exact, 0.0).norm()
            differences.append(float(finite.norm() / size.clamp_min(torch.finfo(torch.float64).tiny)))
    one, other = wanted[0], found[0]
    same = one.argmax(-1) == other.argmax(-1) if one.ndim and one.numel() else torch.ones(1)
    return max(differences), float(same.double().mean())
