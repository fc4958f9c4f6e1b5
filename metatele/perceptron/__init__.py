"""Batched functional perceptrons: shapes, activations with inverse and derivatives, losses, passes by hand."""
