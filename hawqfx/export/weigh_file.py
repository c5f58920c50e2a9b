"""The pass that weighs the exported file, for limits on its size."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from hawqfx.atomic_write import scratch_folder
from hawqfx.export.exporter import export, metadata
from hawqfx.export.targets import ANY
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import NETWORK, ByteCost, ChosenFormat, FileText, FloatNetwork, Quantizers, RoundedWeights
from hawqfx.ir.program import Program
from hawqfx.ir.quantizers import nearest_codes
from hawqfx.maths.formats import FLOAT, Format
from hawqfx.maths.seeding import generator
from hawqfx.pass_manager.base import Analysis, Kind, option
from hawqfx.passes.lowering import Lowering

DIGEST = "0" * 16  # as long as a plan's


def exported_bytes(lowered: Program, context: Context, target: str) -> int:
    """The bytes of the file of a lowered network, in the portable packing."""
    texts = metadata(DIGEST, set(lowered.schemes().values()), target, "portable")
    return _written(lowered, context, texts, target)


def _written(program: Program, context: Context, texts: Mapping[str, str], target: str = ANY) -> int:
    with scratch_folder() as folder:
        return export(program, context.batches[0], folder / "model.onnx", "portable", texts, target=target)


@dataclass(frozen=True)
class WeighFile(Analysis):
    """Exports the network in its widest formats, static ones where there are any, and the float network, and gives the
    FileText."""

    target: str = option(ANY, "the processors that the file is made for")
    needs: ClassVar[tuple[Kind, ...]] = (Quantizers, RoundedWeights, ByteCost, FloatNetwork)
    gives: ClassVar[tuple[Kind, ...]] = (FileText,)

    def learn(self, program: Program, context: Context) -> Mapping[str, FileText]:
        """The text of the file, as a fact about the whole network.

        Raises:
            ExportError: if the network cannot be exported.
        """
        formats = {site.key: _widest(program.facts.get(site.key, Quantizers)) for site in program.sites}
        planned = program.learn({key: ChosenFormat(width, 0.0) for key, width in formats.items()})
        whole = exported_bytes(Lowering().rewrite(_all_different(planned)), context, self.target)
        graph = program.about(FloatNetwork).graph
        float_bytes = _written(program.with_graph(graph), context, {})
        return {NETWORK: FileText(whole - planned.weight_bytes(), formats, float_bytes)}


def _all_different(planned: Program) -> Program:
    """The program with codes, scales and biases that no two weights share.

    A file has equal tensors once.  Those that are equal before a plan is finished may part when codes are made anew and
    biases move, and the file may not grow by that.
    """
    random = generator("weighing", device=torch.device("cpu"))
    own, formats = planned.with_own_bias, planned.formats()
    quantizers: dict[str, Quantizers] = {}
    rounded: dict[str, RoundedWeights] = {}
    for number, site in enumerate(planned.weights, 1):
        width, known = formats[site.key], planned.facts.get(site.key, Quantizers).by_format
        if width.is_float:
            continue
        quantizer, fact = known[width], planned.facts.get(site.key, RoundedWeights)
        if width.is_static:
            scale = tuple(each * (1 + number / 1024) for each in quantizer.scale)
            quantizers[site.key] = Quantizers({**known, width: replace(quantizer, scale=scale)})
        codes = torch.randint(quantizer.low, quantizer.high + 1, site.shape, generator=random)
        codes = nearest_codes(codes.float(), quantizer).to(fact.codes[width])
        biases = dict(fact.biases)
        for layer in planned.layers:
            if layer.weight == site.key and layer.node in own and layer.bias is not None:
                bias = planned.tensor(layer.bias).detach()
                noise = torch.randint(1, 1024, bias.shape, generator=random).to(bias)
                # in steps of the products, of which int32 holds so many more than calibration lets a bias have
                read = planned.facts.get(layer.input, Quantizers).by_format.get(formats[layer.input])
                step = read.scale[0] if read is not None and formats[layer.input].is_static else 1.0
                scales = torch.tensor(quantizer.scale, device=bias.device).abs()
                # of each row its own, of which int32 holds the fewest where it is least
                biases[width] = bias + noise * step * (scales if scales.shape == bias.shape else scales.max())
        rounded[site.key] = replace(fact, codes={**fact.codes, width: codes}, biases=biases)
    return planned.learn(quantizers).learn(rounded)


def _widest(quantizers: Quantizers) -> Format:
    """The widest static format, of those whose rows have bits of their own where there are any, which take the most
    text; or the widest in blocks where there is none."""
    known = [width for width in quantizers.by_format if width.is_static or width.is_blockwise]
    mixed = (width for width in known if quantizers.by_format[width].rows)
    widest = max((width for width in known if width.is_static), default=max(known, default=FLOAT))
    return max(mixed, default=widest)
