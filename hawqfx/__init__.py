"""hawqfx: the best mixed-precision integer model of a given size.

compiled = hawqfx.compile(model, "size=12.5%", calibration)
compiled.export("model.onnx")
"""

from importlib.metadata import version

from hawqfx.budget import Budget, Limit
from hawqfx.compiler import Compiled, Session, compile
from hawqfx.plan import Plan

__version__ = version("hawqfx")
__all__ = ["Budget", "Compiled", "Limit", "Plan", "Session", "compile"]
