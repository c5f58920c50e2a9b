"""The latency of the parts of a network in onnxruntime on this machine, as a LatencyModel.

Every distinct kernel (operator, shapes, attributes) is timed in each mode that it may run in, and every conversion
between float and integers (micro_timing.py).  The whole network is timed too, in float and quantized; the parts are
scaled so that these two latencies come out as measured (scaling.py), and all others are predictions.

Timings are kept in the user's cache folder, by machine, threads and version of onnxruntime (timing_cache.py).
"""

import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from hawqfx.atomic_write import scratch_folder
from hawqfx.errors import UsageError
from hawqfx.export.exporter import export
from hawqfx.frontend.context import Progress, silent
from hawqfx.frontend.data import Batch
from hawqfx.frontend.shapes import Shape, at_shape, check_shape
from hawqfx.ir.facts import Quantizers
from hawqfx.ir.names import sizes_in_words
from hawqfx.ir.operators import is_data_movement, is_size
from hawqfx.ir.program import Program
from hawqfx.ir.sites import ActivationSite
from hawqfx.latency import scaling
from hawqfx.latency.kernels import Kernel, is_free, kernels_of, readers
from hawqfx.latency.micro_timing import MicroTimer
from hawqfx.latency.subgraphs import lowered
from hawqfx.latency.timing_cache import TimingCache
from hawqfx.maths.formats import FLOAT, Format
from hawqfx.maths.latency_model import ConversionTimes, KernelTimes, LatencyModel
from hawqfx.runtime import ort

log = logging.getLogger(__name__)

WHOLE_SECONDS = 2.0  # for the runs of whole networks
_FILES = 2  # rises where export writes other kernels, so that times of before are not taken for theirs


def profile(
    program: Program,
    example: Batch,
    *,
    threads: int = 1,
    shape: Mapping[str, int] = {},
    cache: Path | None = None,
    progress: Progress = silent,
) -> LatencyModel:
    """Time the parts of a network.

    Args:
        program: knows the Quantizers of its sites, with 8 bits for every activation, and the RoundedWeights.
        example: the data that those of a run are made of.
        threads: of onnxruntime.
        shape: sizes of a run, as hawqfx.frontend.shapes.at_shape takes them.
        cache: the folder of timings; by default the user's.
        progress: hears how far the work is.

    Returns:
        The latency model of the network, in seconds.

    Raises:
        UsageError: if an activation has no quantizer at 8 bits, or a weight has none.
        BudgetError: if the network cannot take the shape.
        CacheError: if timings cannot be kept.
    """
    _check_formats(program)
    if shape:
        check_shape(program, example, shape)
    data, sizes = at_shape(program, example, shape)
    setting = {"machine": _machine(), "threads": threads, "onnxruntime": ort.version(), "files": _FILES}
    timings = TimingCache.open(cache, setting)
    parts = _Profiler(program, data, threads, timings).parts(progress, json.dumps(setting), sizes)
    networks = _whole_networks(program)
    model = _fitted(parts, networks, _whole_seconds(networks, example, data, sizes, threads, timings))
    progress("latency", len(model.timed), len(model.timed))
    timings.save()
    return model


def whole_networks(programs: Sequence[Program], example: Batch, data: Batch, threads: int = 1) -> list[float]:
    """Seconds of a run of each of some networks.

    Args:
        programs: of the same inputs, lowered; each is exported.
        example: inputs to export with, at sizes of the calibration data: torch.export takes sizes of 0 and 1 for
            constants.
        data: of a run, at any shape that the graph takes.
        threads: of onnxruntime.
    """
    given = [leaf for leaf in programs[0].flat_inputs(data.args, data.kwargs) if isinstance(leaf, Tensor)]
    if programs[0].dynamic_batch:
        example = example.first(2)
    with scratch_folder() as folder:
        paths, feeds = [], []
        for number, program in enumerate(programs):
            paths.append(folder / f"{number}.onnx")
            export(program, example, paths[-1])
            names = [name for name, *_ in ort.inputs(paths[-1])]
            feeds.append(dict(zip(names, (tensor.numpy() for tensor in given), strict=True)))
        return ort.steady(paths, feeds, threads=threads, budget=WHOLE_SECONDS)


def _check_formats(program: Program) -> None:
    """Every site has the formats that are timed."""
    formats = {site.key: program.facts.get(site.key, Quantizers).by_format for site in program.sites}
    missing = [site.name for site in program.activations if Format(8) not in formats[site.key]]
    missing += [site.name for site in program.weights if not formats[site.key]]
    if missing:
        raise UsageError(f"latency is timed at 8 bits, and {missing[0]!r} was not measured there: let it have 8")


