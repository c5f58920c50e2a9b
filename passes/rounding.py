"""The integer codes of every weight in every format that it may take, and the squared error that they leave.

The method "nearest" is the paper's: every element goes to the nearest code, and the error is ||Q(W) - W||^2.  The
method "compensated" moves each rounding error to elements that are not rounded yet, by the second moment of the layer's
inputs, and weighs the error by this moment (hawqfx/analysis/compensation.py, hawqfx/maths/rounding.py); that of a
table is of the loss's slopes at what is looked up (hawqfx/analysis/table_moments.py).  Scales of blocks are chosen by
it too (hawqfx/maths/block_scales.py).  The method "sequential" does so too here, and makes the codes of the chosen
formats anew later (sequential_rounding.py).  benchmarks/accuracy.py measures both.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from hawqfx.analysis.compensation import compensated_anew, nearest
from hawqfx.errors import UsageError
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import Quantizers, RoundedWeights
from hawqfx.ir.program import Program
from hawqfx.ir.sites import WeightSite
from hawqfx.pass_manager.base import Analysis, Kind, option


@dataclass(frozen=True)
class Rounding(Analysis):
    """The integer codes of every weight in every format."""

    method: Literal["sequential", "compensated", "nearest"] = option(
        "sequential",
        "compensated: each rounding error moves to elements that are not rounded yet; nearest: it stays; sequential: "
        "compensated, and anew from quantized inputs once the formats are chosen",
    )
    block: int | None = option(
        None, "the most columns that are compensated together; by default 8,192, or fewer as free memory allows"
    )
    scales: bool = option(True, "whether scales of blocks are chosen anew, by the inputs; those of a plan are not")
    needs: ClassVar[tuple[Kind, ...]] = (WeightSite, Quantizers)
    gives: ClassVar[tuple[Kind, ...]] = (Quantizers, RoundedWeights)

    def __post_init__(self) -> None:
        if self.method not in ("sequential", "compensated", "nearest"):
            raise UsageError(f"rounding={self.method!r}: must be 'sequential', 'compensated' or 'nearest'")
        if self.block is not None and self.block < 1:
            raise UsageError(f"block={self.block}: at least one column is compensated at a time")

    @torch.no_grad()
    def learn(self, program: Program, context: Context) -> Program:
        if self.method != "nearest":
            quantizers, codes = compensated_anew(program, context, self.block, scales=self.scales)
            return program.learn(quantizers).learn(codes)
        known = {site.key: program.facts.get(site.key, Quantizers) for site in program.weights}
        return program.learn({key: nearest(program.tensor(key), widths) for key, widths in known.items()})
