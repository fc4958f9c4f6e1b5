r"""Functions of two variables with a known symmetry and optimum.

Each is ``L(w) = ‖u(w)‖²`` for an invertible map u of the plane, so its level sets are circles in u and
the rotations ``w ↦ u⁻¹(R(θ) u(w))`` keep it. The ellipse is the quadratic of Zhao et al. 2024, Section 3.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metatele.errors import ConfigError

_TRIES = 30


class CircularFunction(ABC):
    """``L(w) = ‖u(w)‖²`` on points ``[..., 2]``.

    Attributes:
        name: Key in :data:`FUNCTIONS`.
        start: Where experiments begin.
        optimum: The minimiser.

    Example:
        >>> w = torch.tensor([3.0, 2.0])
        >>> turned = function("booth").rotate(w, torch.tensor(1.0))  # along the level set
        >>> torch.allclose(function("booth").value(turned), function("booth").value(w))
        True
    """

    name: ClassVar[str]
    start: ClassVar[tuple[float, float]]
    optimum: ClassVar[tuple[float, float]]

    @abstractmethod
    def coordinates(self, w: Tensor) -> Tensor:
        """``u(w)``."""

    @abstractmethod
    def point(self, u: Tensor) -> Tensor:
        """``u⁻¹``."""

    @abstractmethod
    def jacobian(self, w: Tensor) -> Tensor:
        """``∂u/∂w``, ``[..., 2, 2]``."""

    def value(self, w: Tensor) -> Tensor:
        """``L(w)``, ``[...]``."""
        return self.coordinates(w).square().sum(-1)

    def gradient(self, w: Tensor) -> Tensor:
        """``∇L = 2 Jᵀu``, ``[..., 2]``."""
        return 2 * (self.jacobian(w).mT @ self.coordinates(w).unsqueeze(-1)).squeeze(-1)

    def rotate(self, w: Tensor, angle: Tensor) -> Tensor:
        """The group's action: rotation of u by ``angle [...]``."""
        u = self.coordinates(w)
        cos, sin = angle.cos(), angle.sin()
        return self.point(torch.stack([cos * u[..., 0] - sin * u[..., 1], sin * u[..., 0] + cos * u[..., 1]], -1))

    def gradient_norm(self, w: Tensor) -> Tensor:
        """``‖∇L‖²``, ``[...]``."""
        return self.gradient(w).square().sum(-1)

    def slope(self, w: Tensor) -> Tensor:
        """Derivative of ``‖∇L‖²`` along the orbit, with respect to the angle at 0."""
        with torch.enable_grad():
            angle = torch.zeros(w.shape[:-1], dtype=w.dtype, requires_grad=True)
            norm = self.gradient_norm(self.rotate(w.detach(), angle))
            return torch.autograd.grad(norm.sum(), angle)[0]

    @torch.no_grad()
    def teleport(self, w: Tensor, steps: int = 50, tolerance: float = 1e-12) -> Tensor:
        """The point of the orbit with the largest gradient norm that ascent from ``w`` finds.

        Each step goes along the slope by an angle that is halved until the norm rises.

        Args:
            w: Points ``[..., 2]``.
            steps: At most so many.
            tolerance: Stop where the slope relative to the norm is below it everywhere.

        Returns:
            Points ``[..., 2]`` of the same loss.
        """
        angle = torch.full(w.shape[:-1], 0.5, dtype=w.dtype)
        for _ in range(steps):
            norm, slope = self.gradient_norm(w), self.slope(w)
            waiting = slope.abs() > tolerance * norm
            for _ in range(_TRIES):
                if not bool(waiting.any()):
                    break
                moved = self.rotate(w, angle * slope.sign())
                better = waiting & (self.gradient_norm(moved) > norm)
                w = torch.where(better.unsqueeze(-1), moved, w)
                waiting = waiting & ~better
                angle = torch.where(waiting, angle / 2, angle)
        return w


