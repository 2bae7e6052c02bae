"""Tensors from few of their entries."""
