"""The histogram of every activation of the float network over the calibration data, from one run over them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hawqfx.errors import DataError
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import ActivationHistogram
from hawqfx.ir.program import Program
from hawqfx.ir.sites import ActivationSite
from hawqfx.maths.histogram import Histogram
from hawqfx.pass_manager.base import Analysis, Kind


@dataclass(frozen=True)
class Histograms(Analysis):
    """The histogram of every activation."""

    needs: ClassVar[tuple[Kind, ...]] = (ActivationSite,)
    gives: ClassVar[tuple[Kind, ...]] = (ActivationHistogram,)

    @torch.no_grad()
    def learn(self, program: Program, context: Context) -> Mapping[str, ActivationHistogram]:
        histograms = {site.key: Histogram() for site in program.activations}
        site_of = program.site_of

        def count(node: str, value: Tensor) -> Tensor:
            key = site_of[node]
            try:
                histograms[key].add(value)
            except ValueError as error:
                raise DataError(f"the activation {key!r} is not finite on the calibration data") from error
            return value

        for batch in context.track(context.batches, self.name, len(context.batches)):
            program.run(batch.args, batch.kwargs, count)
        return {key: ActivationHistogram(*histogram.filled()) for key, histogram in histograms.items()}
