"""Pure functions of tensors and numbers; nothing here knows a graph."""
