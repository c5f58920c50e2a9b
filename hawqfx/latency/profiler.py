"""How long the parts of a network take in onnxruntime on this machine, as a Timetable.

Every distinct kernel (operator, shapes, attributes) is timed in float and in integers, and every conversion between the
two, as small graphs: with several copies and with one, so that what a run costs in any case drops out of the
difference.  onnxruntime lays images out in blocks for float convolutions and with channels last for integer ones, and
does so at the edges of a small graph as it does where float meets integer in a whole network; so two transpositions are
taken off a convolution that is timed alone, and added to the conversions of an image.

The whole network is timed too, in float and with 8 bits.  The first says what everything else takes; both scale the
parts, so that these two come out as they were measured, and all others are predictions.

Timings are kept in the user's cache folder, by machine, threads and version of onnxruntime.
"""

import hashlib
import json
import logging
import math
import operator
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from hawqfx import pipeline
from hawqfx.analysis.partition import taken
from hawqfx.atomic_write import whole_file
from hawqfx.errors import CacheError, ExportError, HawqfxError
from hawqfx.export.exporter import MicroModel, MicroModels, export, operator_micro_model
from hawqfx.frontend.context import Batch, Context, Progress, cross_entropy, silent
from hawqfx.ir.facts import ChosenFormat, Fact, Quantizers, RoundedWeights
from hawqfx.ir.operators import PADS, WEIGHTED_LAYERS, ceiling, is_constant, is_data_movement, is_tensor, operands
from hawqfx.ir.program import ActivationSite, Layer, Program, WeightSite, set_tensor
from hawqfx.maths.formats import BLOCKWISE, DYNAMIC, is_static
from hawqfx.maths.latency_model import ConversionTimes, KernelTimes, LatencyModel
from hawqfx.maths.pricing import FLOAT_BITS
from hawqfx.pass_manager.manager import run
from hawqfx.runtime import ort

log = logging.getLogger(__name__)

COPIES = 4  # of a small graph in one file
PIECE_SECONDS, WHOLE_SECONDS = 0.15, 2.0  # for the runs of a small graph, and of the whole network
# bits of weights and of activations
_SCHEMES = {
    "integer": (8, 8), "floating": (FLOAT_BITS, FLOAT_BITS), "unpacking": (8, FLOAT_BITS), "dynamic": (8, DYNAMIC),
    "blockwise": (BLOCKWISE, FLOAT_BITS),
}  # fmt: skip
VIEWS = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"}  # carriers that cost nothing
LEAST = 0.1  # of what a convolution takes alone, at least so much is its own and not its layout's


def measure(
    program: Program,
    example: Batch,
    *,
    threads: int = 1,
    batch: int | None = None,
    cache: Path | None = None,
    progress: Progress = silent,
) -> LatencyModel:
    """Times the parts of a program that has sites and quantizers, of 8 bits for activations.

    batch: samples in a run, by default one, or those of `example` where the graph has a fixed batch.  cache: the folder
    of timings, by default the user's.  Raises CacheError, HawqfxError.
    """
    missing = [site.key for site in program.activations if 8 not in program.facts.get(site.key, Quantizers).by_bits]
    missing += [site.key for site in program.weights if not program.facts.get(site.key, Quantizers).by_bits]
    if missing:
        raise HawqfxError(f"latency is timed at 8 bits, and {missing[0]!r} was not measured there: let it have 8")
    size = batch or (1 if program.dynamic_batch else example.size)
    if size > example.size:
        raise HawqfxError(f"batch={size}: the example has only {example.size} samples")
    setting = {"machine": _machine(), "threads": threads, "onnxruntime": ort.version()}
    timings = _Timings.open(cache, setting)
    work = _Work(program, example.first(size), threads, timings)
    table = work.latency_model(progress, json.dumps(setting | {"batch": size}))
    timings.save()
    return table


def whole_networks(programs: Sequence[Program], example: Batch, threads: int = 1) -> list[float]:
    """Seconds of a run of each of some lowered programs, exported, on all of the example."""
    with tempfile.TemporaryDirectory() as folder:
        paths, feeds = [], []
        for number, program in enumerate(programs):
            paths.append(Path(folder) / f"{number}.onnx")
            export(program, example, paths[-1])
            names = [value.name for value in ort.session(paths[-1]).get_inputs()]
            feeds.append(dict(zip(names, (tensor.numpy() for tensor in example.tensors), strict=True)))
        return ort.steady(paths, feeds, threads=threads, budget=WHOLE_SECONDS)


