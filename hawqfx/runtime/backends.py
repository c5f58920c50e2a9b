"""Backends: how fast a file runs, and how near its answers are to the float network's, in one run.

onnxruntime runs the file on the processor, or on a GPU with its CUDA or TensorRT provider.  torch runs the
fake-quantized graph, to see what quantization itself costs there: integer kernels are onnxruntime's.
"""

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor
from torch.utils import _pytree as pytree

from hawqfx.errors import BackendError
from hawqfx.frontend.context import Batch
from hawqfx.runtime import ort

PROVIDERS = {"ort-cpu": "CPUExecutionProvider", "ort-cuda": "CUDAExecutionProvider"}
PROVIDERS |= {"ort-tensorrt": "TensorrtExecutionProvider"}
DEVICES = {"torch-cpu": "cpu", "torch-cuda": "cuda"}
BACKENDS = (*PROVIDERS, *DEVICES)
WARM = 3  # runs before the clock starts

Outputs = Sequence[NDArray[Any]]


@dataclass(frozen=True)
class OutputDifference:
    """Against the float network's first output: mean and largest absolute difference, the largest relative to the
    largest float value, and the share of rows (along the last axis) whose largest entry is the same."""

    mean: float
    largest: float
    relative: float
    agreement: float


@dataclass(frozen=True)
class Result:
    """One backend: seconds of a run of `batch` samples, samples in a second, bytes that the process grew by, at its
    peak, and what ran it.  `parity`: None where there is no float network to compare with."""

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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def available(backend: str) -> str | None:
    """Why a backend cannot be used here; None if it can.  Raises BackendError for names that are no backend's."""
    if backend not in BACKENDS:
        raise BackendError(f"backend {backend!r}: must be one of {', '.join(BACKENDS)}")
    if backend in PROVIDERS:
        there = ort.providers()
        if PROVIDERS[backend] in there:
            return None
        return f"this onnxruntime has {', '.join(there)} only: install onnxruntime-gpu, and CUDA"
    if DEVICES[backend] == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    return None


def file_inputs(path: str | Path, batch: int = 1, seed: int = 0) -> list[NDArray[Any]]:
    """Random inputs of the shapes that a file states: normal floats, integers 0 and 1; dynamic dimensions are
    `batch`."""
    draw = np.random.default_rng(seed)
    found = []
    for name, shape, kind in ort.inputs(path):
        sizes = [size if isinstance(size, int) else batch for size in shape]
        if "float" in kind:
            found.append(draw.standard_normal(sizes).astype(np.float32))
        elif "int64" in kind or "int32" in kind or "bool" in kind:
            found.append(draw.integers(0, 2, sizes).astype(kind.removeprefix("tensor(").removesuffix(")")))
        else:
            raise BackendError(f"input {name!r} is a {kind}: give data")
    return found


def run_file(
    path: str | Path,
    backend: str,
    inputs: Sequence[NDArray[Any]],
    reference: Outputs | None = None,
    *,
    threads: int = 1,
    rounds: int = 100,
) -> Result:
    """A file in onnxruntime.  Raises BackendError where the backend is not there."""
    _check(backend)
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
    """A network in torch, on the backend's device.  Raises BackendError where the backend is not there."""
    _check(backend)
    device = torch.device(DEVICES[backend])
    moved = batch.to(device)
    network = model.to(device) if isinstance(model, torch.nn.Module) else model
    kept = torch.get_num_threads()
    before = _peak_bytes()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():

            def step() -> Any:
                answer = network(*moved.args, **moved.kwargs)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                return answer

            outputs = [leaf.cpu().numpy() for leaf in pytree.tree_leaves(step()) if isinstance(leaf, Tensor)]
            seconds = _timed(step, rounds)
    finally:
        torch.set_num_threads(kept)
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
    """Each backend's figures, or why it cannot run here.  `graph`: what torch runs.  Raises BackendError."""
    found: dict[str, Result | str] = {}
    for backend in backends:
        reason = available(backend)
        if reason is not None:
            found[backend] = f"not here: {reason}"
        elif backend in PROVIDERS:
            arrays = [tensor.numpy() for tensor in batch.tensors]
            found[backend] = run_file(path, backend, arrays, reference, threads=threads, rounds=rounds)
        elif graph is None:
            raise BackendError(f"{backend} runs the graph: give the model and the plan that the file was made by")
        else:
            found[backend] = run_graph(graph, backend, batch, reference, threads=threads, rounds=rounds)
    return found


def table(results: Mapping[str, Result | str]) -> Table:
    """A row for each backend."""
    made = Table("backend", "provider", "median, ms", "p90, ms", "samples/s", "memory, MB", "against float")
    for name, result in results.items():
        if isinstance(result, str):
            made.add_row(name, result)
            continue
        same = result.parity
        said = "" if same is None else f"top-1 {same.agreement:.1%}, mean difference {same.mean:.2g}"
        figures = (f"{1e3 * value:.3f}" for value in (result.median, result.p90))
        made.add_row(name, result.provider, *figures, f"{result.throughput:.1f}", f"{result.memory / 1e6:.1f}", said)
    return made


def _check(backend: str) -> None:
    reason = available(backend)
    if reason is not None:
        raise BackendError(f"{backend} is not here: {reason}")


def _timed(step: Callable[[], Any], rounds: int) -> list[float]:
    if rounds < 2:
        raise BackendError(f"rounds={rounds}: a median takes at least two runs")
    seconds = []
    for turn in range(rounds + WARM):
        start = time.perf_counter()
        step()
        if turn >= WARM:
            seconds.append(time.perf_counter() - start)
    return seconds


def _peak_bytes() -> int:
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


def compare(ours: NDArray[Any], theirs: NDArray[Any]) -> OutputDifference:
    """Raises BackendError where the shapes differ."""
    if ours.shape != theirs.shape:
        raise BackendError(f"the file answers {ours.shape} and the float network {theirs.shape}: they are not alike")
    difference = np.abs(ours.astype(np.float64) - theirs)
    largest = float(difference.max(initial=0.0))
    same = ours.argmax(-1) == theirs.argmax(-1) if ours.ndim else np.array(True)
    size = float(np.abs(theirs).max(initial=0.0)) or 1.0
    return OutputDifference(float(difference.mean()), largest, largest / size, float(same.mean()))
