"""A program, lowered or not, as an ONNX file.

    legalize      hawqfx.export.legalize: the form that onnxruntime's kernels take, as passes on the graph
    translate     translations: fx operators -> ONNX operators
    pack          packed_weights: integer weights in `bits` bits each
    clean         cleanup: only what a reader needs, and the names of the model's inputs and outputs
    write         write: whole or not at all

onnxruntime's kernels, as measured with onnxruntime 1.32, need weights signed with an explicit zero-point of zeros
(QGemm is not fused without one), activations uint8 with a zero-point (int8 where SignedFactors says so), biases int32,
and 4- or 6-bit activations as uint8 with a Clip on the integers (uint4 stays in float).
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from hawqfx.atomic_write import check_writable
from hawqfx.errors import UsageError
from hawqfx.export import cleanup, packed_weights, translations
from hawqfx.export.legalize.pipeline import legalization
from hawqfx.export.opsets import IR_VERSION, OPSET, Packing
from hawqfx.export.targets import ANY, WITHOUT_VNNI
from hawqfx.export.write import write
from hawqfx.frontend import capture, decoders
from hawqfx.frontend.context import Context
from hawqfx.frontend.data import Batch
from hawqfx.frontend.losses import cross_entropy
from hawqfx.ir.facts import StoredBits
from hawqfx.ir.graph import output_names
from hawqfx.ir.program import Program
from hawqfx.ir.sources import dropped_sources
from hawqfx.pass_manager.base import Observer
from hawqfx.pass_manager.manager import run

CHECKED = 2  # samples on which the legalization passes are held to their tolerances


def export(
    program: Program,
    example: Batch,
    path: str | Path,
    packing: Packing = "portable",
    metadata: Mapping[str, str] = {},
    observers: Sequence[Observer] = (),
    most: float = math.inf,
    check: Callable[[Path], None] | None = None,
    target: str = ANY,
) -> int:
    """Write a program, lowered or not, as an ONNX file; whole or not at all.

    Args:
        program: the network.
        example: inputs of the network, with dimension 0 the batch.
        path: of the file.
        packing: "portable" loads in onnxruntime 1.20 and later, "native" in 1.24 and later.
        metadata: texts that the file carries, by name.
        observers: told of the legalization passes.
        most: the most bytes that the file may have.
        check: looks at the file before it takes its place, and raises ExportError if it is not right.
        target: the processors that the file is made for, a key of hawqfx.export.targets.WIDEST.

    Returns:
        The bytes of the file, and of the one with its tensors where there are two.

    Raises:
        ExportError: if the graph cannot be translated, or the file cannot be written or would be too large.
        UsageError: if there is no such packing.
    """
    if packing not in OPSET:
        raise UsageError(f"packing={packing!r}: must be one of {', '.join(OPSET)}")
    check_writable(Path(path))
    legal = run(legalization(signed_factors=target != WITHOUT_VNNI), program, _check(program, example), observers)
    with dropped_sources():
        model = translations.translate(capture.export_again(legal.graph, example), OPSET[packing])
    for name, bits in legal.about(StoredBits).bits.items():
        packed_weights.pack(model, name, bits, packing)
    packed_weights.define_rows(model, packing)
    # fx calls the node of an input `input` input_1, since Python has a function of that name; the file does not
    inputs = legal.graph.graph.find_nodes(op="placeholder")
    dimensions = {str(node.target): legal.dimensions.get(node.name, {}) for node in inputs}
    cleanup.clean(model, output_names(legal.graph), dimensions)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = decoders.name_in_file(str(value.name))
    model.ir_version = IR_VERSION[packing]
    model.producer_name, model.producer_version = "hawqfx", None
    model.metadata_props.update(metadata)
    return write(model, Path(path), most, check)


# OpenVINO 2026.4 refuses the functions that unpack weights, and with them inlined reads bit-planes wrong without a word
RUNTIME = "onnxruntime and onnxruntime-web; other runtimes may compute something else"


def metadata(plan: str, schemes: Collection[str], target: str, packing: Packing) -> dict[str, str]:
    """The texts that the file of a plan carries.

    Args:
        plan: the plan's digest.
        schemes: of its layers.
        target: the processors that the file is made for.
        packing: of its weights.
    """
    from hawqfx import __version__

    return {
        "hawqfx_version": __version__, "hawqfx_plan": plan, "hawqfx_packing": packing, "hawqfx_target": target,
        "hawqfx_schemes": ", ".join(sorted(schemes)), "hawqfx_runtime": RUNTIME,
    }  # fmt: skip


def _check(program: Program, example: Batch) -> Context:
    """The context on which passes are checked: a few samples, so that export stays fast."""
    few = example.first(CHECKED) if program.dynamic_batch else example
    return Context((few,), cross_entropy)  # no pass of legalization asks for the loss
