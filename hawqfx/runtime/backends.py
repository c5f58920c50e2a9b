"""Backends: the speed of a network, and its difference from the float network, in one measurement.

onnxruntime runs the file on the processor, or on a GPU with its CUDA or TensorRT provider.  torch runs the
fake-quantized graph, which shows the cost of quantization itself: only onnxruntime has integer kernels.
"""

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor
from torch.utils import _pytree as pytree

from hawqfx.errors import BackendError, UsageError
from hawqfx.frontend.data import Batch
from hawqfx.runtime import ort

PROVIDERS = {"ort-cpu": "CPUExecutionProvider", "ort-cuda": "CUDAExecutionProvider"}
PROVIDERS |= {"ort-tensorrt": "TensorrtExecutionProvider"}
DEVICES = {"torch-cpu": "cpu", "torch-cuda": "cuda"}
BACKENDS = (*PROVIDERS, *DEVICES)
WARM = 3  # runs before the clock starts

Outputs = Sequence[NDArray[Any]]


@dataclass(frozen=True)
class OutputDifference:
    """The difference of the first output from the float network's.

    Args:
        mean: mean absolute difference, in the unit of the output.
        relative_mean: the mean absolute difference, relative to the mean absolute value in float.
        largest: largest absolute difference, in the unit of the output.
        relative: the largest difference, relative to the largest absolute value in float.
        agreement: share of the rows (along the last axis) whose largest entry is at the same place.
    """

    mean: float
    relative_mean: float
    largest: float
    relative: float
    agreement: float


@dataclass(frozen=True)
class Result:
    """A measurement on one backend.

    Args:
        backend: a member of BACKENDS.
        provider: onnxruntime's execution provider, "torch", or the name of the GPU.
        batch: samples in a run.
        threads: of one operator.
        median: median seconds of a run.
        p90: 90th percentile of the seconds of a run.
        runs: number of timed runs.
        throughput: samples per second.
        memory: bytes by which the peak of the process grew.
        parity: None if there is no float network to compare with.
        machine: architecture and number of cores.
        versions: library -> version.
        sizes: of the dimensions that vary, by name, where a benchmark is of a file.
    """

    backend: str
    provider: str
    batch: int
    threads: int
    median: float
    p90: float
    runs: int
    throughput: float
    memory: int
    parity: OutputDifference | None
    machine: str
    versions: Mapping[str, str]
    sizes: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return asdict(self)


