"""sources: texts of graphs go when their graphs go, and those of graphs that are kept stay for tracebacks."""

import gc
import linecache

from torch import fx, nn

import hawqfx
from hawqfx.ir.sources import _SOURCES, dropped_sources
from tests.nets import Plain, build, images


def made() -> fx.GraphModule:
    return fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.Tanh()))


def lines(graph: fx.GraphModule) -> list[str]:
    return linecache.getlines(type(graph).forward.__code__.co_filename)


def test_sources_go_with_their_graphs() -> None:
    earlier = made()
    with dropped_sources() as kept:
        dropped, stays = made(), made()
        assert lines(dropped)
        assert lines(stays)
        kept.append(stays)
    assert lines(earlier)
    assert lines(stays)
    assert not lines(dropped)
    name = type(stays).forward.__code__.co_filename
    del stays
    kept.clear()
    gc.collect()
    assert name not in _SOURCES


def test_a_compiled_network_has_its_source_and_leaves_few() -> None:
    def once() -> hawqfx.Compiled:
        return hawqfx.compile(build(Plain), "weight_bits=4", images(), sensitivity="mse", rounding="nearest")

    compiled = once()
    assert isinstance(compiled.model, fx.GraphModule)
    assert any("fake_quantize" in line for line in lines(compiled.model))
    gc.collect()
    before = len(_SOURCES)
    for _ in range(3):
        once()
        gc.collect()
    assert len(_SOURCES) - before <= 1  # a cycle that is not collected yet