def _machine() -> str:
    """The processor, as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {os.cpu_count()} cores"


@dataclass
class _Timings:
    """Seconds by key, in a file for each setting."""

    path: Path
    seconds: dict[str, float] = field(default_factory=dict)
    new: int = 0

    @staticmethod
    def open(cache: Path | None, setting: Mapping[str, object]) -> "_Timings":
        folder = cache or Path(os.environ.get("HAWQFX_CACHE") or platformdirs.user_cache_dir("hawqfx"))
        name = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:16]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"the cache {folder} cannot be used: {error}") from error
        path = folder / f"latency-{name}.json"
        found: dict[str, float] = {}
        if path.exists():
            try:
                found = {str(key): float(value) for key, value in json.loads(path.read_text())["seconds"].items()}
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                log.warning("the timings in %s are damaged (%s): all are taken again", path, error)
        return _Timings(path, found)

    def get(self, key: str, take: Callable[[], float]) -> float:
        if key not in self.seconds:
            self.seconds[key] = take()
            self.new += 1
            if self.new % 16 == 0:
                self.save()
        return self.seconds[key]

    def save(self) -> None:
        if not self.new:
            return
        try:
            with whole_file(self.path) as temporary:
                temporary.write_text(json.dumps({"seconds": self.seconds}, indent=1))
        except ExportError as error:
            raise CacheError(f"timings cannot be kept: {error}") from error


@dataclass(frozen=True)
class _Kernel:
    """Nodes that onnxruntime runs as one.  reads, makes: the activations, the latter None where it hands out floats
    in any case; weight: its parameter, if it has one."""

    nodes: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    weight: str | None

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]


def _kernels(program: Program) -> list[_Kernel]:
    """Every kernel whose speed the choice of bits changes, in order."""
    sites = {name for site in program.activations for name in (*site.nodes, *site.data_movement)}
    data_movement = {name for site in program.activations for name in site.data_movement}
    layers = {layer.node: layer for layer in program.layers}
    others = {*program.elementwise, *(product.node for product in program.products)}
    found = []
    for node in program.graph.graph.nodes:
        weight = layers[node.name].weight if node.name in layers else None
        carried = node.name in data_movement and not _is_free(node)
        if weight is None and not carried and node.name not in others:
            continue
        reads = tuple(n for n in node.all_input_nodes if is_tensor(n)) if carried else taken(node)
        nodes = [node]
        if not carried and len(node.users) == 1 and node.name not in sites:
            (user,) = node.users
            if ceiling(user) is not None and user.name in sites:
                nodes.append(user)
        found.append(_Kernel(tuple(nodes), reads, weight))
    return found


class _Work:
    def __init__(self, program: Program, example: Batch, threads: int, timings: _Timings) -> None:
        self.program, self.example, self.threads, self.timings = program, example, threads, timings
        self.site_of = {name: site.key for site in program.activations for name in (*site.nodes, *site.data_movement)}
        self.kernels = _kernels(program)
        self.values = self._values()
        self.parts: dict[str, tuple[MicroModels, dict[str, int]]] = {}

    @torch.no_grad()
    def _values(self) -> dict[str, Tensor]:
        """What goes into and comes out of every kernel, and the tensors of every site."""
        wanted = {node.name for kernel in self.kernels for node in (*kernel.reads, kernel.end)} | self.site_of.keys()
        values: dict[str, Tensor] = {}

        def look(name: str, value: Tensor) -> Tensor:
            values[name] = value.detach().contiguous()
            return value

        self.program.run(self.example.args, self.example.kwargs, look, at=wanted)
        return values

    def latency_model(self, progress: Progress, setting: str) -> LatencyModel:
        steps = 2 * len(self.kernels)
        timed = []
        for number, kernel in enumerate(self.kernels):
            timed.append(self._timed(kernel))
            progress("latency", 2 * number, steps)
        made = {kernel.end.name for kernel in self.kernels}
        converted = [
            self._converted(site, name, name if name in made else None)
            for site in self.program.activations
            for name in (*site.nodes, *site.data_movement)
            if not _is_free(self._node(name))
        ]
        table = LatencyModel(0.0, tuple(timed), tuple(converted), setting)
        table = self._anchored(table)
        progress("latency", steps, steps)
        return table

    def _node(self, name: str) -> fx.Node:
        return next(node for node in self.program.graph.graph.nodes if node.name == name)

    def _timed(self, kernel: _Kernel) -> KernelTimes:
        sites = dict.fromkeys(self.site_of[node.name] for node in kernel.reads if node.name in self.site_of)
        weights = dict.fromkeys(filter(None, [kernel.weight]))
        ends = dict.fromkeys(self.site_of[n] for n in [kernel.end.name] if n in self.site_of)
        seconds = {}
        for scheme in filter(lambda scheme: self._has(kernel, scheme), _SCHEMES):
            alone = self.timings.get(self._signature(kernel, scheme), lambda s=scheme: self._alone(kernel, s))  # type: ignore[misc]
            layout = 0.0
            if kernel.weight is not None and scheme in ("integer", "floating"):  # others take images as they are
                layout = sum(self._layout(node.name, scheme == "integer") for node in (kernel.reads[0], kernel.end))
            seconds[scheme] = max(LEAST * alone, alone - layout)
        if kernel.weight is None:
            seconds["unpacking"] = seconds["floating"]
        return KernelTimes(kernel.end.name, tuple({**sites, **weights, **ends}), kernel.weight, **seconds)

    def _has(self, kernel: _Kernel, scheme: str) -> bool:
        """Whether a kernel may run so."""
        if scheme == "blockwise":
            return kernel.weight is not None and BLOCKWISE in self._widths(kernel.weight)
        if scheme == "dynamic":
            read = kernel.weight is not None and self.site_of.get(kernel.reads[0].name)
            linear = kernel.weight is not None and WEIGHTED_LAYERS[kernel.nodes[0].target] == "linear"
            return bool(linear and read and DYNAMIC in self._widths(read))
        return True

    def _widths(self, key: str) -> Mapping[int, object]:
        return self.program.facts.get(key, Quantizers).by_bits

    def _layout(self, name: str, integer: bool) -> float:
        """Of laying an image out anew: in integers its channels go last, in float they go into blocks.  The latter has
        no operator of its own; a pooling over one pixel does it before and after, and as much work itself."""
        shape = tuple(self.values[name].shape)
        if len(shape) != 4 or shape[1] == 1:
            return 0.0
        return self._operator("Transpose", shape) if integer else self._operator("MaxPool", shape) / 3

    def _operator(self, name: str, shape: tuple[int, ...]) -> float:
        def take() -> float:
            return self._difference(*(operator_micro_model(name, shape, 128, copies) for copies in (COPIES, 1)))

        return self.timings.get(f"{name} {'x'.join(map(str, shape))}", take)

    def _difference(self, many: MicroModel, one: MicroModel) -> float:
        """Seconds of one copy more."""
        draw = np.random.default_rng(0)
        feeds = []
        for piece in (many, one):
            feeds.append({
                name: draw.integers(0, 256, shape, np.uint8) if dtype == np.uint8
                else draw.standard_normal(shape).astype(dtype)
                for name, (shape, dtype) in piece.inputs.items()
            })  # fmt: skip
        times = ort.steady([many.content, one.content], feeds, threads=self.threads, budget=PIECE_SECONDS)
        return max(1e-7, (times[0] - times[1]) / (COPIES - 1))

    def _signature(self, kernel: _Kernel, scheme: str) -> str:
        """Operator, attributes and shapes of a kernel: equal ones are timed once."""
        parts: list[object] = [scheme if kernel.weight is not None or scheme == "integer" else "floating"]
        for node in kernel.nodes:
            arguments = [
                tuple(self._shape(argument)) if isinstance(argument, fx.Node) else argument
                for argument in pytree.tree_leaves((node.args, node.kwargs))
            ]
            parts += [str(node.target), arguments]
        parts.append(kernel.end.name in self.site_of)
        return json.dumps(parts, default=str)

    def _shape(self, node: fx.Node) -> Sequence[int]:
        if is_constant(node):
            return tuple(self.program.tensor(str(node.target)).shape)
        return tuple(self.values[node.name].shape) if node.name in self.values else ()

    def _alone(self, kernel: _Kernel, scheme: str) -> float:
        if scheme not in self.parts:
            self.parts[scheme] = self._cut(scheme)
        pieces, outputs = self.parts[scheme]
        return self._difference(*(pieces.piece(outputs[kernel.end.name], copies) for copies in (COPIES, 1)))

    def _cut(self, scheme: str) -> tuple[MicroModels, dict[str, int]]:
        """All kernels that were not timed before, side by side in one graph; kernel's end -> number of its output."""
        wanted: dict[str, _Kernel] = {}
        for kernel in self.kernels:
            key = self._signature(kernel, scheme)
            if self._has(kernel, scheme) and key not in self.timings.seconds:
                wanted.setdefault(key, kernel)
        cutter = _Cutter(self.program, self.site_of, self.values)
        for kernel in wanted.values():
            cutter.add(kernel)
        outputs = {kernel.end.name: number for number, kernel in enumerate(wanted.values())}
        return MicroModels(cutter.program(*_SCHEMES[scheme]), cutter.inputs), outputs

    def _converted(self, site: ActivationSite, name: str, maker: str | None) -> ConversionTimes:
        node = self._node(name)
        ends = {kernel.nodes[0].name: kernel.end.name for kernel in self.kernels}
        readers: list[str | None] = []
        for user in _readers(node):
            if user.name in ends:
                readers.append(ends[user.name])
            elif user.op == "output" or not is_data_movement(user):
                readers.append(None)
        shape = tuple(self.values[name].shape)
        turned = sum(self._layout(name, integer) for integer in (True, False))
        return ConversionTimes(
            site.key, maker, tuple(dict.fromkeys(readers)), self._operator("QuantizeLinear", shape) + turned,
            self._operator("DequantizeLinear", shape) + turned, self._operator("Clip", shape),
        )  # fmt: skip

    def _anchored(self, table: LatencyModel) -> LatencyModel:
        """Parts scaled, and the rest set, so that the whole network in float and at 8 bits come out as measured."""
        bits = {word: dict.fromkeys(map(operator.attrgetter("key"), self.program.sites), b) for word, b in _WHOLE}
        whole = self._whole()
        floating, integer = (table.seconds(bits[word]) for word, _ in _WHOLE)
        known, factor, rest = _scales(whole["float"], whole["integer"], floating, integer)
        if not _plausible(factor) or not _plausible(known):
            log.warning(
                "parts timed alone and in the whole network differ by factors of %.2f in float and %.2f in integers: "
                "expect rough latencies",
                known,
                factor,
            )
        return replace(
            table,
            rest=rest,
            timed=tuple(
                replace(
                    t,
                    integer=factor * t.integer,
                    floating=known * t.floating,
                    unpacking=known * t.unpacking,
                    dynamic=factor * t.dynamic,
                    blockwise=factor * t.blockwise,
                )
                for t in table.timed
            ),
            converted=tuple(
                replace(c, quantize=factor * c.quantize, dequantize=factor * c.dequantize, clip=factor * c.clip)
                for c in table.converted
            ),
        )

    def _whole(self) -> dict[str, float]:
        shapes = [tuple(tensor.shape) for tensor in self.example.tensors]
        graphs = [str(self._lowered(bits).graph.graph) for _, bits in _WHOLE]
        name = hashlib.sha256(f"{graphs} {shapes}".encode()).hexdigest()[:16]
        keys = {word: f"network {name} {word}" for word, _ in _WHOLE}
        if not all(key in self.timings.seconds for key in keys.values()):
            found = self._time_whole()
            for word, seconds in found.items():
                self.timings.get(keys[word], lambda s=seconds: s)  # type: ignore[misc]
        return {word: self.timings.seconds[key] for word, key in keys.items()}

    def _lowered(self, bits: int) -> Program:
        """The network with one width for everything."""
        keys = [site.key for site in self.program.sites]
        facts: dict[str, Fact] = {key: ChosenFormat(_width(self.program, key, bits), 0.0) for key in keys}
        return run(pipeline.lowering(), self.program.learn(facts), Context((self.example,), cross_entropy))

    def _time_whole(self) -> dict[str, float]:
        times = whole_networks([self._lowered(bits) for _, bits in _WHOLE], self.example, self.threads)
        return {word: seconds for (word, _), seconds in zip(_WHOLE, times, strict=True)}


