"""Analyses of a graph: nodes that compute with integers, pointwise functions, tensors in memory."""
