"""Which weight-only formats pay: how fast onnxruntime multiplies by them, and what their errors cost in bits.

    python benchmarks/weight_only.py [--quick] [--check]

* Kernels: MatMulNBits by a weight of 4,096 x 1,024 for one sample and for 64, one thread, beside MatMul in float: bits,
  inputs of a block, with zero-points or without, activations in float or rounded to 8 bits (accuracy_level).
* Errors: ||Q(W) - W||^2 / ||W||^2 of MiniLM's first linear layers, rounded to the nearest, with a positive scale for
  each block, a scale of either sign as hawqfx has it, and a positive scale and a zero-point; beside them the bits of an
  element with those of its block: scales of 16 bits, and zero-points of as many bits as a code.
* Tables: one row and 64 of a table of 4,096 x 1,024, looked up in the codes that MatMulNBits reads, by the function of
  hawqfx's files and by onnxruntime's GatherBlockQuantized; beside them rows of codes that are unpacked when the file is
  loaded, with a scale per row, as static tables have it.  All make the same values, bit for bit.

--quick: one block size, one layer.
"""

from typing import Any

import data
import numpy as np
import onnx  # noqa: TID251  (kernels alone, in files that hawqfx does not write)
import onnx_ir
import sentences
import torch
from common import Claims, arguments, console
from onnx import TensorProto, helper  # noqa: TID251
from rich.table import Table
from torch import Tensor, nn

from hawqfx.export import packed_weights
from hawqfx.maths import affine, formats
from hawqfx.runtime import ort

ROWS, COLUMNS = 4096, 1024
SAMPLES = (1, 64)
BITS, BLOCKS = (2, 4, 8), (16, 32, 64, 128, 256)
SECONDS = 0.3  # for the runs of one kernel
FINE, COARSE = 40, 15  # clipping points: of a symmetric range, and of each end of an affine one


