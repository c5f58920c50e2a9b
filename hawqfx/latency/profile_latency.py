"""The pass that times a network, for limits on latency."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hawqfx.frontend.context import Context
from hawqfx.ir.facts import NETWORK, Quantizers, RoundedWeights
from hawqfx.ir.program import Program
from hawqfx.latency import profiler
from hawqfx.maths.latency_model import LatencyModel
from hawqfx.pass_manager.base import Analysis, Kind, option


@dataclass(frozen=True)
class ProfileLatency(Analysis):
    """Times the parts of the network at a shape, and gives its LatencyModel."""

    threads: int = option(1, "threads of onnxruntime")
    shape: Mapping[str, int] | None = option(
        None, "sizes of dimensions that vary, by name; else one sample, and the sizes of the first batch"
    )
    cache: Path | None = option(None, "the folder of timings; None: the user's cache folder")
    needs: ClassVar[tuple[Kind, ...]] = (Quantizers, RoundedWeights)
    gives: ClassVar[tuple[Kind, ...]] = (LatencyModel,)

    def learn(self, program: Program, context: Context) -> Mapping[str, LatencyModel]:
        """The latency model, as a fact about the whole network.

        Raises:
            UsageError: if an activation has no quantizer at 8 bits, or a weight has none.
            BudgetError: if the network cannot take the shape.
            CacheError: if timings cannot be kept.
        """
        model = profiler.profile(
            program,
            context.batches[0],
            threads=self.threads,
            shape=self.shape or {},
            cache=self.cache,
            progress=context.progress,
        )
        return {NETWORK: model}
