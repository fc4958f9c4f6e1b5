"""Curvature of a curve from its derivatives at one point (Zhao et al. 2024, Eq. 47 and 51)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Curvatures(NamedTuple):
    """Curvature of curves and how it changes along them, a value for each network and curve ``[..., curves]``.

    Attributes:
        kappa: ``κ(0)``, per unit of the weights.
        slope: ``κ'(0)``, with respect to t, or ``None``.

    Example:
        >>> Curvatures(kappa=torch.zeros(2, 5), slope=None).kappa.shape  # 2 networks, 5 curves
        torch.Size([2, 5])
    """

    kappa: Tensor
    slope: Tensor | None


def from_derivatives(rows: Sequence[Sequence[Tensor]]) -> Curvatures:
    r"""``κ`` and, of three derivatives, ``κ'`` (Zhao et al. 2024, Eq. 47, 51).

    .. math::
        κ = \frac{‖γ''_⊥‖}{‖γ'‖^2}, \qquad
        κ' = \frac{γ''_⊥·γ'''}{‖γ''_⊥‖\,‖γ'‖^2} - 3κ\frac{γ'·γ''}{‖γ'‖^2}

    Limits are taken: where γ' = 0 both are 0; where κ = 0, κ' is that for t → 0 from above. Differentiable.

    Args:
        rows: ``γ', γ''`` and for κ' also ``γ'''``, each as parts ``[..., o, i]`` that are orthogonal to one another.

    Returns:
        A value for each of ``[...]``.

    Example:
        >>> circle = [[torch.tensor([[0.0, 2.0]])], [torch.tensor([[-2.0, 0.0]])]]  # 2 (cos t, sin t) at t = 0
        >>> from_derivatives(circle).kappa
        tensor(0.5000)
    """
    # In units of the largest entry of γ', so that no square over- or underflows; κ is in units of its inverse.
    unit = torch.stack([part.detach().abs().amax((-2, -1)) for part in rows[0]]).amax(0)
    unit = torch.where(unit == 0, 1.0, unit)
    rows = [[part / unit[..., None, None] for part in row] for row in rows]
    first, second = rows[0], rows[1]
    squared = _inner(first, first)
    moving = squared != 0  # what is not a number stays so
    safe = torch.where(moving, squared, 1.0)
    along = _inner(first, second) / safe
    bend = [b - along[..., None, None] * a for a, b in zip(first, second, strict=True)]
    size = _root(_inner(bend, bend))
    kappa = torch.where(moving, size / safe, 0.0)
    if len(rows) == 2:
        return Curvatures(kappa / unit, None)
    third = rows[2]
    straight = size == 0
    ahead = _inner(first, third) / safe
    rest = [c - ahead[..., None, None] * a for a, c in zip(first, third, strict=True)]
    turning = torch.where(straight, _root(_inner(rest, rest)), _inner(bend, third) / torch.where(straight, 1.0, size))
    return Curvatures(kappa / unit, torch.where(moving, turning / safe - 3 * kappa * along, 0.0) / unit)


def _inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    parts = [(a * b).sum((-2, -1)) for a, b in zip(left, right, strict=True)]
    return sum(parts[1:], parts[0])


def _root(square: Tensor) -> Tensor:
    """Square root with derivative zero at zero."""
    zero = square <= 0  # false for what is not a number
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())
