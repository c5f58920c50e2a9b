"""Parts batches until a measurement of each part fits into memory, or until there are parts enough to probe."""

import logging
import math
from dataclasses import replace

import torch
from torch import Tensor

from hawqfx.errors import UsageError
from hawqfx.frontend.context import Context
from hawqfx.frontend.memory import free_memory as free_memory
from hawqfx.ir.graph import batch_size, captured_shape
from hawqfx.ir.program import Program
from hawqfx.sensitivity.cache import MeasurementCache
from hawqfx.sensitivity.distributed import Workers

log = logging.getLogger(__name__)

# Bytes at the peak per byte of the tensors of a forward pass, by whether second derivatives are measured.  Rounded up
# from benchmarks/sensitivity.py: 2.4 for a Hessian-vector product of ResNet-50, 2.2 for ResNet-20.
PEAK_PER_FORWARD = {False: 2, True: 3}


def fit_into_memory(
    program: Program, context: Context, workers: Workers, cache: MeasurementCache | None, *, second_order: bool
) -> Context:
    """The context with batches as small as the user or the free memory asks.

    All processes, and all runs that share a cache, take the same size.

    Args:
        program: the program to measure.
        context: its `batch` is the user's limit, in samples; without one the free memory of process 0 decides.
        workers: the processes that measure together.
        cache: keeps the size that the measurement was begun with.
        second_order: whether second derivatives are measured.

    Raises:
        UsageError: if the program has a fixed batch that is larger than the user's limit.
    """
    largest = max(batch.size for batch in context.batches)
    if not program.dynamic_batch:
        if context.batch is not None and context.batch < largest:
            raise UsageError(
                f"batch={context.batch}: the exported program has a fixed batch of {largest}: use dynamic_shapes"
            )
        return context
    size = context.batch or _fitting_size(program, context.device, largest, second_order)
    size = _agreed_size(min(size, largest), workers, cache)
    if size >= largest:
        return context
    if not context.batch:
        log.info("batches of %d samples are measured in parts of %d, to fit into memory", largest, size)
    return replace(context, batches=tuple(part for batch in context.batches for part in batch.split(size)))


def parted(program: Program, context: Context, parts: int) -> Context:
    """The context with its samples in about so many equal parts, each within a batch; with a fixed batch as it is."""
    if not program.dynamic_batch:
        return context
    size = max(1, context.samples // parts)
    return replace(context, batches=tuple(part for batch in context.batches for part in batch.split(size)))


def _agreed_size(size: int, workers: Workers, cache: MeasurementCache | None) -> int:
    """The size that process 0 wants, or that the cache has from an earlier run."""
    size = workers.from_first(size)
    if cache is not None:
        if workers.rank == 0:
            size = cache.batch_size(size)
        size = workers.from_first(size)
    return size


def _fitting_size(program: Program, device: torch.device, largest: int, second_order: bool) -> int:
    """The largest part of a batch, by halves, whose measurement fits into half of the free memory."""
    free = free_memory(device)
    bytes_of_sample = program.forward_bytes() * PEAK_PER_FORWARD[second_order]
    size = largest
    while size > 1 and size * bytes_of_sample > free / 2:
        size = -(-size // 2)
    return size


def with_room(program: Program, context: Context, bytes_of_sample: int, purpose: str) -> Context:
    """The context with as many samples as can be kept at once; all, of a fixed batch.

    Args:
        program: whose tensors are kept.
        context: with all samples.
        bytes_of_sample: that are kept of every sample.
        purpose: begins the sentence of a warning where not all samples fit.
    """
    if not program.dynamic_batch:
        return context
    most = max(1, free_memory(context.device) // 2 // max(1, bytes_of_sample))
    if most >= context.samples:
        return context
    log.warning("%s %d of %d samples, which fit into memory", purpose, most, context.samples)
    kept = []
    for batch in context.batches:
        if most > 0:
            kept.append(batch.first(most))
            most -= batch.size
    return replace(context, batches=tuple(kept))


def largest_bytes(program: Program) -> int:
    """Bytes of a sample's largest tensor, in float32."""
    nodes = (node for node in program.graph.graph.nodes if isinstance(node.meta.get("val"), Tensor))
    largest = max(math.prod(captured_shape(node)) for node in nodes if node.op == "call_function")
    return 4 * largest // batch_size(program.graph.graph)
