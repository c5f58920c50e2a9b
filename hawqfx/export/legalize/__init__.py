"""Rewrites that give a graph, lowered or not, the form that onnxruntime's kernels take."""
