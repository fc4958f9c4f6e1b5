"""A learned optimizer for networks of any shape: teleport, step, pull back."""
