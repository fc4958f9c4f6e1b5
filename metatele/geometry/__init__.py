"""What a teleport can aim at, as functions of the weights on a batch."""

from metatele.geometry.landscape import Landscape, Point
from metatele.geometry.objectives import GradientNorm, Objective, objective

__all__ = ["GradientNorm", "Landscape", "Objective", "Point", "objective"]
