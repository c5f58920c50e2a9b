"""onnxruntime and other backends: run, time, compare."""
