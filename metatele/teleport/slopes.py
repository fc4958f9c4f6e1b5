"""Objectives along an ascent of a module: a number, and its derivative by the weights where it was last asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from metatele.geometry import Curvature, GradientNorm, ModuleObjective, ModulePoint, Sharpness
from metatele.geometry.module_point import norm_of


def told(*numbers: Tensor) -> list[float]:
    """Numbers on a device, in one read."""
    device = numbers[0].device
    return torch.stack([n.detach().double().to(device) for n in numbers]).tolist()


class Slope(ABC):
    """What an ascent asks for at the weights as they are."""

    @abstractmethod
    def value(self) -> tuple[float, float]:
        """The loss, and the objective."""

    @abstractmethod
    def derivative(self) -> dict[str, Tensor]:
        """A positive multiple of the objective's derivative where :meth:`value` was last asked for, by name."""


class GradientNormSlope(Slope):
    """``‖∇L‖²`` and half its derivative, ``∇²L ∇L``: one gradient each, the first of which is kept for the second."""

    def __init__(self, point: ModulePoint) -> None:
        self.point = point
        self.gradients: dict[str, Tensor] = {}
        self.sizes = (0.0, 0.0)  # of the weights and of their gradient

    def value(self) -> tuple[float, float]:
        """See the base class."""
        loss, self.gradients = self.point.gradients()
        sizes = norm_of(list(self.point.own.values())), norm_of(list(self.gradients.values()))
        value, *known = told(loss, *sizes)
        self.sizes = known[0], known[1]
        return value, known[1] ** 2

    def derivative(self) -> dict[str, Tensor]:
        """See the base class."""
        return self.point.difference(self.gradients, self.gradients, *self.sizes)


class ObjectiveSlope(Slope):
    """Sharpness or curvature: a value costs no gradient, so that one is made for steps that are kept alone."""

    def __init__(self, objective: Sharpness | Curvature, point: ModulePoint) -> None:
        self.objective, self.point = objective, point

    def value(self) -> tuple[float, float]:
        """See the base class."""
        loss, value = told(self.point.loss(), self.objective.value(self.point))
        return loss, value

    def derivative(self) -> dict[str, Tensor]:
        """See the base class."""
        return self.point.unflatten(self.objective.value_and_gradient(self.point)[1])


def slope_of(objective: ModuleObjective, point: ModulePoint) -> Slope:
    """The slope of an objective at a point that moves."""
    return GradientNormSlope(point) if isinstance(objective, GradientNorm) else ObjectiveSlope(objective, point)
