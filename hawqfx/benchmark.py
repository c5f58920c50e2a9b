"""A file on several backends, side by side with the float network."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from hawqfx.compiler import compile
from hawqfx.frontend.capture import Model, capture
from hawqfx.frontend.data import Batch, gather
from hawqfx.runtime.backends import DEVICES, Result, every, file_inputs, run_graph
from hawqfx.session.plan import Plan


def benchmark(
    file: str | Path,
    backends: Sequence[str] = ("ort-cpu",),
    model: Model | None = None,
    data: Iterable[Any] | None = None,
    plan: Plan | str | Path | None = None,
    *,
    batch: int = 1,
    threads: int = 1,
    rounds: int = 100,
) -> dict[str, Result | str]:
    """Times a file on each backend, or says why it cannot: "ort-cpu", "ort-cuda", "ort-tensorrt", "torch-cpu",
    "torch-cuda".

    model: the float network, to compare answers with, and for torch, which times it too ("torch-cpu, float").  data: as
    for compile(), of which the first samples are run; without it, random inputs of the file's shapes.  plan: what the
    file was made by, for torch.  Raises BackendError where a backend has no such name, or lacks what it needs.
    """
    if data is not None:
        sample = gather(data)[0].first(batch)
    else:
        sample = Batch(tuple(map(torch.from_numpy, file_inputs(file, batch))), {})
    reference, floating = None, None
    if model is not None:
        floating = capture(model, sample).graph
        with torch.no_grad():
            answer = floating(*sample.args, **sample.kwargs)
        reference = [leaf.numpy() for leaf in pytree.tree_leaves(answer) if isinstance(leaf, torch.Tensor)]
    quantized = None
    if model is not None and plan is not None:
        data = [sample.args[0] if not sample.kwargs else dict(sample.kwargs)]
        quantized = compile(model, None, data, plan=plan).model
    found = every(file, quantized, backends, sample, reference, threads=threads, rounds=rounds)
    for backend in DEVICES.keys() & found.keys():
        if floating is not None and not isinstance(found[backend], str):
            found[f"{backend}, float"] = run_graph(floating, backend, sample, reference, threads=threads, rounds=rounds)
    return found
