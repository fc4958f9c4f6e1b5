"""Distributions of inner problems."""

from metatele.tasks.fitting import Fitting, Mixture
from metatele.tasks.regression import Problems, Regression

__all__ = ["Fitting", "Mixture", "Problems", "Regression"]