def _model(bits: int, block: int, zero_points: bool, accuracy: int) -> bytes:
    """A product by random codes; with 32 bits by floats."""
    random = np.random.default_rng(0)
    if bits == 32:
        tensors = {"B": random.standard_normal((COLUMNS, ROWS)).astype(np.float32)}
        node = helper.make_node("MatMul", ["A", "B"], ["Y"])
    else:
        blocks = COLUMNS // block
        tensors = {
            "B": random.integers(0, 256, (ROWS, blocks, block * bits // 8)).astype(np.uint8),
            "S": random.random(ROWS * blocks).astype(np.float32),
        }
        if zero_points:
            tensors["Z"] = random.integers(0, 256, ROWS * -(-blocks * bits // 8)).astype(np.uint8)
        node = helper.make_node(
            "MatMulNBits", ["A", *tensors], ["Y"], domain="com.microsoft",
            K=COLUMNS, N=ROWS, bits=bits, block_size=block, accuracy_level=accuracy,
        )  # fmt: skip
    graph = helper.make_graph(
        [node], "product",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, ["M", COLUMNS])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["M", ROWS])],
        [onnx.numpy_helper.from_array(values, name) for name, values in tensors.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def _microseconds(content: bytes) -> list[float]:
    draw = np.random.default_rng(0)
    feeds = [{"A": draw.standard_normal((samples, COLUMNS)).astype(np.float32)} for samples in SAMPLES]
    return [1e6 * ort.steady([content], [feed], threads=1, budget=SECONDS)[0] for feed in feeds]


def kernels(quick: bool) -> list[dict[str, Any]]:
    rows = [{"bits": 32, "microseconds": _microseconds(_model(32, 0, zero_points=False, accuracy=0))}]
    for bits in BITS:
        for block in (32,) if quick else BLOCKS:
            for zero_points in (False, True):
                for accuracy in (0, 4):
                    content = _model(bits, block, zero_points, accuracy)
                    row = {"bits": bits, "block": block, "zero points": zero_points, "accuracy": accuracy}
                    rows.append(row | {"microseconds": _microseconds(content)})
    return rows


def _table(bits: int, block: int, how: str) -> bytes:
    """A lookup of rows: "function", "operator", or "unpacked" with the block's scale for the whole row."""
    random, blocks = np.random.default_rng(0), COLUMNS // block
    codes = random.integers(0, 256, (ROWS, blocks, block * bits // 8)).astype(np.uint8)
    scale = random.random((ROWS, blocks)).astype(np.float32)
    # all kinds of scales have bfloat16 numbers, so that their values are equal
    halves = (scale.view(np.uint32) >> 16).astype(np.uint16)
    scale = (halves.astype(np.uint32) << 16).view(np.float32)
    merged = onnx.numpy_helper.from_array(np.array([0, -1]), "M")
    tensors = [onnx.numpy_helper.from_array(codes, "B"), merged]
    if how == "function":
        tensors.append(helper.make_tensor("S", TensorProto.BFLOAT16, [ROWS * blocks], halves.tobytes(), raw=True))
        nodes = [helper.make_node(packed_weights.ROWS, ["B", "S", "R"], ["P"], domain=packed_weights.DOMAIN,
                                  bits=bits, shape=[ROWS, COLUMNS]),
                 helper.make_node("Reshape", ["P", "M"], ["Y"])]  # fmt: skip
    elif how == "operator":
        tensors.append(onnx.numpy_helper.from_array(scale[..., None], "S"))
        nodes = [helper.make_node("GatherBlockQuantized", ["B", "R", "S"], ["P"], domain="com.microsoft", bits=bits,
                                  block_size=block, gather_axis=0, quantize_axis=2),
                 helper.make_node("Reshape", ["P", "M"], ["Y"])]  # fmt: skip
    else:
        parts = (codes[..., None] >> np.arange(0, 8, bits)) & ((1 << bits) - 1)
        unpacked = (parts.reshape(ROWS, COLUMNS).astype(np.int16) - (1 << (bits - 1))).astype(np.int8)
        tensors = [
            onnx.numpy_helper.from_array(unpacked, "B"), onnx.numpy_helper.from_array(scale[:, 0].copy(), "S"),
            onnx.numpy_helper.from_array(np.array([-1]), "M"),
        ]  # fmt: skip
        nodes = [
            helper.make_node("Gather", ["B", "R"], ["C"]), helper.make_node("Cast", ["C"], ["F"], to=TensorProto.FLOAT),
            helper.make_node("Gather", ["S", "R"], ["T"]), helper.make_node("Unsqueeze", ["T", "M"], ["U"]),
            helper.make_node("Mul", ["F", "U"], ["Y"]),
        ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "lookup",
        [helper.make_tensor_value_info("R", TensorProto.INT64, ["N"])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["N", COLUMNS])], tensors,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    opsets.append(helper.make_opsetid(packed_weights.DOMAIN, 1))
    model = onnx_ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    packed_weights.define_rows(model, "portable")
    return onnx_ir.to_proto(model).SerializeToString()


def tables(quick: bool) -> list[dict[str, Any]]:
    draw = np.random.default_rng(1)
    feeds = [{"R": draw.integers(0, ROWS, samples)} for samples in SAMPLES]
    rows = []
    for bits in BITS:
        for block in (64,) if quick else (32, 64, 128):
            contents = {how: _table(bits, block, how) for how in ("function", "operator", "unpacked")}
            one, other = (ort.run(ort.session(contents[how]), [feeds[1]["R"]])[0] for how in ("function", "operator"))
            timed = [
                ort.steady([*contents.values()], [feed] * len(contents), threads=1, budget=SECONDS) for feed in feeds
            ]
            rows.append({
                "bits": bits, "block": block, "equal": bool((one == other).all()),
                "microseconds": {how: [1e6 * each[at] for each in timed] for at, how in enumerate(contents)},
            })  # fmt: skip
    return rows


def _errors(rows: Tensor, scale: Tensor, zero: Tensor | int, bits: int) -> Tensor:
    low, high = affine.signed_range(bits)
    codes = (rows / scale).round_().add_(zero).clamp_(low, high)
    return codes.sub_(zero).mul_(scale).sub_(rows).square_().sum(1)


def _symmetric(rows: Tensor, bits: int) -> Tensor:
    """The least errors (blocks,) with positive scales on a grid."""
    largest = rows.abs().amax(1, keepdim=True).clamp_min(1e-20) / max(1, affine.signed_range(bits)[1])
    grid = torch.linspace(0.3, 1.3, FINE)
    return torch.stack([_errors(rows, (part * largest).bfloat16().float(), 0, bits) for part in grid]).amin(0)


def _with_zero_points(rows: Tensor, bits: int) -> Tensor:
    """The least errors (blocks,) with scales and zero-points on a grid of clipping points at both ends."""
    low, high = affine.signed_range(bits)
    bottom, top = rows.amin(1, keepdim=True).clamp_max(0), rows.amax(1, keepdim=True).clamp_min(0)
    least = torch.full((len(rows),), torch.inf)
    for below in torch.linspace(0.3, 1, COARSE):
        for above in torch.linspace(0.3, 1, COARSE):
            scale = ((above * top - below * bottom) / (high - low)).clamp_min(1e-20).bfloat16().float()
            zero = (low - below * bottom / scale).round().clamp(low, high)
            least = torch.minimum(least, _errors(rows, scale, zero, bits))
    return least


def errors(quick: bool) -> list[dict[str, Any]]:
    model = sentences.load(data.minilm_folder())
    weights = [layer.weight.detach() for layer in model.modules() if isinstance(layer, nn.Linear)][: 1 if quick else 12]
    energy = sum(float(weight.square().sum()) for weight in weights)
    found = []
    for bits in (2, 3, 4):
        for block in (32, 64, 128):
            lost = {"one sign": 0.0, "either sign": 0.0, "zero-point": 0.0}
            for weight in weights:
                rows = affine.in_blocks(weight, block).flatten(0, 1)
                scale = affine.block_scales(weight, bits, block).reshape(-1, 1)
                lost["one sign"] += float(_symmetric(rows, bits).sum())
                lost["either sign"] += float(_errors(rows, scale, 0, bits).sum())
                lost["zero-point"] += float(_with_zero_points(rows, bits).sum())
            shares = {name: error / energy for name, error in lost.items()}
            taken = {name: bits + (16 + bits * (name == "zero-point")) / block for name in lost}
            found.append({"bits": bits, "block": block, "error": shares, "bits of an element": taken})
    return found


def main() -> None:
    options = arguments(__doc__ or "")
    timed, lost, looked_up = kernels(options.quick), errors(options.quick), tables(options.quick)
    table = Table(title=f"microseconds, {ROWS} x {COLUMNS}, {SAMPLES[0]} and {SAMPLES[1]} samples")
    for title in ("bits", "block", "zero-points", "accuracy_level", *map(str, SAMPLES)):
        table.add_column(title, justify="right")
    for row in timed:
        parts = (row.get(name, "") for name in ("bits", "block", "zero points", "accuracy"))
        table.add_row(*map(str, parts), *(f"{value:.0f}" for value in row["microseconds"]))
    console.print(table)
    table = Table(title="squared error, and bits of an element with its block's")
    for title in ("bits", "block", *lost[0]["error"]):
        table.add_column(title, justify="right")
    for row in lost:
        cells = (f"{row['error'][name]:.4f} ({row['bits of an element'][name]:.3f})" for name in row["error"])
        table.add_row(str(row["bits"]), str(row["block"]), *cells)
    console.print(table)
    table = Table(title=f"microseconds to look up {SAMPLES[0]} and {SAMPLES[1]} rows, {ROWS} x {COLUMNS}")
    for title in ("bits", "block", *looked_up[0]["microseconds"]):
        table.add_column(title, justify="right")
    for row in looked_up:
        cells = (", ".join(f"{value:.0f}" for value in values) for values in row["microseconds"].values())
        table.add_row(str(row["bits"]), str(row["block"]), *cells)
    console.print(table)

    claims = Claims()
    ours = [
        row for row in timed if row.get("accuracy") == 4 and not row["zero points"] and row["block"] in formats.BLOCKS
    ]
    floating, slowest = timed[0]["microseconds"][0], max(row["microseconds"][0] for row in ours)
    claims.add(
        "one sample: every format of hawqfx is twice as fast as float",
        slowest < floating / 2,
        f"{slowest:.0f} and {floating:.0f} us",
    )
    least = min(row["error"]["one sign"] / row["error"]["either sign"] for row in lost)
    claims.add("scales of either sign lose less than positive ones", least > 1, f"{least:.3f} times less, or better")
    claims.add(
        "rows of a table in blocks are those of onnxruntime's own operator, bit for bit",
        all(row["equal"] for row in looked_up),
        f"{sum(row['equal'] for row in looked_up)} of {len(looked_up)}",
    )
    slowest = max(row["microseconds"]["function"][0] for row in looked_up)
    claims.add("a row is looked up in 20 microseconds", slowest < 20, f"{slowest:.1f} us")
    claims.finish("weight_only", options, {"kernels": timed, "errors": lost, "tables": looked_up})


if __name__ == "__main__":
    main()
