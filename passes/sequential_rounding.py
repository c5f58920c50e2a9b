"""The codes of a plan, made anew layer by layer, from inputs that are quantized already.

The rounding before a plan knows every format of every weight, and takes the inputs of the float network.  Once formats
are chosen, the inputs of each layer are known as they will be, with the errors of all layers before it.  So the float
network and the quantized one are walked through side by side (hawqfx/learning/sequential.py), and each weight is
rounded towards the weight that gives the float layer's outputs from its quantized inputs, each row in the scale that
leaves the least error, from where its codes descend (hawqfx/analysis/asymmetric.py).  Of layers that rectifiers read,
mean errors are taken out of the biases then, see bias_correction.py; of others with a bias of their own, by the same
least squares.

KL divergence from float on data held out, with compensated codes and corrected biases / so: ResNet-20 (512 images)
with 3 bits on average .0065 / .0021, 2.5 bits .064 / .0039, uniform 2 bits 1.23 / .015; EfficientNet-Lite0
(64 pictures) with uniform 4 bits .24 / .13.  benchmarks/rounding.py measures it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from hawqfx.frontend.context import Context
from hawqfx.ir.facts import ChosenFormat, Quantizers, RoundedWeights
from hawqfx.ir.program import Program
from hawqfx.ir.sites import ActivationSite, WeightSite
from hawqfx.learning.sequential import coded_anew
from hawqfx.pass_manager.base import Analysis, Kind, option


@dataclass(frozen=True)
class SequentialRounding(Analysis):
    """The codes of a plan, fitted layer by layer to the float network from quantized inputs."""

    biases: bool = option(True, "whether biases move too")
    scales: bool = option(True, "whether the scales of rows are chosen anew; those of a plan that is followed are not")
    needs: ClassVar[tuple[Kind, ...]] = (WeightSite, ActivationSite, Quantizers, RoundedWeights, ChosenFormat)
    gives: ClassVar[tuple[Kind, ...]] = (Quantizers, RoundedWeights)

    @torch.no_grad()
    def learn(self, program: Program, context: Context) -> Program:
        return coded_anew(program, context, self.name, biases=self.biases, scales=self.scales)
