"""Objectives: one number for each network, and its gradient with respect to the weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metatele.geometry.landscape import Point, point_given
from metatele.geometry.module_point import ModulePoint
from metatele.perceptron.mlp import Weights


class Objective(ABC):
    """What a teleport raises or lowers on a level set of the loss: a number for each network, and its gradient.

    A subclass gives the value ``[...]`` and the gradient ``[..., P]`` at a :class:`Point`. Those of this package also
    take a :class:`~metatele.geometry.ModulePoint`, any module, and give one number and ``[P]``.

    Attributes:
        name: Key in ``OBJECTIVES``.
        needs_loss: Whether values of the loss are needed beyond its gradient at the outputs, which a backward pass
            tells.

    Example:
        >>> from metatele.geometry import OBJECTIVES
        >>> sorted(OBJECTIVES)
        ['curvature', 'grad-norm', 'sharpness']
    """

    name: ClassVar[str]
    needs_loss: ClassVar[bool] = False

    @abstractmethod
    def value(self, point: Point) -> Tensor:
        """Its value ``[...]``."""

    @abstractmethod
    def value_and_gradient(self, point: Point) -> tuple[Tensor, Tensor]:
        """Its value ``[...]`` and its derivative with respect to the weights ``[..., P]``."""

    def value_and_derivative(self, point: Point) -> tuple[Tensor, Weights]:
        """The same, layer by layer; what an ascent asks for."""
        value, gradient = self.value_and_gradient(point)
        return value, point.landscape.mlp.unflatten(gradient)


@dataclass(frozen=True)
class GradientNorm(Objective):
    r"""``‖∇L(w)‖²``, or with a metric ``‖∇L(w)‖²_A = ∇Lᵀ A ∇L`` (Zhao et al. 2024, Eq. 67).

    Its derivative is ``2 ∇²L A ∇L``, one Hessian-vector product; of any module a difference of gradients.

    Args:
        metric: Diagonal of A ``[..., P]``, held fixed: an adaptive optimizer's step is ``-η A ∇L``, so
            ``‖∇L‖²_A`` is the decrease it makes per unit of learning rate. ``None`` is the identity.

    Example:
        >>> import torch
        >>> from metatele.perceptron.activations import Identity
        >>> from metatele.geometry import Landscape
        >>> from metatele.perceptron.losses import SquaredError
        >>> from metatele.perceptron.mlp import MLP
        >>> parabola = Landscape(MLP((1, 1), Identity()), torch.tensor([[2.0]]), torch.zeros(1, 1), SquaredError())
        >>> GradientNorm().value_and_gradient(parabola.at(torch.tensor([3.0])))  # (4w)² and its derivative
        (tensor(144.), tensor([96.]))
    """

    metric: Tensor | None = None
    name: ClassVar[str] = "grad-norm"

    def value(self, point: Point | ModulePoint) -> Tensor:
        """See the class."""
        if isinstance(point, ModulePoint):
            gradient = point.flatten(point.gradients()[1])
            return (gradient * self._of_flat(gradient)).sum()
        point_given(point)
        gradient = point.gradient
        return (gradient * self._of_flat(gradient)).sum(-1)

    def value_and_gradient(self, point: Point | ModulePoint) -> tuple[Tensor, Tensor]:
        """See the class."""
        if isinstance(point, ModulePoint):
            here = point.gradients()[1]
            gradient = point.flatten(here)
            scaled = self._of_flat(gradient)
            product = point.hessian_product(point.unflatten(scaled), here)
            return (gradient * scaled).sum(), 2 * point.flatten(product)
        point_given(point)
        value, derivative = self.value_and_derivative(point)
        return value, point.landscape.mlp.flatten(derivative)

    def value_and_derivative(self, point: Point) -> tuple[Tensor, Weights]:
        """See the class."""
        point_given(point)
        product = point.curvature(self._scaled(point))
        parts = [t for t in (*product.matrices, *product.biases) if t is not None]
        doubled = iter(torch._foreach_mul(parts, 2))
        return self.value(point), _map(lambda _: next(doubled), product)

    def _of_flat(self, gradient: Tensor) -> Tensor:
        return gradient if self.metric is None else self.metric * gradient

    def _scaled(self, point: Point) -> Weights:
        if self.metric is None:
            return point.derivative
        return point.landscape.mlp.unflatten(self._of_flat(point.gradient))


def _map(function: Callable[[Tensor], Tensor], weights: Weights) -> Weights:
    return Weights(
        tuple(function(W) for W in weights.matrices),
        tuple(None if b is None else function(b) for b in weights.biases),
    )
