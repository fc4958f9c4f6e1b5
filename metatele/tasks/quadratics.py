r"""Quadratics with noisy gradients, and the optimal teleport on them in closed form (Zhao et al. 2024, Theorem 3.1).

``L(w) - L* = ½(w - w*)ᵀH(w - w*)``. In ``u = H^{1/2}(w - w*)`` the level sets are spheres, on which the rotations
act transitively; the gradient ``H^{1/2}u`` is longest where u, and with it ``w - w*``, is the top eigenvector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from metatele.errors import ConfigError, ShapeMismatchError


@dataclass(frozen=True)
class Quadratic(ABC):
    """The expected loss, and samples of its gradient, on points ``[..., d]``.

    Attributes:
        hessian: H ``[d, d]``, symmetric and positive definite.
        optimum: w* ``[d]``.

    Raises:
        ShapeMismatchError: The shapes are not these.
        ConfigError: H is not symmetric, or not positive definite.

    Example:
        >>> bowl: Quadratic = Shifted(torch.diag(torch.tensor([1.0, 4.0])), torch.zeros(2), 0.0)
        >>> bowl.teleport(torch.tensor([4.0, 0.0])).abs()  # to the short axis of the level set
        tensor([0., 2.])
    """

    hessian: Tensor
    optimum: Tensor

    def __post_init__(self) -> None:
        d = self.optimum.shape[-1] if self.optimum.dim() == 1 else 0
        if d == 0 or self.hessian.shape != (d, d):
            raise ShapeMismatchError(
                "hessian and optimum must be [d, d] and [d], "
                f"got {list(self.hessian.shape)} and {list(self.optimum.shape)}"
            )
        if not torch.allclose(self.hessian, self.hessian.mT) or float(torch.linalg.eigvalsh(self.hessian)[0]) <= 0:
            raise ConfigError("hessian must be symmetric and positive definite")

    @property
    @abstractmethod
    def smoothness(self) -> float:
        """β: no sample's Hessian has a larger eigenvalue."""

    @property
    @abstractmethod
    def noise(self) -> float:
        """``σ² = L* - E inf L(·, ξ)``, in units of the loss."""

    @abstractmethod
    def sampled_gradient(self, w: Tensor, generator: torch.Generator) -> Tensor:
        """``∇L(w, ξ)`` with a sample of its own for each point; unbiased."""

    def top(self) -> tuple[float, Tensor]:
        """Largest eigenvalue of H and its eigenvector ``[d]``."""
        values, vectors = torch.linalg.eigh(self.hessian)
        return float(values[-1]), vectors[:, -1]

    def excess(self, w: Tensor) -> Tensor:
        """``L(w) - L*``, ``[...]``."""
        away = w - self.optimum
        return (away * (away @ self.hessian)).sum(-1) / 2

    def gradient_norm(self, w: Tensor) -> Tensor:
        """``‖∇L(w)‖²``, ``[...]``."""
        return ((w - self.optimum) @ self.hessian).square().sum(-1)

    def teleport(self, w: Tensor) -> Tensor:
        """The point of w's level set with the longest gradient; of the two, the one on w's side."""
        largest, vector = self.top()
        side = torch.where((w - self.optimum) @ vector < 0, -1.0, 1.0).to(w.dtype)
        return self.optimum + (side * (2 * self.excess(w) / largest).sqrt()).unsqueeze(-1) * vector


