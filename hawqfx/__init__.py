"""hawqfx: the best mixed-precision integer model of a given size.

compiled = hawqfx.compile(model, "size=12.5%", calibration)
compiled.export("model.onnx")
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from hawqfx import errors as errors  # for `except hawqfx.errors.HawqfxError`

if TYPE_CHECKING:
    from hawqfx.allocation.budget import Budget, Limit
    from hawqfx.compiler import compile, measure_latency, pareto
    from hawqfx.session.compiled import Compiled
    from hawqfx.session.frontier import Frontier
    from hawqfx.session.load import load
    from hawqfx.session.plan import Plan
    from hawqfx.session.session import Session

__version__ = version("hawqfx")
__all__ = ["Budget", "Compiled", "Frontier", "Limit", "Plan", "Session", "compile", "load", "measure_latency", "pareto"]

# name -> its module, which is loaded when the name is first used: torch alone takes seconds
_MODULES = {
    "Budget": "hawqfx.allocation.budget",
    "Compiled": "hawqfx.session.compiled",
    "Frontier": "hawqfx.session.frontier",
    "Limit": "hawqfx.allocation.budget",
    "Plan": "hawqfx.session.plan",
    "Session": "hawqfx.session.session",
    "compile": "hawqfx.compiler",
    "load": "hawqfx.session.load",
    "measure_latency": "hawqfx.compiler",
    "pareto": "hawqfx.compiler",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'hawqfx' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _MODULES.keys())
