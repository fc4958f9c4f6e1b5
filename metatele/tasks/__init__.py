"""Inner problems: distributions of fits, functions of the plane and quadratics with a known symmetry and optimum."""

from metatele.tasks.fitting import Fitting, Mixture
from metatele.tasks.functions import FUNCTIONS, Booth, CircularFunction, Ellipse, Rosenbrock, function
from metatele.tasks.quadratics import LeastSquares, Quadratic, Shifted, least_squares
from metatele.tasks.regression import Problems, Regression

__all__ = [
    "FUNCTIONS",
    "Booth",
    "CircularFunction",
    "Ellipse",
    "Fitting",
    "LeastSquares",
    "Mixture",
    "Problems",
    "Quadratic",
    "Regression",
    "Rosenbrock",
    "Shifted",
    "function",
    "least_squares",
]
