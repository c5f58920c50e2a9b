"""Times an ONNX file on several backends, side by side with the float network."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree

from hawqfx.compiler import compile
from hawqfx.errors import BackendError, UsageError
from hawqfx.frontend import decoders
from hawqfx.frontend.capture import Model, capture
from hawqfx.frontend.data import Batch, gather
from hawqfx.frontend.single_precision import in_single_precision, single
from hawqfx.runtime import ort
from hawqfx.runtime.backends import DEVICES, Result, available, every, run_graph
from hawqfx.runtime.file_inputs import at_sizes, random_inputs, sizes_in_file
from hawqfx.session.load import load
from hawqfx.session.plan import Plan
from hawqfx.session.saved import is_saved, read_plan


def benchmark(
    file: str | Path,
    backends: Sequence[str] = ("ort-cpu",),
    model: Model | None = None,
    data: Iterable[Any] | None = None,
    plan: Plan | str | Path | None = None,
    *,
    batch: int = 1,
    shape: Mapping[str, int] = {},
    threads: int = 1,
    rounds: int = 100,
    tokens: Literal["causal"] | None = None,
) -> dict[str, Result | str]:
    """Time a file on several backends.

    Args:
        file: the ONNX file.
        backends: "ort-cpu", "ort-cuda", "ort-tensorrt", "torch-cpu" or "torch-cuda".
        model: the float network.  Outputs are compared with its outputs.  A torch backend needs it, and times it too,
            under a name such as "torch-cpu, float".
        data: as for compile(); the first `batch` samples are the inputs.  Without data, the inputs are random, in the
            shapes that the file states.
        plan: what the file was made by, for a torch backend: the file of Compiled.save(); or a plan, or its JSON, with
            the data that it was made with, on which weights are rounded again.
        batch: samples in a run, and where there are no data, the size of all that varies.
        shape: sizes by the names of the dimensions that vary in the file, such as {"sequence": 1, "past": 128}.  Data
            are cut or repeated to them.
        threads: of one operator.
        rounds: timed runs, at least two.
        tokens: as for compile(): data are texts, of which the first half becomes the past.

    Returns:
        For every backend its result, or the reason why it cannot run here.

    Raises:
        UsageError: if there is no backend of a name, or if a backend lacks the model, the plan or the data.
        BackendError: if the file was made by another plan.
        BudgetError: if the file has no such shape.
        DataError: if the data are empty or not finite.
        CaptureError: if the model cannot be captured.
        PlanError: if the plan does not belong to the model.
    """
    check_benchmark(file, backends, shape)
    shapes = None
    if tokens is not None:
        if model is None or data is None:
            raise UsageError("tokens= makes a past of the texts by the model: give the model and the data")
        model, data, _, shapes = decoders.inputs(model, data, None, tokens, None, None)
    batches = None if data is None else gather(data, varying=tokens is not None)
    if batches is not None:
        sample = batches[0].first(batch).map(single)
        sizes = sizes_in_file(file, shape, data=sample)
        sample = at_sizes(file, sample, sizes)
    else:
        sizes = sizes_in_file(file, shape, batch)
        sample = Batch(tuple(map(torch.from_numpy, random_inputs(file, sizes, batch))), {})
    reference, floating = None, None
    if model is not None:
        floating = in_single_precision(capture(model, sample)).graph
        with torch.no_grad():
            answer = floating(*sample.args, **sample.kwargs)
        reference = [leaf.numpy() for leaf in pytree.tree_leaves(answer) if isinstance(leaf, torch.Tensor)]
    quantized = None
    if model is not None and plan is not None:
        quantized = _planned(file, model, batches, shapes, plan)
    results = every(file, quantized, backends, sample, reference, threads=threads, rounds=rounds)
    for backend in DEVICES.keys() & results.keys():
        if floating is not None and not isinstance(results[backend], str):
            results[f"{backend}, float"] = run_graph(
                floating, backend, sample, reference, threads=threads, rounds=rounds
            )
    return {
        name: result if isinstance(result, str) else replace(result, sizes=sizes) for name, result in results.items()
    }


def check_benchmark(file: str | Path, backends: Sequence[str], shape: Mapping[str, int]) -> None:
    """Raises what `benchmark` does of a file, of the names of backends and of a shape, before a model is loaded."""
    for backend in backends:
        available(backend)
    sizes_in_file(file, shape)


def _planned(
    file: str | Path, model: Model, batches: Sequence[Batch] | None, shapes: Any, plan: Plan | str | Path
) -> torch.nn.Module:
    """The fake-quantized network that the file was made of.

    Raises:
        BackendError: if the file was made by another plan.
        PlanError: if the plan is not that of the model and the data.
    """
    known, made = read_plan(plan), ort.texts(file).get("hawqfx_plan")
    if made != known.digest:
        raise BackendError(f"{file} was made by the plan {made}, and {plan} is {known.digest}: give the file's own")
    if not isinstance(plan, Plan) and is_saved(plan):
        return load(plan, model).model
    if batches is None:
        raise UsageError(f"{plan} has no codes: give the file of Compiled.save(), or the data that it was made with")
    items = [((batch.args or dict(batch.kwargs)), batch.target) for batch in batches]
    return compile(model, None, items, plan=known, dynamic_shapes=shapes).model
