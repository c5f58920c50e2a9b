"""fx operators -> ONNX operators, by torch.onnx with translations of the operators that hawqfx adds."""

import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from onnxscript.values import Op, Opset, TracedOnnxFunction

from hawqfx.errors import ExportError
from hawqfx.export.packed_weights import DOMAIN, ROWS
from hawqfx.ir.custom_ops import (
    BLOCKWISE_LINEAR,
    BLOCKWISE_ROWS,
    DEQUANTIZE,
    DEQUANTIZE_ROWS,
    DYNAMIC_LINEAR,
    FAKE_QUANTIZE,
    GLOBAL_AVERAGE,
    PACK_BLOCKS,
    PERMUTE_CODES,
    SPACE_TO_DEPTH,
)

IN_8_BITS = 4  # accuracy_level of MatMulNBits: the activations are rounded to 8 bits


def translate(exported: torch.export.ExportedProgram, opset: int) -> ir.Model:
    """The ONNX model of an exported graph, with weights as integer codes that are not packed yet.

    Args:
        exported: the graph, in which weights are constants of the types that the file is to have.
        opset: the version of ONNX's operators.

    Raises:
        ExportError: if torch.onnx cannot translate the graph.
    """
    with _quiet(), _parsed_once():
        try:
            try:
                return _translated(_KeptWhole(exported), opset)
            except torch.onnx.OnnxExporterError:  # torch.onnx knows some operators by their parts alone
                return _translated(exported, opset)
        except Exception as error:
            raise ExportError(f"torch.onnx could not translate the graph: {_first_cause(error)}") from error


def _translated(exported: torch.export.ExportedProgram, opset: int) -> ir.Model:
    program = torch.onnx.export(
        exported,
        dynamo=True,
        opset_version=opset,
        optimize=False,  # it would fold the biases' scales into tensors that the file need not hold
        verbose=False,
        custom_translation_table=_TRANSLATIONS,
    )
    assert program is not None
    return program.model


def _first_cause(error: BaseException) -> BaseException:
    """The error that all others came from: those that torch.onnx wraps around it are advice to its own developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


class _KeptWhole(torch.export.ExportedProgram):
    """A program that does not decompose its operators.

    torch.onnx (2.13) has every graph traced twice more to decompose operators, which takes a third of an export's time;
    most graphs have none that it does not know.
    """

    def __init__(self, exported: torch.export.ExportedProgram) -> None:
        self.__dict__ = dict(exported.__dict__)

    def run_decompositions(self, *arguments: Any, **options: Any) -> torch.export.ExportedProgram:
        self.graph.eliminate_dead_code()
        return self


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings of packages that are not installed: nobody can act on them."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_FUNCTIONS: Any = TracedOnnxFunction  # torch's operators in ONNX's, which live as long as the process
_parsed = functools.cache(_FUNCTIONS.function_ir.fget)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """onnxscript (0.7) parses the source of all its functions for every export: a third of a small network's time."""
    again = _FUNCTIONS.function_ir
    _FUNCTIONS.function_ir = property(_parsed)
    try:
        yield
    finally:
        _FUNCTIONS.function_ir = again


def _constant(value: object, dtype: type[np.generic]) -> Any:
    return op.Constant(value=onnx.numpy_helper.from_array(np.array(value, dtype)))


def _activation(x: Any, scale: Any, zero_point: int, low: int, high: int, order: Sequence[int] = ()) -> Any:
    kind = np.uint8 if low >= 0 else np.int8
    zero = _constant(zero_point, kind)
    codes = op.QuantizeLinear(x, scale, zero)
    if (low, high) != (np.iinfo(kind).min, np.iinfo(kind).max):
        codes = op.Clip(codes, _constant(low, kind), _constant(high, kind))
    if order:
        codes = op.Transpose(codes, perm=order)
    return op.DequantizeLinear(codes, scale, zero)


def _constant_codes(codes: Any, scale: Any) -> Any:
    return op.DequantizeLinear(codes, scale, axis=0)


def _rows(codes: Any, scale: Any, rows: Any) -> Any:
    values = op.Cast(op.Gather(codes, rows), to=onnx.TensorProto.FLOAT)
    return op.Mul(values, op.Unsqueeze(op.Gather(scale, rows), _constant(-1, np.int64)))


