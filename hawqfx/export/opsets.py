"""Versions of ONNX and of onnxruntime that each packing needs."""

from typing import Literal

Packing = Literal["portable", "native"]
"""The layout of weights in a file: "portable" stores bit-planes in uint8, "native" stores ONNX's INT4 and INT2."""

OPSET: dict[Packing, int] = {"portable": 18, "native": 25}
IR_VERSION: dict[Packing, int] = {"portable": 10, "native": 13}
OLDEST_RUNTIME: dict[Packing, str] = {"portable": "1.20", "native": "1.24"}