def _machine() -> str:
    """The processor, as the system names it, and its cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {os.cpu_count()} cores"


def _whole_networks(program: Program) -> dict[str, Program]:
    """The network in float, and quantized: at 8 bits, or where a weight has formats in blocks alone, which multiply
    floats, with activations in float."""
    formats = [program.facts.get(site.key, Quantizers).by_format for site in program.weights]
    in_blocks = any(all(width.is_blockwise for width in known) for known in formats)
    quantized = (Format(8), FLOAT if in_blocks else Format(8))
    return {"float": lowered(program, FLOAT, FLOAT), "quantized": lowered(program, *quantized)}


def _whole_seconds(
    networks: Mapping[str, Program], example: Batch, data: Batch, sizes: Shape, threads: int, timings: TimingCache
) -> dict[str, float]:
    """Seconds of whole networks, by their names."""
    graphs = [str(network.graph.graph) for network in networks.values()]
    formats = [list(map(str, network.formats().values())) for network in networks.values()]
    shapes = [tuple(tensor.shape) for tensor in data.tensors]
    digest = hashlib.sha256(f"{graphs} {formats} {shapes}".encode()).hexdigest()[:16]
    keys = {name: f"network {digest} at {sizes_in_words(sizes)} {name}" for name in networks}
    if not all(key in timings for key in keys.values()):
        found = whole_networks([*networks.values()], example, data, threads)
        for key, seconds in zip(keys.values(), found, strict=True):
            timings.put(key, seconds)
    return {name: timings.seconds[key] for name, key in keys.items()}


def _fitted(parts: LatencyModel, networks: Mapping[str, Program], whole: Mapping[str, float]) -> LatencyModel:
    """The parts scaled to the measured networks, with a warning where the scales are implausible."""
    floating, _ = scaling.parted(parts, networks["float"].formats())
    left, integer = scaling.parted(parts, networks["quantized"].formats())
    scales = scaling.fit(whole["float"], whole["quantized"], floating, integer, left)
    if not scales.plausible:
        log.warning(
            "parts timed alone and in the whole network differ by factors of %.2f in float and %.2f quantized: "
            "expect rough latencies",
            scales.floating,
            scales.integer,
        )
    return scaling.scaled(parts, scales)


class _Profiler:
    """Makes the times of kernels and conversions from the times of micro models."""

    def __init__(self, program: Program, data: Batch, threads: int, timings: TimingCache) -> None:
        self.program, self.site_of = program, program.site_of
        self.kernels = kernels_of(program)
        self.output_of = {kernel.operator.name: kernel.output.name for kernel in self.kernels}
        self.values, sizes = _values(program, data, self.kernels)
        self.timer = MicroTimer(program, self.kernels, self.values, sizes, threads, timings)

    def parts(self, progress: Progress, setting: str, shape: Shape) -> LatencyModel:
        """The times of all parts, not yet scaled."""
        timed = []
        for number, kernel in enumerate(self.kernels):
            timed.append(self._kernel_times(kernel))
            progress("latency", number, len(self.kernels))
        nodes = {node.name: node for node in self.program.graph.graph.nodes}
        converted = [
            self._conversion_times(site, nodes[name])
            for site in self.program.activations
            for name in site.tensors
            if not is_free(nodes[name])
        ]
        return LatencyModel(0.0, tuple(timed), tuple(converted), setting, shape)

    def _kernel_times(self, kernel: Kernel) -> KernelTimes:
        inputs = [self.site_of[node.name] for node in kernel.inputs if node.name in self.site_of]
        weights = [kernel.weight] if kernel.weight is not None else []
        outputs = [self.site_of[kernel.output.name]] if kernel.output.name in self.site_of else []
        sites = tuple(dict.fromkeys([*inputs, *weights, *outputs]))
        seconds, blockwise = self.timer.kernel_seconds(kernel), self.timer.blockwise_seconds(kernel)
        return KernelTimes(kernel.output.name, sites, kernel.weight, **seconds, blockwise=blockwise)

    def _conversion_times(self, site: ActivationSite, node: fx.Node) -> ConversionTimes:
        shape = tuple(self.values[node.name].shape)
        layout = sum(self.timer.layout_seconds(node.name, integer=integer) for integer in (True, False))
        return ConversionTimes(
            site=site.key,
            maker=node.name if node.name in self.output_of.values() else None,
            readers=self._reading_kernels(node),
            quantize=self.timer.operator_seconds("QuantizeLinear", shape) + layout,
            dequantize=self.timer.operator_seconds("DequantizeLinear", shape) + layout,
            clip=self.timer.operator_seconds("Clip", shape),
        )

    def _reading_kernels(self, node: fx.Node) -> tuple[str | None, ...]:
        """The output nodes of the kernels that read a tensor; None stands for readers that are always in float."""
        reading = dict.fromkeys(
            self.output_of.get(reader.name)
            for reader in readers(node)
            if reader.name in self.output_of or not is_data_movement(reader)
        )
        return tuple(reading)


@torch.no_grad()
def _values(program: Program, data: Batch, kernels: Sequence[Kernel]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The inputs and outputs of all kernels and the tensors of all activation sites; and the sizes that kernels take
    from the shapes of other tensors; all by name of the node."""
    read = {source for kernel in kernels for node in kernel.nodes for source in node.all_input_nodes}
    wanted = {node.name for kernel in kernels for node in (*kernel.inputs, kernel.output)}
    wanted |= {source.name for source in filter(is_size, read)}
    values: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}

    def keep(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            values[name] = value.detach().contiguous()
        else:
            sizes[name] = int(value)
        return value

    program.run(data.args, data.kwargs, keep, at=wanted | program.site_of.keys())
    return values, sizes