def _conv3d(
    x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    """torch.onnx (2.13) gives one without a bias zeros of a wrong shape."""
    strides, pads, dilations = (
        [size] * 3 if isinstance(size, int) else [*size] * (3 // len(size)) for size in (stride, padding, dilation)
    )
    return op.Conv(x, weight, bias, strides=strides, pads=pads * 2, dilations=dilations, group=groups)


def _padded_conv(
    x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: str = "valid", dilation: Any = 1, groups: int = 1
) -> Any:
    """A convolution whose padding is a word; for "same", an odd one has more at the end."""
    sizes = weight.shape[2:]
    strides, dilations = (
        [each] * len(sizes) if isinstance(each, int) else [*each] * (len(sizes) // len(each))
        for each in (stride, dilation)
    )
    whole = [step * (size - 1) if padding == "same" else 0 for step, size in zip(dilations, sizes, strict=True)]
    pads = [each // 2 for each in whole] + [each - each // 2 for each in whole]
    return op.Conv(x, weight, bias, strides=strides, pads=pads, dilations=dilations, group=groups)


def _squeeze(x: Any, axes: Sequence[int]) -> Any:
    return op.Squeeze(x, _constant(axes, np.int64)) if axes else op.Identity(x)


def _rms_norm(x: Any, shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    """With a weight, and a power for the squares, onnxruntime (1.32) knows the norm, and has a kernel for it."""
    squares = op.Mul(x, x) if weight is None else op.Pow(x, _constant(2, np.float32))
    means = op.ReduceMean(squares, _constant(range(-len(shape), 0), np.int64))
    least = _constant(torch.finfo(torch.float32).eps if eps is None else eps, np.float32)
    values = op.Div(x, op.Sqrt(op.Add(means, least)))
    return values if weight is None else op.Mul(values, weight)


def _gelu(x: Any, approximate: str = "none") -> Any:
    """In the order that onnxruntime fuses, or by the operator that it has: its kernels take 1.5 and 1.4 ms for 1500 x
    1536, and the operators that torch.onnx (2.13) writes, whose order is another, 3.9 and 5.5 (1.32, one thread)."""
    if approximate == "tanh":
        return _FAST_GELU(x)
    half, one, root = (_constant(number, np.float32) for number in (0.5, 1, math.sqrt(2)))
    return op.Mul(op.Mul(x, half), op.Add(op.Erf(op.Div(x, root)), one))


def _average(x: Any) -> Any:
    return op.GlobalAveragePool(x)


def _adaptive_average(x: Any, sizes: Sequence[int]) -> Any:
    """The means of windows that share out each dimension, as products with a matrix of their weights: ONNX has no such
    pool, and torch no decomposition of that of volumes."""
    rank, first = len(x.shape), len(x.shape) - len(sizes)
    for axis, length, size in zip(range(first, rank), x.shape[first:], sizes, strict=True):
        if not isinstance(length, int):
            raise ExportError(
                f"an adaptive pool of dimension {axis}, whose size varies, has no ONNX: give it a fixed size"
            )
        columns = torch.nn.functional.adaptive_avg_pool1d(torch.eye(length)[None], size)[0]
        order = [axis if each == rank - 1 else rank - 1 if each == axis else each for each in range(rank)]
        means = op.MatMul(op.Transpose(x, perm=order), _constant(columns.numpy(), np.float32))
        x = op.Transpose(means, perm=order)
    return x


def _space_to_depth(x: Any, pads: Sequence[int], block: int) -> Any:
    if any(pads):
        left, right, top, bottom = pads
        x = op.Pad(x, _constant([0, 0, top, left, 0, 0, bottom, right], np.int64))
    return op.SpaceToDepth(x, blocksize=block)


def _operator(domain: str, name: str, inputs: Mapping[str, str], attributes: Sequence[str]) -> Op:
    """An operator with an output of floats that ONNX itself has not, as far as it is used here.

    Args:
        domain: of the operator.
        name: of the operator.
        inputs: name of an input -> its type.
        attributes: names of attributes; "shape" is a list of integers, others are integers.
    """
    schema = onnx.defs.OpSchema
    kinds = {kind: f"T{number}" for number, kind in enumerate(dict.fromkeys([*inputs.values(), "float"]))}
    types = {"shape": schema.AttrType.INTS}
    return Op(
        Opset(domain, 1),
        name,
        schema(
            name,
            domain,
            1,
            inputs=[schema.FormalParameter(name, kinds[kind]) for name, kind in inputs.items()],
            outputs=[schema.FormalParameter("Y", kinds["float"])],
            type_constraints=[(symbol, [f"tensor({kind})"], "") for kind, symbol in kinds.items()],
            attributes=[schema.Attribute(name, types.get(name, schema.AttrType.INT), "") for name in attributes],
        ),
    )


# onnxruntime adds them to ONNX: GELU by a hyperbolic tangent, which it fuses on a GPU alone, and weight-only layers
_FAST_GELU = _operator("com.microsoft", "FastGelu", {"X": "float"}, ())
_MATMUL_NBITS = _operator(
    "com.microsoft",
    "MatMulNBits",
    {"A": "float", "B": "uint8", "scales": "float"},
    ("K", "N", "bits", "block_size", "accuracy_level"),
)
_ROWS = _operator(DOMAIN, ROWS, {"codes": "uint8", "scale": "bfloat16", "rows": "int64"}, ("bits", "shape"))


def _dynamic_linear(x: Any, codes: Any, scale: Any) -> Any:
    rounded, step, zero = op.DynamicQuantizeLinear(x)
    sums = op.MatMulInteger(rounded, op.Transpose(codes, perm=[1, 0]), zero)
    return op.Mul(op.Cast(sums, to=onnx.TensorProto.FLOAT), op.Mul(step, scale))


def _pack_blocks(codes: Any, bits: int) -> Any:
    """What onnxruntime folds when it loads the file: code + 2^(bits-1), 8 / bits to a byte.  Old versions multiply
    nothing but uint8 by int8."""
    places = [[1 << shift for shift in range(0, 8, bits)]]
    parts = op.Transpose(op.Reshape(codes, _constant([-1, len(places[0])], np.int64)), perm=[1, 0])
    offset = _constant(-(1 << (bits - 1)), np.int8)
    sums = op.MatMulInteger(_constant(places, np.uint8), parts, _constant(0, np.uint8), offset)
    return op.Reshape(op.Cast(sums, to=onnx.TensorProto.UINT8), _constant([*codes.shape[:2], -1], np.int64))  # type: ignore[type-var]


def _blockwise_linear(x: Any, codes: Any, scale: Any, columns: int, bits: int) -> Any:
    rows, _, length = codes.shape
    steps, block = op.Cast(scale, to=onnx.TensorProto.FLOAT), length * 8 // bits
    return _MATMUL_NBITS(x, codes, steps, K=columns, N=rows, bits=bits, block_size=block, accuracy_level=IN_8_BITS)


def _blockwise_rows(codes: Any, scale: Any, rows: Any, columns: int, bits: int) -> Any:
    count, blocks, length = codes.shape
    parts = _ROWS(codes, scale, rows, bits=bits, shape=[count, columns])
    values = op.Reshape(parts, _constant([0] * len(rows.shape) + [-1], np.int64))
    if columns == blocks * length * 8 // bits:
        return values
    return op.Slice(values, *(_constant([number], np.int64) for number in (0, columns, -1)))


_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.conv3d.default: _conv3d,
    torch.ops.aten.conv1d.padding: _padded_conv,
    torch.ops.aten.conv2d.padding: _padded_conv,
    torch.ops.aten.conv3d.padding: _padded_conv,
    torch.ops.aten.squeeze.dims: _squeeze,
    torch.ops.aten.rms_norm.default: _rms_norm,
    torch.ops.aten.adaptive_avg_pool3d.default: _adaptive_average,
    torch.ops.aten.gelu.default: _gelu,
    FAKE_QUANTIZE: _activation,
    PERMUTE_CODES: _activation,
    DEQUANTIZE: _constant_codes,
    DEQUANTIZE_ROWS: _rows,
    GLOBAL_AVERAGE: _average,
    SPACE_TO_DEPTH: _space_to_depth,
    DYNAMIC_LINEAR: _dynamic_linear,
    PACK_BLOCKS: _pack_blocks,
    BLOCKWISE_LINEAR: _blockwise_linear,
    BLOCKWISE_ROWS: _blockwise_rows,
}
