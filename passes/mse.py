"""The simplest metric, for comparison: the squared error ||Q_b(x) - x||^2 alone, as if all sites mattered equally."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hawqfx.frontend.context import Context
from hawqfx.ir.facts import LossIncrease, QuantizationError
from hawqfx.ir.program import Program
from hawqfx.pass_manager.base import Analysis, Kind


@dataclass(frozen=True)
class Mse(Analysis):
    """The squared error as the loss increase."""

    needs: ClassVar[tuple[Kind, ...]] = (QuantizationError,)
    gives: ClassVar[tuple[Kind, ...]] = (LossIncrease,)

    def learn(self, program: Program, context: Context) -> Mapping[str, LossIncrease]:
        errors = {site.key: program.facts.get(site.key, QuantizationError).squared_error for site in program.sites}
        return {key: LossIncrease(by_format, dict.fromkeys(by_format, 0.0)) for key, by_format in errors.items()}