@dataclass(frozen=True)
class Ellipse(CircularFunction):
    """``½(w₁² + λ²w₂²)``, least at (0, 0).

    Args:
        ratio: λ; the condition number is its square.

    Example:
        >>> ellipse = Ellipse()
        >>> best = ellipse.teleport(torch.tensor([3.0, 0.5]).double())
        >>> bool(best[0].abs() < 1e-5)  # the short axis, where the gradient is an eigenvector of the Hessian
        True
    """

    ratio: float = 3.0
    name: ClassVar[str] = "ellipse"
    start: ClassVar[tuple[float, float]] = (4.0, 0.4)
    optimum: ClassVar[tuple[float, float]] = (0.0, 0.0)

    def _scale(self, like: Tensor) -> Tensor:
        return torch.tensor([0.5**0.5, self.ratio * 0.5**0.5], dtype=like.dtype, device=like.device)

    def coordinates(self, w: Tensor) -> Tensor:
        """``(w₁, λw₂)/√2``."""
        return w * self._scale(w)

    def point(self, u: Tensor) -> Tensor:
        """Inverse of :meth:`coordinates`."""
        return u / self._scale(u)

    def jacobian(self, w: Tensor) -> Tensor:
        """Constant."""
        return torch.diag(self._scale(w)).expand(*w.shape[:-1], 2, 2)


@dataclass(frozen=True)
class Booth(CircularFunction):
    """``(w₁ + 2w₂ - 7)² + (2w₁ + w₂ - 5)²``, least at (1, 3).

    Example:
        >>> Booth().value(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
        tensor([ 0., 74.])
    """

    name: ClassVar[str] = "booth"
    start: ClassVar[tuple[float, float]] = (-6.0, 9.0)
    optimum: ClassVar[tuple[float, float]] = (1.0, 3.0)

    def _matrix(self, like: Tensor) -> Tensor:
        return torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=like.dtype, device=like.device)

    def coordinates(self, w: Tensor) -> Tensor:
        """``(w₁ + 2w₂ - 7, 2w₁ + w₂ - 5)``."""
        return w @ self._matrix(w) - torch.tensor([7.0, 5.0], dtype=w.dtype, device=w.device)

    def point(self, u: Tensor) -> Tensor:
        """Inverse of :meth:`coordinates`."""
        inverse = torch.tensor([[-1.0, 2.0], [2.0, -1.0]], dtype=u.dtype, device=u.device) / 3
        return (u + torch.tensor([7.0, 5.0], dtype=u.dtype, device=u.device)) @ inverse

    def jacobian(self, w: Tensor) -> Tensor:
        """Constant."""
        return self._matrix(w).expand(*w.shape[:-1], 2, 2)


@dataclass(frozen=True)
class Rosenbrock(CircularFunction):
    """``(1 - w₁)² + 100(w₂ - w₁²)²``, least at (1, 1).

    Example:
        >>> Rosenbrock().value(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
        tensor([  0., 101.])
    """

    name: ClassVar[str] = "rosenbrock"
    start: ClassVar[tuple[float, float]] = (-1.0, -1.0)
    optimum: ClassVar[tuple[float, float]] = (1.0, 1.0)

    def coordinates(self, w: Tensor) -> Tensor:
        """``(1 - w₁, 10(w₂ - w₁²))``."""
        return torch.stack([1 - w[..., 0], 10 * (w[..., 1] - w[..., 0].square())], -1)

    def point(self, u: Tensor) -> Tensor:
        """Inverse of :meth:`coordinates`."""
        first = 1 - u[..., 0]
        return torch.stack([first, u[..., 1] / 10 + first.square()], -1)

    def jacobian(self, w: Tensor) -> Tensor:
        """``((-1, 0), (-20w₁, 10))``."""
        one = torch.ones_like(w[..., 0])
        rows = [torch.stack([-one, 0 * one], -1), torch.stack([-20 * w[..., 0], 10 * one], -1)]
        return torch.stack(rows, -2)


FUNCTIONS: dict[str, CircularFunction] = {f.name: f for f in (Ellipse(), Booth(), Rosenbrock())}


def function(name: str) -> CircularFunction:
    """Function by name: ``ellipse``, ``booth`` or ``rosenbrock``.

    Raises:
        ConfigError: There is none of this name.

    Example:
        >>> function("booth").optimum
        (1.0, 3.0)
    """
    if name not in FUNCTIONS:
        raise ConfigError(f"function must be one of {', '.join(FUNCTIONS)}, got {name!r}")
    return FUNCTIONS[name]
