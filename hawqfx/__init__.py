"""hawqfx: the best mixed-precision integer model of a given size.

compiled = hawqfx.compile(model, "size=12.5%", calibration)
compiled.export("model.onnx")
"""

from importlib.metadata import version

from hawqfx.allocation.budget import Budget, Limit
from hawqfx.compiler import compile, measure_latency, pareto
from hawqfx.session.compiled import Compiled
from hawqfx.session.frontier import Frontier
from hawqfx.session.load import load
from hawqfx.session.plan import Plan
from hawqfx.session.session import Session

__version__ = version("hawqfx")
__all__ = ["Budget", "Compiled", "Frontier", "Limit", "Plan", "Session", "compile", "load", "measure_latency", "pareto"]
