"""hawqfx: the best mixed-precision integer model of a given size.

compiled = hawqfx.compile(model, "size=12.5%", calibration)
compiled.export("model.onnx")
"""

from importlib.metadata import version

from hawqfx.budget import Budget, Limit
from hawqfx.compiler import compile, measure_latency, pareto
from hawqfx.frontier import Frontier
from hawqfx.plan import Plan
from hawqfx.session import Compiled, Session

__version__ = version("hawqfx")
__all__ = ["Budget", "Compiled", "Frontier", "Limit", "Plan", "Session", "compile", "measure_latency", "pareto"]