def _scales(whole_float: float, whole_integer: float, floating: float, integer: float) -> tuple[float, float, float]:
    """What scales the float parts and the integer ones, and the seconds that belong to neither.

    Parts in float are taken as they were timed, and so is what they leave of the whole network.  Where integer parts
    then had to be far from how they were timed, as in a network of many more weights than a cache holds, of which a
    small graph is none, the seconds that belong to neither are those that leave both scales nearest to one."""
    if not floating or not integer:
        return 1.0, 1.0, whole_float - floating
    known = min(1.0, 0.98 * whole_float / floating)
    rest = whole_float - known * floating
    factor = max(0.02 * whole_integer, whole_integer - rest) / integer
    if _plausible(factor):
        return known, factor, rest
    most = 0.98 * min(whole_float, whole_integer)
    rests = (most * step / 100 for step in range(101))
    found = (((whole_float - rest) / floating, (whole_integer - rest) / integer, rest) for rest in rests)
    return min(found, key=lambda scales: math.log(scales[0]) ** 2 + math.log(scales[1]) ** 2)


def _plausible(factor: float) -> bool:
    return 0.2 < factor < 2.5


_WHOLE = (("float", FLOAT_BITS), ("integer", 8))


def _width(program: Program, key: str, bits: int) -> int:
    """The widest that the site has of at most so many bits: whatever the width of a weight, its kernel is the same."""
    known = program.facts.get(key, Quantizers).by_bits
    if not is_static(bits):
        return bits if bits in known else FLOAT_BITS
    return max(b for b in known if b <= bits)


