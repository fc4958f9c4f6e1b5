"""What a teleport can aim at, as functions of the weights on a batch."""

from metatele.geometry.landscape import Landscape, Point
from metatele.geometry.objectives import GradientNorm, Objective, objective
from metatele.geometry.optimality import OptimalityReport, commutator, one_teleport_is_enough

__all__ = [
    "GradientNorm",
    "Landscape",
    "Objective",
    "OptimalityReport",
    "Point",
    "commutator",
    "objective",
    "one_teleport_is_enough",
]