def available(backend: str) -> str | None:
    """The reason why a backend cannot run here; None if it can.

    Raises:
        UsageError: if there is no backend of this name.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend {backend!r}: must be one of {', '.join(BACKENDS)}")
    if backend in PROVIDERS:
        there = ort.providers()
        if PROVIDERS[backend] in there:
            return None
        return f"this onnxruntime has {', '.join(there)} only: install onnxruntime-gpu, and CUDA"
    if DEVICES[backend] == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    return None


def run_file(
    path: str | Path,
    backend: str,
    inputs: Sequence[NDArray[Any]],
    reference: Outputs | None = None,
    *,
    threads: int = 1,
    rounds: int = 100,
) -> Result:
    """Run a file in onnxruntime.

    Args:
        path: the file.
        backend: a key of PROVIDERS.
        inputs: an array for each input of the file; dimension 0 is the batch.
        reference: outputs of the float network for these inputs.
        threads: of one operator.
        rounds: timed runs.

    Raises:
        BackendError: if the backend cannot run here, or if the outputs do not have the shape of the reference.
    """
    _check_available(backend)
    provider = PROVIDERS[backend]
    before = _peak_bytes()
    session = ort.session(path, threads=threads, provider=provider)
    outputs = ort.run(session, inputs)
    seconds = _timed(lambda: ort.run(session, inputs), rounds)
    return _result(backend, provider, inputs[0].shape[0], threads, seconds, before, outputs, reference)


def run_graph(
    model: Callable[..., Any],
    backend: str,
    batch: Batch,
    reference: Outputs | None = None,
    *,
    threads: int = 1,
    rounds: int = 100,
) -> Result:
    """Run a network in torch.

    Args:
        model: a module, or a function of the batch's arguments.
        backend: a key of DEVICES.
        batch: the inputs.
        reference: outputs of the float network for these inputs.
        threads: of one operator.
        rounds: timed runs.

    Raises:
        BackendError: if the backend cannot run here, or if the outputs do not have the shape of the reference.
    """
    _check_available(backend)
    device = torch.device(DEVICES[backend])
    moved = batch.to(device)
    network = model.to(device) if isinstance(model, torch.nn.Module) else model

    def step() -> Any:
        answer = network(*moved.args, **moved.kwargs)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return answer

    before = _peak_bytes()
    with _torch_threads(threads), torch.no_grad():
        outputs = [leaf.cpu().numpy() for leaf in pytree.tree_leaves(step()) if isinstance(leaf, Tensor)]
        seconds = _timed(step, rounds)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "torch"
    return _result(backend, name, batch.size, threads, seconds, before, outputs, reference)


def every(
    path: str | Path,
    graph: Callable[..., Any] | None,
    backends: Sequence[str],
    batch: Batch,
    reference: Outputs | None = None,
    *,
    threads: int = 1,
    rounds: int = 100,
) -> dict[str, Result | str]:
    """Run a network on several backends.

    Args:
        path: the file that onnxruntime runs.
        graph: the network that torch runs.
        backends: members of BACKENDS.
        batch: the inputs.
        reference: outputs of the float network for these inputs.
        threads: of one operator.
        rounds: timed runs.

    Returns:
        For each backend its result, or the reason why it cannot run here.

    Raises:
        UsageError: if there is no backend of a name, or if torch has no network to run.
    """
    results: dict[str, Result | str] = {}
    for backend in backends:
        reason = available(backend)
        if reason is not None:
            results[backend] = f"not here: {reason}"
        elif backend in PROVIDERS:
            arrays = [tensor.numpy() for tensor in batch.tensors]
            results[backend] = run_file(path, backend, arrays, reference, threads=threads, rounds=rounds)
        elif graph is None:
            raise UsageError(f"{backend} runs the graph: give the model and the plan that the file was made by")
        else:
            results[backend] = run_graph(graph, backend, batch, reference, threads=threads, rounds=rounds)
    return results


def table(results: Mapping[str, Result | str]) -> Table:
    """The results of `every`, a row for each backend."""
    rows = Table(
        "backend", "provider", "median, ms", "p90, ms", "samples/s", "memory, MB", "first output against float32's"
    )
    for name, result in results.items():
        if isinstance(result, str):
            rows.add_row(name, result)
            continue
        same = result.parity
        parity = "" if same is None else _against_float(same)
        times = (f"{1e3 * value:.3f}" for value in (result.median, result.p90))
        rows.add_row(name, result.provider, *times, f"{result.throughput:.1f}", f"{result.memory / 1e6:.1f}", parity)
    return rows


def _against_float(difference: OutputDifference) -> str:
    share = f"{difference.relative_mean:.2%} of float32's mean |output|"
    return f"same top-1 {difference.agreement:.1%}, mean |difference| {difference.mean:.2g}: {share}"


def compare(ours: NDArray[Any], theirs: NDArray[Any]) -> OutputDifference:
    """The difference between an output and the float network's, both of the same shape.

    Raises:
        BackendError: if the shapes differ.
    """
    if ours.shape != theirs.shape:
        raise BackendError(f"the file answers {ours.shape} and the float network {theirs.shape}: they are not alike")
    difference = np.abs(ours.astype(np.float64) - theirs)
    largest = float(difference.max(initial=0.0))
    same = ours.argmax(-1) == theirs.argmax(-1) if ours.ndim else np.array(True)
    sizes = np.abs(theirs.astype(np.float64))
    mean, usual = float(difference.mean()), float(sizes.mean()) or 1.0
    return OutputDifference(
        mean, mean / usual, largest, largest / (float(sizes.max(initial=0.0)) or 1.0), float(same.mean())
    )


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """So many threads in torch, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_available(backend: str) -> None:
    reason = available(backend)
    if reason is not None:
        raise BackendError(f"{backend} is not here: {reason}")


def _timed(step: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each timed run."""
    if rounds < 2:
        raise UsageError(f"rounds={rounds}: a median takes at least two runs")
    seconds = []
    for turn in range(rounds + WARM):
        start = time.perf_counter()
        step()
        if turn >= WARM:
            seconds.append(time.perf_counter() - start)
    return seconds


def _peak_bytes() -> int:
    """The most memory that the process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _result(
    backend: str, provider: str, batch: int, threads: int, seconds: list[float], before: int, outputs: Outputs,
    reference: Outputs | None,
) -> Result:  # fmt: skip
    median = statistics.median(seconds)
    return Result(
        backend=backend,
        provider=provider,
        batch=batch,
        threads=threads,
        median=median,
        p90=statistics.quantiles(seconds, n=10)[-1],
        runs=len(seconds),
        throughput=batch / median,
        memory=max(0, _peak_bytes() - before),
        parity=None if reference is None else compare(outputs[0], reference[0]),
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        versions={"onnxruntime": ort.version(), "torch": str(torch.__version__)},
    )
