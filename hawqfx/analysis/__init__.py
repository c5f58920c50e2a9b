"""What can be said about a graph: integer or float, pointwise functions, tensors in memory."""
