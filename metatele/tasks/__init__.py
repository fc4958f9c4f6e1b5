"""Distributions of inner problems."""

from metatele.tasks.regression import Problems, Regression

__all__ = ["Problems", "Regression"]
