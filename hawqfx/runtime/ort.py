"""onnxruntime: run a file, list the kernels that it chose, and time files side by side."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from hawqfx.errors import BackendError

CPU = "CPUExecutionProvider"
Arrays = Sequence[NDArray[np.generic]]


def session(
    model: str | Path | bytes,
    *,
    threads: int = 0,
    optimize: bool = True,
    save: Path | None = None,
    provider: str = CPU,
    exact: bool = False,
    folded: bool = False,
) -> onnxruntime.InferenceSession:
    """A session of onnxruntime.

    Args:
        model: a file, or the content of one.
        threads: of one operator; 0 lets onnxruntime choose.
        optimize: whether onnxruntime may fuse and replace operators.
        save: a file to write the graph to, as onnxruntime optimized it for this machine.
        provider: runs the operators that it supports; the processor runs the others.
        exact: whether x86 processors without VNNI run integer kernels that are slower, and do not saturate sums.  That
            takes optimizations: with optimize=False, most stay, but not the choice of integer kernels for
            QuantizeLinear and DequantizeLinear.
        folded: whether constants are folded with optimize=False too, and whatever else leaves values as they are
            (onnxruntime's basic level): kernels of weight-only layers are fast, and round their input, only where the
            weight is a constant.

    Raises:
        BackendError: if onnxruntime does not load the model.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    level = onnxruntime.GraphOptimizationLevel
    least = level.ORT_ENABLE_BASIC if folded else level.ORT_DISABLE_ALL
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize or exact else least
    disabled = [] if optimize or not exact else ["QDQSelectorActionTransformer"]
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
        # by this, 1.32 makes the codes of float layers unsigned, with one zero-point for all their scales, and fails to
        # run them; those of integer kernels are another's work
        disabled.append("QDQS8ToU8Transformer")
    if save is not None:
        options.optimized_model_filepath = str(save)
    content = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(
            content, options, providers=list(dict.fromkeys((provider, CPU))), disabled_optimizers=disabled
        )
    except Exception as error:  # onnxruntime has a class of its own for each failure
        name = "the model" if isinstance(model, bytes) else str(model)
        raise BackendError(f"{name} cannot be loaded by onnxruntime {version()}: {error}") from error


def run_exactly(model: str | Path | bytes, inputs: Arrays, *, optimize: bool = True) -> list[NDArray[np.generic]]:
    """All outputs for one batch, by integer kernels that do not saturate.

    1.32 cannot load weights that layers share for those kernels: then without kernels in place of QuantizeLinear and
    DequantizeLinear, and, where layers that quantize their input in each run share weights too, by fast ones, which
    may saturate.

    Args:
        model: a file, or the content of one.
        inputs: an array for each input of the file, in the same order.
        optimize: whether QuantizeLinear and DequantizeLinear become integer kernels, too.

    Raises:
        BackendError: if the model does not load, or if a kernel fails.
    """
    for optimized in (True, False) if optimize else (False,):
        try:
            return run(session(model, optimize=optimized, exact=True), inputs)
        except BackendError:  # a file that is wrong fails again
            pass
    return run(session(model, optimize=False, folded=True), inputs)


def run(model: onnxruntime.InferenceSession, inputs: Arrays) -> list[NDArray[np.generic]]:
    """All outputs for one batch.

    Args:
        model: a session.
        inputs: an array for each input of the file, in the same order.

    Raises:
        BackendError: if a kernel fails on them.
    """
    names = [value.name for value in model.get_inputs()]
    try:
        return list(model.run(None, dict(zip(names, inputs, strict=True))))
    except Exception as error:  # onnxruntime has a class of its own for each failure
        raise BackendError(f"onnxruntime {version()} loads the network and fails to run it: {error}") from error


@dataclass(frozen=True)
class Latency:
    """Seconds of one run.

    Args:
        median: over all runs.
        p90: the 90th percentile over all runs.
        runs: their number.
    """

    median: float
    p90: float
    runs: int


BURST = 8  # runs of a model in a turn
COLD = BURST // 4  # the first runs of a turn, which are not timed


def latency(
    paths: Mapping[str, str | Path], inputs: Arrays, *, threads: int = 1, rounds: int = 100
) -> dict[str, Latency]:
    """Latencies of several files on the same inputs, measured in turns (see `_in_turns`).

    Args:
        paths: name -> file.
        inputs: an array for each input, in the order of the files.
        threads: of one operator.
        rounds: the least number of timed runs of each file.

    Returns:
        The latency of each file by name.
    """
    sessions = [session(path, threads=threads) for path in paths.values()]
    seconds = _in_turns(
        [lambda model=model: run(model, inputs) for model in sessions],  # type: ignore[misc]
        lambda seconds: len(seconds) < rounds,
    )
    return {
        name: Latency(statistics.median(times), statistics.quantiles(times, n=10)[-1], len(times))
        for name, times in zip(paths, seconds, strict=True)
    }


def steady(
    models: Sequence[bytes | str | Path],
    feeds: Sequence[Mapping[str, NDArray[np.generic]]],
    *,
    threads: int,
    budget: float,
) -> list[float]:
    """Median seconds of one run of each of several models, measured in turns (see `_in_turns`).

    Args:
        models: files, or the content of files.
        feeds: for each model, name of an input -> array.
        threads: of one operator.
        budget: seconds for the runs of all models together; each model has at least one turn.
    """
    sessions = [session(model, threads=threads) for model in models]
    end = time.perf_counter() + budget
    seconds = _in_turns(
        [lambda model=model, feed=feed: model.run(None, feed) for model, feed in zip(sessions, feeds, strict=True)],  # type: ignore[misc]
        lambda seconds: not seconds or time.perf_counter() < end,
    )
    return [statistics.median(times) for times in seconds]


def _in_turns(runs: Sequence[Callable[[], object]], more: Callable[[Sequence[float]], bool]) -> list[list[float]]:
    """Time functions in turns, so that noise and drift of the machine meet all of them alike.

    A turn is a burst of runs of one function.  The first runs of a burst are not timed: they bring the caches into the
    state that they have where one model runs again and again, as in deployment.

    Args:
        runs: the functions.
        more: whether another turn is needed, by the seconds of the first function.

    Returns:
        The seconds of all timed runs of each function.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    while seconds and more(seconds[0]):
        for step, times in zip(runs, seconds, strict=True):
            for turn in range(BURST):
                start = time.perf_counter()
                step()
                if turn >= COLD:
                    times.append(time.perf_counter() - start)
    return seconds


def providers() -> list[str]:
    """Names of the execution providers of this onnxruntime, such as "CPUExecutionProvider"."""
    return list(onnxruntime.get_available_providers())


def inputs(path: str | Path) -> list[tuple[str, list[int | str], str]]:
    """Name, shape and type of each input of a file."""
    return [(value.name, value.shape, value.type) for value in session(path).get_inputs()]


def texts(path: str | Path) -> dict[str, str]:
    """The texts that a file carries, by name."""
    return dict(session(path).get_modelmeta().custom_metadata_map)


def version() -> str:
    """The version of onnxruntime."""
    return str(onnxruntime.__version__)
