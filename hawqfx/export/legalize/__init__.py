"""Rewrites that give a lowered graph the form that onnxruntime's kernels take."""
