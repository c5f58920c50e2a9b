"""A lowered program as an ONNX file."""