def _is_free(node: fx.Node) -> bool:
    """Whether a carrier costs nothing: a view, or a padding that the layer after takes in."""
    return is_data_movement(node) and (node.target in PADS or str(node.target).split(".")[1] in VIEWS)


def _readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a tensor, or a view of it."""
    found = []
    for user in node.users:
        if _is_free(user):
            found += _readers(user)
        else:
            found.append(user)
    return found


class _Cutter:
    """Puts kernels side by side into one graph, each with placeholders of its own."""

    def __init__(self, program: Program, site_of: Mapping[str, str], values: Mapping[str, Tensor]) -> None:
        self.whole, self.site_of, self.values = program, site_of, values
        self.module = fx.GraphModule(torch.nn.Module(), fx.Graph())
        self.graph = self.module.graph
        self.inputs: list[Tensor] = []
        self.outputs: list[fx.Node] = []
        self.sites: list[WeightSite | ActivationSite] = []
        self.layers: list[Layer] = []
        self.facts: dict[str, list[Fact]] = {}
        self.placeholders: list[fx.Node] = []

    def add(self, kernel: _Kernel) -> None:
        number = len(self.outputs)
        copies: dict[fx.Node, fx.Node] = {}
        for node in kernel.reads:
            if node not in copies:
                copies[node] = self._placeholder(f"x{number}_{len(copies)}", self.values[node.name])
                self._site(copies[node].name, node.name)
        layer = None
        for node in kernel.nodes:
            for argument in node.all_input_nodes:
                if is_constant(argument) and argument not in copies:
                    copies[argument] = self._constant(number, str(argument.target))
            copies[node] = self.graph.node_copy(node, lambda n: copies[n])
            copies[node].name = f"k{number}_{len(copies)}"
        first = kernel.nodes[0]
        if kernel.weight is not None:
            weight, bias = f"p{number}.weight", operands(first)[2:3]
            layer = Layer(
                copies[first].name, WEIGHTED_LAYERS[first.target], weight,
                f"p{number}.bias" if bias and isinstance(bias[0], fx.Node) else None, copies[kernel.reads[0]].name, 0,
            )  # fmt: skip
            self.layers.append(layer)
            self.sites.append(WeightSite(weight, layer.operator, tuple(self.whole.tensor(kernel.weight).shape)))
            self._know(weight, kernel.weight, Quantizers, RoundedWeights)
        if kernel.end.name in self.site_of:
            self._site(copies[kernel.end].name, kernel.end.name)
        self.outputs.append(copies[kernel.end])

    def _placeholder(self, name: str, value: Tensor) -> fx.Node:
        last = self.placeholders[-1] if self.placeholders else None
        with self.graph.inserting_after(last) if last else self.graph.inserting_before(None):
            node = self.graph.placeholder(name)
        node.meta["val"] = value
        self.placeholders.append(node)
        self.inputs.append(value)
        return node

    def _constant(self, number: int, target: str) -> fx.Node:
        layer = next((layer for layer in self.whole.layers if target in (layer.weight, layer.bias)), None)
        word = "weight" if layer is None or layer.weight == target else "bias"
        set_tensor(self.module, f"p{number}.{word}", self.whole.tensor(target).detach(), parameter=True)
        return self.graph.get_attr(f"p{number}.{word}")

    def _site(self, name: str, original: str) -> None:
        key = self.site_of.get(original)
        if key is None:
            return
        value = self.values[original]
        shape = tuple(value.shape)
        self.sites.append(ActivationSite(name, "part", shape, value.numel(), (name,), (), False))
        self._know(name, key, Quantizers)

    def _know(self, name: str, original: str, *kinds: Any) -> None:
        self.facts[name] = [self.whole.facts.get(original, kind) for kind in kinds]

    def program(self, weight_bits: int, activation_bits: int) -> Program:
        self.graph.output(tuple(self.outputs))
        self.graph.lint()
        self.module.recompile()
        program = Program(self.module, tuple(self.sites), tuple(self.layers))
        for key, facts in self.facts.items():
            for fact in facts:
                program = program.learn({key: fact})
        bits = {s.key: weight_bits if isinstance(s, WeightSite) else activation_bits for s in self.sites}
        program = program.learn({key: ChosenFormat(_width(program, key, width), 0.0) for key, width in bits.items()})
        return run(pipeline.lowering(), program, Context((), cross_entropy))
