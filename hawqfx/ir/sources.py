"""The source texts of fx graphs, which torch keeps for tracebacks as long as the process lives: some 0.2 MB for every
network that is compiled and exported."""

import linecache
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx
from torch.fx import graph_module

_SOURCES: dict[str, str] = graph_module._loader.eval_cache  # name of a made file -> its text


@contextmanager
def dropped_sources() -> Iterator[list[fx.GraphModule]]:
    """Let go of the sources of the graphs that are made meanwhile, but of those in the list: theirs go with them."""
    before, kept = set(_SOURCES), list[fx.GraphModule]()
    try:
        yield kept
    finally:
        own = {graph: type(graph).forward.__code__.co_filename for graph in kept}
        for graph, name in own.items():
            weakref.finalize(graph, _drop, name).atexit = False
        for name in set(_SOURCES) - before - set(own.values()):
            _drop(name)


def _drop(name: str) -> None:
    _SOURCES.pop(name, None)
    linecache.cache.pop(name, None)