@dataclass(frozen=True)
class Shifted(Quadratic):
    r"""``L(w, ξ) = ½(w - ξ)ᵀH(w - ξ)`` with ``ξ ~ N(w*, s²I)``: noise of the same size everywhere.

    Every sample's least value is 0, so ``σ² = L* = ½s² tr H``, and ``β = λ_max(H)``.

    Args:
        spread: s, in units of the weights.

    Example:
        >>> Shifted(torch.diag(torch.tensor([1.0, 4.0])), torch.zeros(2), 0.5).noise
        0.625
    """

    spread: float

    @property
    def smoothness(self) -> float:
        """``λ_max(H)``."""
        return self.top()[0]

    @property
    def noise(self) -> float:
        """``½s² tr H``."""
        return self.spread**2 * float(self.hessian.trace()) / 2

    def sampled_gradient(self, w: Tensor, generator: torch.Generator) -> Tensor:
        """``H(w - ξ)``."""
        draws = torch.randn(w.shape, generator=generator, dtype=w.dtype)
        return (w - self.optimum - self.spread * draws) @ self.hessian

    def expected_excess(self, start: float, step: float, num_steps: int) -> list[float]:
        r"""``E[L(w_t) - L*]`` for t = 0 … num_steps - 1, for SGD with the optimal teleport before each step.

        After a teleport only the top direction is left: ``ℓ ← (1 - ηλ)²ℓ + ½η²s² tr H³``.

        Args:
            start: ``L(w₀) - L*``.
            step: Learning rate η.
            num_steps: T.

        Example:
            >>> Shifted(torch.diag(torch.tensor([1.0, 2.0])), torch.zeros(2), 1.0).expected_excess(8.0, 0.25, 2)
            [8.0, 2.28125]
        """
        largest, _ = self.top()
        added = step**2 * self.spread**2 * float(self.hessian.matrix_power(3).trace()) / 2
        values = [start]
        while len(values) < num_steps:
            values.append((1 - step * largest) ** 2 * values[-1] + added)
        return values


@dataclass(frozen=True)
class LeastSquares(Quadratic):
    r"""``L(w, i) = ½(xᵢᵀw - yᵢ)²`` with i uniform over n samples: SGD with batches of one sample.

    Every sample can be fitted exactly, so ``σ² = L*``, which is 0 if all can at the same time; ``β = max ‖xᵢ‖²``.
    Made by :func:`least_squares`.

    Args:
        inputs: X ``[n, d]``.
        targets: y ``[n]``.

    Example:
        >>> least_squares(torch.tensor([[1.0], [2.0]]), torch.zeros(2)).smoothness
        4.0
    """

    inputs: Tensor
    targets: Tensor

    @property
    def smoothness(self) -> float:
        """``max ‖xᵢ‖²``."""
        return float(self.inputs.square().sum(-1).max())

    @property
    def noise(self) -> float:
        """``L*``."""
        return float((self.inputs @ self.optimum - self.targets).square().mean() / 2)

    def sampled_gradient(self, w: Tensor, generator: torch.Generator) -> Tensor:
        """``xᵢ(xᵢᵀw - yᵢ)``."""
        chosen = torch.randint(len(self.targets), w.shape[:-1], generator=generator)
        x = self.inputs[chosen]
        return ((x * w).sum(-1) - self.targets[chosen]).unsqueeze(-1) * x


def least_squares(inputs: Tensor, targets: Tensor) -> LeastSquares:
    """Least squares on data X ``[n, d]`` of rank d and y ``[n]``.

    Raises:
        ShapeMismatchError: The shapes are not these.
        ConfigError: X has not rank d.

    Example:
        >>> line = least_squares(torch.tensor([[1.0], [1.0]]), torch.tensor([0.0, 2.0]))
        >>> float(line.optimum), line.noise
        (1.0, 0.5)
    """
    if inputs.dim() != 2 or targets.shape != inputs.shape[:1]:
        raise ShapeMismatchError(
            f"inputs and targets must be [n, d] and [n], got {list(inputs.shape)} and {list(targets.shape)}"
        )
    if int(torch.linalg.matrix_rank(inputs)) < inputs.shape[1]:
        raise ConfigError("inputs must have linearly independent columns")
    hessian = inputs.mT @ inputs / len(inputs)
    optimum = torch.linalg.solve(hessian, inputs.mT @ targets / len(inputs))
    return LeastSquares(hessian, optimum, inputs, targets)
