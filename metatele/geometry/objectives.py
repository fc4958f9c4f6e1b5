"""Objectives: one number for each network, and its gradient with respect to the weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from metatele.errors import ConfigError
from metatele.geometry.landscape import Point


class Objective(ABC):
    """What a teleport raises or lowers on a level set of the loss."""

    name: ClassVar[str]

    @abstractmethod
    def value(self, point: Point) -> Tensor:
        """Its value ``[...]``."""

    @abstractmethod
    def value_and_gradient(self, point: Point) -> tuple[Tensor, Tensor]:
        """Its value ``[...]`` and its derivative with respect to the weights ``[..., P]``."""


@dataclass(frozen=True)
class GradientNorm(Objective):
    r"""``‖∇L(w)‖²``, or with a metric ``‖∇L(w)‖²_A = ∇Lᵀ A ∇L`` (PAPER §5).

    Its derivative is ``2 ∇²L A ∇L``, one Hessian-vector product.

    Args:
        metric: Diagonal of A ``[..., P]``, held fixed: an adaptive optimizer's step is ``-η A ∇L``, so
            ``‖∇L‖²_A`` is the decrease it makes per unit of learning rate. ``None`` is the identity.

    Example:
        >>> import torch
        >>> from metatele.activations import Identity
        >>> from metatele.geometry import Landscape
        >>> from metatele.losses import SquaredError
        >>> from metatele.mlp import MLP
        >>> parabola = Landscape(MLP((1, 1), Identity()), torch.tensor([[2.0]]), torch.zeros(1, 1), SquaredError())
        >>> GradientNorm().value_and_gradient(parabola.at(torch.tensor([3.0])))  # (4w)² and its derivative
        (tensor(144.), tensor([96.]))
    """

    metric: Tensor | None = None
    name: ClassVar[str] = "grad-norm"

    def value(self, point: Point) -> Tensor:
        """See the class."""
        return (point.gradient * self._scaled(point.gradient)).sum(-1)

    def value_and_gradient(self, point: Point) -> tuple[Tensor, Tensor]:
        """See the class."""
        scaled = self._scaled(point.gradient)
        return (point.gradient * scaled).sum(-1), 2 * point.hessian_product(scaled)

    def _scaled(self, gradient: Tensor) -> Tensor:
        return gradient if self.metric is None else self.metric * gradient


OBJECTIVES: dict[str, type[Objective]] = {GradientNorm.name: GradientNorm}


def objective(name: str) -> Objective:
    """Objective by name: ``grad-norm``."""
    if name not in OBJECTIVES:
        raise ConfigError(f"objective must be one of {', '.join(OBJECTIVES)}, got {name!r}")
    return OBJECTIVES[name]()
