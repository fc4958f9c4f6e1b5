r"""When one teleport is enough, and what a teleport is worth (Zhao et al. 2024, Section 3).

A point is *optimal* if every symmetry A leaves ``‖∇L‖²`` stationary there, which is the same as
``[A, R]L = -A‖∇L‖² = 0`` for the gradient flow R (Def. 3.3, Prop. 3.4). One teleport is enough if the gradient
flow from an optimal point stays optimal. In the plane this has a picture: a gradient line is optimal exactly
where it is not curved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metatele.errors import ConfigError
from metatele.geometry.fields import (
    Field,
    LocalLoss,
    LossFunction,
    VelocityFunction,
    commutator,
    derivative,
    ratio,
    rows_of,
    slope,
    teleport_along,
    velocities_of,
)

__all__ = [
    "OptimalityReport",
    "commutator",
    "gradient_and_hessian",
    "level_set_fields",
    "newton_angle",
    "one_teleport_is_enough",
    "sgd_bound",
    "slope",
    "teleport_along",
    "third_order_residual",
]


class OptimalityReport(NamedTuple):
    """What :func:`one_teleport_is_enough` found.

    Every number is scale-free: multiplying the loss, the weights or a field by a constant changes none.

    Attributes:
        enough: The verdict: all points are optimal, and stay so.
        commutator: ``[A, R]L`` of each field at the points given, over ``2‖a‖‖∇L‖`` and the largest rate
            at which the gradient changes, along itself or along a field; between -1 and 1, ``[..., m]``.
        points: Where one teleport led, ``[..., P]``; the points given if they were not moved.
        commutator_after: As ``commutator``, at ``points``.
        derivatives: ``R[A, R]L, RR[A, R]L, …`` at ``points``, in the same units, ``[..., m, orders]``.
        optimal: Whether ``points`` are optimal, ``[...]`` (Prop. 3.4).
        stays_optimal: Whether the derivatives vanish there, ``[...]`` (Prop. 3.5).
        third_order: :func:`third_order_residual` at ``points``, ``[...]`` (Prop. 3.6).
        slope: How far each field is from keeping the loss at the points given, ``[..., m]``.

    Example:
        >>> turn = torch.tensor([[[0.0, -3.0], [1 / 3, 0.0]]]).double()
        >>> ellipse = lambda w: w[0] ** 2 + 9 * w[1] ** 2
        >>> report = one_teleport_is_enough(ellipse, torch.tensor([3.0, 0.1]).double(), turn)
        >>> report.enough, bool(report.commutator.abs() > 0.1), bool(report.commutator_after.abs() < 1e-7)
        (True, True, True)
    """

    enough: bool
    commutator: Tensor
    points: Tensor
    commutator_after: Tensor
    derivatives: Tensor
    optimal: Tensor
    stays_optimal: Tensor
    third_order: Tensor
    slope: Tensor


@torch.enable_grad()
def one_teleport_is_enough(
    loss: LossFunction,
    w: Tensor,
    fields: Sequence[Field] | Tensor,
    *,
    move: bool = True,
    orders: int = 2,
    tolerance: float = 1e-7,
) -> OptimalityReport:
    r"""Whether the gradient flow stays optimal after one teleport from w (Prop. 3.4 to 3.6, C.3).

    Each point is first taken to an optimal one of its orbit by :func:`teleport_along`. There ``[A, R]L = 0`` for all
    fields A, and the flow can stay optimal only if the derivatives along it, ``R[A, R]L, RR[A, R]L, …``, vanish
    too. All are evaluated exactly, by autodiff.

    A verdict *false* is certain up to rounding: the flow from one of these points does not stay optimal. A
    verdict *true* says that the condition holds at these points and up to this order. The paper asks for order 1 at
    every optimal point, which is not quite enough: the gradient lines of ``x/√(1 - 8x²y)`` are the curves
    ``y = x⁴ + c``, whose curvature ``12x²`` vanishes at x = 0 together with its derivative, so that Prop. 3.5
    and 3.6 apply, yet leaves 0 on both sides. Order 2, the default, finds it.

    Args:
        loss: Differentiable function ``[P] → []`` of one point.
        w: Points ``[..., P]``, float64.
        fields: Infinitesimal symmetries: a tensor ``[m, P, P]``, or a sequence of matrices ``[P, P]`` and functions
            ``[P] → [P]``.
        move: Teleport first. Otherwise the points are judged as they are: *false* may also mean not optimal.
        orders: Highest derivative along the flow, at least 1.
        tolerance: What counts as zero among scale-free numbers.

    Raises:
        ShapeMismatchError: A shape is not the one named.
        ConfigError: There is no field, ``w`` is not float64 or a critical point, something is not finite, the loss
            cannot be differentiated, a field does not keep it (see :func:`slope`), or the ascent found no optimum.

    Example:
        >>> rotation = torch.tensor([[[0.0, -3.0], [1 / 3, 0.0]]]).double()  # of (w₁, 3w₂)
        >>> w = torch.tensor([[2.0, 1.0], [4.0, 0.4]]).double()
        >>> one_teleport_is_enough(lambda w: w[0] ** 2 + 9 * w[1] ** 2, w, rotation).enough
        True
        >>> cubic = lambda w: w[0] ** 2 + 9 * w[1] ** 2 + 2 * w[0] * w[1] ** 2
        >>> turned = lambda w: torch.stack([-18 * w[1] - 4 * w[0] * w[1], 2 * w[0] + 2 * w[1] ** 2])
        >>> one_teleport_is_enough(cubic, w / 10, [turned]).enough  # its velocity is ∇L turned by 90°
        False
    """
    if orders < 1:
        raise ConfigError(f"orders must be at least 1, got {orders}")
    given = rows_of(w)
    velocities = velocities_of(fields, given.shape[-1])
    slopes = torch.stack([_checked(LocalLoss(loss, p), velocities, i, tolerance) for i, p in enumerate(given)])
    points = teleport_along(loss, given, fields) if move else given
    before = torch.stack([_brackets(LocalLoss(loss, p), velocities, 0) for p in given])
    after = torch.stack([_brackets(LocalLoss(loss, p), velocities, orders) for p in points])
    zero = (after.abs() <= tolerance).all(1)
    optimal, stays = zero[:, 0], zero[:, 1:].all(-1)
    lead = w.shape[:-1]
    return OptimalityReport(
        enough=bool((optimal & stays).all()),
        commutator=before.reshape(*lead, -1),
        points=points.reshape(w.shape),
        commutator_after=after[..., 0].reshape(*lead, -1),
        derivatives=after[..., 1:].reshape(*lead, -1, orders),
        optimal=optimal.reshape(lead),
        stays_optimal=stays.reshape(lead),
        third_order=third_order_residual(loss, points).reshape(lead),
        slope=slopes.reshape(*lead, -1),
    )


def _checked(here: LocalLoss, fields: list[VelocityFunction], number: int, tolerance: float) -> Tensor:
    """Slopes ``[m]`` of the fields at a point, if all of them keep the loss."""
    if float(here.gradient.detach().norm()) == 0:
        raise ConfigError(f"w must not be a critical point of the loss, but its gradient vanishes at point {number}")
    slopes = torch.stack([here.slope(field) for field in fields])
    worst = int(slopes.argmax())
    if not float(slopes[worst]) <= tolerance:
        raise ConfigError(
            f"fields[{worst}] must keep the loss, but at point {number} its relative slope is "
            f"{float(slopes[worst]):.1e}, above {tolerance:.0e}"
        )
    return slopes


def _brackets(here: LocalLoss, fields: list[VelocityFunction], orders: int) -> Tensor:
    """``[A, R]L`` and its derivatives along the flow, scale-free, ``[m, orders + 1]``."""
    # Along the fields too: a loss that is linear along its flow, like a distance, bends only across it.
    rate = max(here.rate(), *(here.bend(field) for field in fields))
    length = here.gradient.detach().norm()
    rows = []
    for field in fields:
        value, row = here.bracket(field), []
        size = 2 * length * here.velocity(field).detach().norm() * rate
        for order in range(orders + 1):
            value = here.along_flow(value) if order else value
            row.append(ratio(value.detach(), size * rate**order))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def level_set_fields(loss: LossFunction, size: int) -> list[VelocityFunction]:
    r"""``w ↦ M∇L(w)`` for the antisymmetric M with two entries, ``½P(P - 1)`` fields: the set S of Prop. 3.6.

    They keep any loss and span all directions in its level sets (Lemma C.2), for those whose symmetries are not
    known, or are all of the level set's.

    Args:
        loss: Differentiable function ``[P] → []``.
        size: P, at least 2.

    Raises:
        ConfigError: P is below 2.

    Example:
        >>> ellipse = lambda w: w[0] ** 2 + 9 * w[1] ** 2
        >>> fields = level_set_fields(ellipse, 2)
        >>> one_teleport_is_enough(ellipse, torch.tensor([3.0, 0.1]).double(), fields).enough
        True
    """
    if size < 2:
        raise ConfigError(f"size must be at least 2, got {size}")

    def turned(i: int, j: int) -> VelocityFunction:
        def field(w: Tensor) -> Tensor:
            with torch.enable_grad():
                at = w if w.requires_grad else w.detach().requires_grad_()
                g = derivative(loss(at), at)
                signs = torch.zeros(size, size, dtype=g.dtype, device=g.device)
                signs[i, j], signs[j, i] = -1.0, 1.0
                return signs @ g

        return field

    return [turned(i, j) for j in range(size) for i in range(j)]


@torch.enable_grad()
def third_order_residual(loss: LossFunction, w: Tensor) -> Tensor:
    r"""Prop. 3.6 for all antisymmetric M at once: 0 if ``Mʲ_α ∂ₖL ∂_αL ∂³ₖᵢⱼL ∂ᵢL = 0`` for each of them.

    With ``vⱼ = ∂³ₖᵢⱼL ∂ₖL ∂ᵢL`` the condition reads ``v·M∇L = 0``, and the ``M∇L`` are all the vectors orthogonal
    to ∇L (Lemma C.2): it holds for every M if and only if v is a multiple of ∇L. Returned is the part of v
    orthogonal to ∇L, relative to ``‖v‖ + ‖∇²L∇L‖²/‖∇L‖``. It is 0 everywhere for quadratics and wherever
    Prop. C.3 applies. Prop. 3.6 asks for it at optimal points; elsewhere it decides nothing.

    Args:
        loss: Differentiable function ``[P] → []``.
        w: Points ``[..., P]``, float64.

    Returns:
        ``[...]``, between 0 and 1.

    Raises:
        ShapeMismatchError: As for :func:`commutator`.
        ConfigError: As for :func:`commutator`.

    Example:
        >>> w = torch.tensor([1.0, 0.1]).double()
        >>> float(third_order_residual(lambda w: w[0] ** 2 + 9 * w[1] ** 2, w))
        0.0
        >>> bool(third_order_residual(lambda w: w[0] ** 4 + 9 * w[1] ** 2, w) > 0.1)
        True
    """
    values = []
    for point in rows_of(w):
        here = LocalLoss(loss, point)
        g, v = here.gradient.detach(), here.third()
        length = g.norm()
        across = v - g * ratio(g @ v, length.square())
        bend = here.hessian_product(g).detach().norm().square()
        values.append(ratio(across.norm(), v.norm() + ratio(bend, length)))
    return torch.stack(values).reshape(w.shape[:-1])


@torch.enable_grad()
def gradient_and_hessian(loss: LossFunction, w: Tensor) -> tuple[Tensor, Tensor]:
    """``∇L [..., P]`` and ``∇²L [..., P, P]``; arguments and errors are those of :func:`commutator`.

    Example:
        >>> gradient_and_hessian(lambda w: w[0] ** 2 * w[1], torch.tensor([1.0, 2.0]).double())[1].tolist()
        [[4.0, 2.0], [2.0, 0.0]]
    """
    gradients, hessians = [], []
    for point in rows_of(w):
        here = LocalLoss(loss, point)
        gradients.append(here.gradient.detach())
        hessians.append(torch.stack([derivative(g, here.w).detach() for g in here.gradient]))
    return torch.stack(gradients).reshape(w.shape), torch.stack(hessians).reshape(*w.shape, w.shape[-1])


def newton_angle(loss: LossFunction, w: Tensor) -> Tensor:
    r"""Angle in radians between the gradient and Newton's direction ``∇²L⁻¹∇L``, ``[...]`` (Prop. 3.2).

    It is 0 where ``∇²L∇L = λ₀∇L``: there a gradient step of length γ is a Newton step damped by γλ₀.

    Args:
        loss: Function ``[P] → []`` whose Hessian has an inverse.
        w: Points ``[..., P]``, float64.

    Raises:
        ShapeMismatchError: As for :func:`commutator`.
        ConfigError: As for :func:`commutator`; or the Hessian is singular.

    Example:
        >>> w = torch.tensor([[0.0, 2.0], [3.0, 1 / 3]]).double()
        >>> newton_angle(lambda w: w[0] ** 2 + 9 * w[1] ** 2, w).rad2deg()
        tensor([ 0.0000, 38.6598], dtype=torch.float64)
    """
    gradient, hessian = gradient_and_hessian(loss, w)
    newton, info = torch.linalg.solve_ex(hessian, gradient)
    if bool(info.any()) or not bool(newton.isfinite().all()):
        raise ConfigError("the Hessian of the loss is singular, so that there is no Newton direction")
    one, other = (v / v.norm(dim=-1, keepdim=True) for v in (gradient, newton))
    # The arc cosine of a number near 1 would lose half the digits.
    return 2 * torch.atan2((one - other).norm(dim=-1), (one + other).norm(dim=-1))


def sgd_bound(smoothness: float, gap: float, noise: float, num_steps: int) -> float:
    r"""Right side of Theorem 3.1, ``2β/√(T-1) E[L(w₀) - L*] + βσ²/√(T-1)``, for the step ``1/(β√(T-1))``.

    Args:
        smoothness: β, of the loss of every sample.
        gap: ``E[L(w₀) - L*]``.
        noise: ``σ² = L* - E inf L(·, ξ)``, in units of the loss.
        num_steps: T, at least 2.

    Returns:
        In units of ``‖∇L‖²``.

    Raises:
        ConfigError: T is below 2, or another number is negative or not finite.

    Example:
        >>> sgd_bound(2.0, 3.0, 1.0, 5)
        7.0
    """
    if num_steps < 2:
        raise ConfigError(f"num_steps must be at least 2, got {num_steps}")
    for name, value in (("smoothness", smoothness), ("gap", gap), ("noise", noise)):
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{name} must be a finite number of at least 0, got {value}")
    return smoothness * (2 * gap + noise) / (num_steps - 1) ** 0.5
