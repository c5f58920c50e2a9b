"""fx operators -> ONNX operators, by torch.onnx with translations of the operators that hawqfx adds."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from onnxscript.values import Op, Opset

from hawqfx.errors import ExportError
from hawqfx.ir.custom_ops import (
    BLOCKWISE_LINEAR,
    DEQUANTIZE,
    DEQUANTIZE_ROWS,
    DYNAMIC_LINEAR,
    FAKE_QUANTIZE,
    GLOBAL_AVERAGE,
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
    with _quiet():
        try:
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=opset,
                optimize=False,  # it would fold the biases' scales into tensors that the file need not hold
                verbose=False,
                custom_translation_table=_TRANSLATIONS,
            )
        except Exception as error:  # the exporter raises many kinds
            raise ExportError(f"torch.onnx could not translate the graph: {error}") from error
    assert program is not None
    return program.model


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


def _constant(value: object, dtype: type[np.generic]) -> Any:
    return op.Constant(value=onnx.numpy_helper.from_array(np.array(value, dtype)))


def _activation(x: Any, scale: Any, zero_point: int, low: int, high: int) -> Any:
    zero = _constant(zero_point, np.uint8)
    codes = op.QuantizeLinear(x, scale, zero)
    if (low, high) != (0, 255):
        codes = op.Clip(codes, _constant(low, np.uint8), _constant(high, np.uint8))
    return op.DequantizeLinear(codes, scale, zero)


def _constant_codes(codes: Any, scale: Any) -> Any:
    return op.DequantizeLinear(codes, scale, axis=0)


def _rows(codes: Any, scale: Any, rows: Any) -> Any:
    values = op.Cast(op.Gather(codes, rows), to=onnx.TensorProto.FLOAT)
    return op.Mul(values, op.Unsqueeze(op.Gather(scale, rows), _constant(-1, np.int64)))


def _average(x: Any) -> Any:
    return op.GlobalAveragePool(x)


def _space_to_depth(x: Any, pads: Sequence[int], block: int) -> Any:
    if any(pads):
        left, right, top, bottom = pads
        x = op.Pad(x, _constant([0, 0, top, left, 0, 0, bottom, right], np.int64))
    return op.SpaceToDepth(x, blocksize=block)


def _matmul_nbits() -> Op:
    """The operator that onnxruntime adds to ONNX for weight-only layers, as far as it is used here."""
    schema = onnx.defs.OpSchema
    kinds = {"T1": "tensor(float)", "T2": "tensor(uint8)"}
    return Op(
        Opset("com.microsoft", 1),
        "MatMulNBits",
        schema(
            "MatMulNBits",
            "com.microsoft",
            1,
            inputs=[schema.FormalParameter(name, kind) for name, kind in (("A", "T1"), ("B", "T2"), ("scales", "T1"))],
            outputs=[schema.FormalParameter("Y", "T1")],
            type_constraints=[(name, [kind], "") for name, kind in kinds.items()],
            attributes=[
                schema.Attribute(name, schema.AttrType.INT, "")
                for name in ("K", "N", "bits", "block_size", "accuracy_level")
            ],
        ),
    )


_MATMUL_NBITS = _matmul_nbits()


def _dynamic_linear(x: Any, codes: Any, scale: Any) -> Any:
    rounded, step, zero = op.DynamicQuantizeLinear(x)
    sums = op.MatMulInteger(rounded, op.Transpose(codes, perm=[1, 0]), zero)
    return op.Mul(op.Cast(sums, to=onnx.TensorProto.FLOAT), op.Mul(step, scale))


def _blockwise_linear(x: Any, codes: Any, scale: Any, columns: int, bits: int) -> Any:
    rows, count, length = codes.shape
    if codes.dtype == ir.DataType.INT8:
        # what onnxruntime folds when it loads the file: code + 2^(bits-1), 8 / bits to a byte.  Old versions multiply
        # nothing but uint8 by int8.
        places = [[1 << shift for shift in range(0, 8, bits)]]
        parts = op.Transpose(op.Reshape(codes, _constant([-1, len(places[0])], np.int64)), perm=[1, 0])
        offset = _constant(-(1 << (bits - 1)), np.int8)
        sums = op.MatMulInteger(_constant(places, np.uint8), parts, _constant(0, np.uint8), offset)
        packed = op.Reshape(op.Cast(sums, to=onnx.TensorProto.UINT8), _constant([rows, count, -1], np.int64))  # type: ignore[type-var]
        block = length
    else:
        packed, block = codes, length * 8 // bits
    steps = op.Cast(scale, to=onnx.TensorProto.FLOAT)
    return _MATMUL_NBITS(x, packed, steps, K=columns, N=rows, bits=bits, block_size=block, accuracy_level=IN_8_BITS)


_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    FAKE_QUANTIZE: _activation,
    DEQUANTIZE: _constant_codes,
    DEQUANTIZE_ROWS: _rows,
    GLOBAL_AVERAGE: _average,
    SPACE_TO_DEPTH: _space_to_depth,
    DYNAMIC_LINEAR: _dynamic_linear,
    BLOCKWISE_LINEAR: _blockwise_linear,
}
