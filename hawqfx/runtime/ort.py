"""onnxruntime: run a file, list the kernels that it chose, and time files side by side."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

CPU = "CPUExecutionProvider"
Arrays = Sequence[NDArray[np.generic]]


def session(
    model: str | Path | bytes,
    *,
    threads: int = 0,
    optimize: bool = True,
    save: Path | None = None,
    provider: str = CPU,
) -> onnxruntime.InferenceSession:
    """A session of a file or its content, on the processor unless another `provider` is asked for; `threads=0` lets
    onnxruntime choose.  With `save`, the graph as onnxruntime optimized it for this machine is written there."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    if save is not None:
        options.optimized_model_filepath = str(save)
    return onnxruntime.InferenceSession(
        model if isinstance(model, bytes) else str(model), options, providers=list(dict.fromkeys((provider, CPU)))
    )


def run(model: onnxruntime.InferenceSession, inputs: Arrays) -> list[NDArray[np.generic]]:
    """All outputs for one batch; inputs in the order of the file's."""
    names = [value.name for value in model.get_inputs()]
    return list(model.run(None, dict(zip(names, inputs, strict=True))))


@dataclass(frozen=True)
class Latency:
    """Seconds of one run: median and 90th percentile over `runs`."""

    median: float
    p90: float
    runs: int


BURST = 8


def latency(
    paths: Mapping[str, str | Path], inputs: Arrays, *, threads: int = 1, rounds: int = 100
) -> dict[str, Latency]:
    """Time several files on the same inputs, so many runs each; see `_in_turns`."""
    sessions = [session(path, threads=threads) for path in paths.values()]
    found = _in_turns(
        [lambda model=model: run(model, inputs) for model in sessions],  # type: ignore[misc]
        lambda seconds: len(seconds) < rounds,
    )
    return {
        name: Latency(statistics.median(times), statistics.quantiles(times, n=10)[-1], len(times))
        for name, times in zip(paths, found, strict=True)
    }


def steady(
    models: Sequence[bytes | str | Path],
    feeds: Sequence[Mapping[str, NDArray[np.generic]]],
    *,
    threads: int,
    budget: float,
) -> list[float]:
    """Seconds of one run of each model, the median for about so many seconds in all; see `_in_turns`."""
    sessions = [session(model, threads=threads) for model in models]
    end = time.perf_counter() + budget
    found = _in_turns(
        [lambda model=model, feed=feed: model.run(None, feed) for model, feed in zip(sessions, feeds, strict=True)],  # type: ignore[misc]
        lambda seconds: not seconds or time.perf_counter() < end,
    )
    return [statistics.median(times) for times in found]


def _in_turns(runs: Sequence[Callable[[], object]], more: Callable[[Sequence[float]], bool]) -> list[list[float]]:
    """Seconds of runs that take turns, so that noise and drift of the machine meet all alike, while the first needs
    `more`.  Turns are bursts, of which the first runs only bring the caches into the state that they have where one
    model runs again and again, as it does where it is deployed."""
    seconds: list[list[float]] = [[] for _ in runs]
    while seconds and more(seconds[0]):
        for each, times in zip(runs, seconds, strict=True):
            for turn in range(BURST):
                start = time.perf_counter()
                each()
                if turn >= BURST // 4:
                    times.append(time.perf_counter() - start)
    return seconds


def providers() -> list[str]:
    """What this onnxruntime can run on."""
    return list(onnxruntime.get_available_providers())


def inputs(path: str | Path) -> list[tuple[str, list[int | str], str]]:
    """Name, shape and type of each input of a file."""
    return [(value.name, value.shape, value.type) for value in session(path).get_inputs()]


def version() -> str:
    return str(onnxruntime.__version__)
