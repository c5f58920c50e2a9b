"""Keep the float network as it is before its operators are rewritten for integer kernels.

Its bytes are 100% of a size, and its file is the float file that a compiled one is compared with: SiLU and attention
stay operators that onnxruntime fuses.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hawqfx.frontend.context import Context
from hawqfx.ir.facts import NETWORK, FloatNetwork
from hawqfx.ir.program import Program
from hawqfx.pass_manager.base import Analysis, Kind


@dataclass(frozen=True)
class FloatReference(Analysis):
    gives: ClassVar[tuple[Kind, ...]] = (FloatNetwork,)

    def learn(self, program: Program, context: Context) -> Mapping[str, FloatNetwork]:
        return {NETWORK: FloatNetwork(program.graph)}
