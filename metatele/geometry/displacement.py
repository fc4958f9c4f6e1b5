r"""How far a minimum moves when it is shifted, against its curvature (Zhao et al. 2024, Figure 7).

The minimum is a curve through the origin w₀ with the first axis as its tangent there. It is shifted by a
distance r in a direction uniform on the circle; seen from the curve, w₀ is shifted instead. Only the product
``x = κr`` matters for ``E[dist(w, γ)] / r``, because a curve scaled by r has its curvature divided by r; all
functions here take r = 1 and a curvature x. Imports no torch.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from metatele.errors import ConfigError

STRAIGHT = 2 / math.pi  # E[|sin θ|], the value of a curve without curvature (Zhao et al. 2024, Eq. 66)
_QUADRATURE = 1e-11  # absolute and relative error of the integrals


class MinimumCurve(ABC):
    """A curve through the origin, tangent to the first axis and bending upwards.

    Attributes:
        name: Key in :data:`CURVES`.

    Example:
        >>> [curve.distance((0.0, -1.0), 3.0) for curve in CURVES.values()]  # from below the origin is nearest
        [1.0, 1.0]
    """

    name: ClassVar[str]

    @abstractmethod
    def distance(self, point: tuple[float, float], curvature: float) -> float:
        """Exact distance from a point to the curve of this curvature at the origin."""

    @abstractmethod
    def crossing(self, curvature: float) -> float | None:
        """Angle in ``[0, π/2]`` at which the unit circle meets the curve; ``None`` where it does not."""

    def expected_distance(self, curvature: float) -> float:
        r"""``E[dist(w, γ)]`` for w uniform on the unit circle, by adaptive quadrature (Zhao et al. 2024, Eq. 65).

        The curve is symmetric, so half a turn is enough; it is cut at the crossing, where the distance has
        a kink. To 1e-11.

        Args:
            curvature: ``x = κr``, at least 0.

        Raises:
            ConfigError: The curvature is negative or not finite.

        Example:
            >>> round(Parabola().expected_distance(0.0), 12) == round(2 / math.pi, 12)
            True
        """
        if not (math.isfinite(curvature) and curvature >= 0):
            raise ConfigError(f"curvature must be a finite number of at least 0, got {curvature}")
        from scipy.integrate import quad

        def integrand(angle: float) -> float:
            return self.distance((math.cos(angle), math.sin(angle)), curvature)

        cut = self.crossing(curvature)
        ends = [-math.pi / 2, *([] if cut is None else [cut]), math.pi / 2]
        parts = [
            quad(integrand, a, b, epsabs=_QUADRATURE, epsrel=_QUADRATURE, limit=200)[0]
            for a, b in itertools.pairwise(ends)
        ]
        return sum(parts) / math.pi


@dataclass(frozen=True)
class Parabola(MinimumCurve):
    r"""``t ↦ (t, k₁t²)`` with ``κ = 2k₁`` (Zhao et al. 2024, Eq. 63).

    The nearest point to (a, b) is at a root of ``2k₁²t³ + (1 - 2k₁b)t - a = 0``. By symmetry let a ≥ 0: then
    the nearest has t ≥ 0, and among these there is one root besides 0, by Descartes' rule of signs.

    Example:
        >>> Parabola().distance((0.0, 5.0), 2.0)  # to t² = 9/2 on y = t², not to the vertex
        2.179...
    """

    name: ClassVar[str] = "parabola"

    def distance(self, point: tuple[float, float], curvature: float) -> float:
        """See the class."""
        a, b = abs(point[0]), point[1]
        t = _nearest_on_parabola(a, b, curvature)
        return math.hypot(t - a, curvature * t * t / 2 - b)

    def crossing(self, curvature: float) -> float | None:
        """Where ``sin θ = x cos²θ / 2``."""
        return math.asin(curvature / (1 + math.hypot(1, curvature)))


def _nearest_on_parabola(a: float, b: float, curvature: float) -> float:
    """The largest root of ``(x²/2) t³ + (1 - xb) t = a`` for a ≥ 0, by the formulas that do not cancel."""
    slope = 1 - curvature * b
    if curvature == 0:
        return a
    if slope == 0:
        return (2 * a / curvature**2) ** (1 / 3)
    radius = math.sqrt(8 * abs(slope) / 3) / curvature
    ratio = 1.5 * a * curvature / abs(slope) * math.sqrt(1.5 / abs(slope))
    if slope > 0:
        return radius * math.sinh(math.asinh(ratio) / 3)
    return radius * (math.cosh(math.acosh(ratio) / 3) if ratio > 1 else math.cos(math.acos(ratio) / 3))


@dataclass(frozen=True)
class Circle(MinimumCurve):
    r"""The circle of radius ``k₂ = 1/κ`` through the origin, centre c on the second axis (Zhao et al. 2024, Eq. 63).

    ``dist(p, γ) = | |p - c| - k₂ |``, here as ``|x|p|² - 2b| / (|xp - xc| + 1)`` with xc = (0, 1): no
    difference of large numbers for small curvature, and the straight line at x = 0.

    Example:
        >>> Circle().distance((0.0, 1.0), 0.5)  # radius 2: the origin is the nearest point to (0, 1)
        1.0
    """

    name: ClassVar[str] = "circle"

    def distance(self, point: tuple[float, float], curvature: float) -> float:
        """See the class."""
        a, b = point
        to_centre = math.hypot(curvature * a, curvature * b - 1)
        return abs(curvature * (a * a + b * b) - 2 * b) / (to_centre + 1)

    def crossing(self, curvature: float) -> float | None:
        """Where ``sin θ = x/2``; none if the unit circle holds the whole curve."""
        return math.asin(curvature / 2) if curvature < 2 else None


def circle_closed_form(curvature: float) -> float:
    r"""``E[dist(w, γ)]`` for :class:`Circle` through elliptic integrals.

    With k = 1/x and the parameter ``m = 4k/(1 + k)²``, ``|p - c|² = (1 + k)² (1 - m sin²ψ)`` for
    ψ = π/4 + θ/2. A unit circle that holds the curve (x ≥ 2) lies outside it everywhere, and
    ``E = (2/π)(1 + k) E(m) - k``. Otherwise p is inside for θ above ``θ₀ = asin(x/2)``, where the sign turns:

    ``E = (2/π) { (1 + k) [2 E(π/4 + θ₀/2 | m) - E(m)] - kθ₀ }``.

    Args:
        curvature: ``x = κr``, above 0.

    Raises:
        ConfigError: The curvature is not a finite number above 0.

    Example:
        >>> abs(circle_closed_form(0.7) - Circle().expected_distance(0.7)) < 1e-10
        True
    """
    if not (math.isfinite(curvature) and curvature > 0):
        raise ConfigError(f"curvature must be a finite number above 0, got {curvature}")
    from scipy.special import ellipe, ellipeinc

    k = 1 / curvature
    m = 4 * k / (1 + k) ** 2
    if curvature >= 2:
        return float(2 / math.pi * (1 + k) * ellipe(m) - k)
    cut = math.asin(curvature / 2)
    turned = 2 * ellipeinc(math.pi / 4 + cut / 2, m) - ellipe(m)
    return float(2 / math.pi * ((1 + k) * turned - k * cut))


CURVES: dict[str, MinimumCurve] = {c.name: c for c in (Parabola(), Circle())}


def expected_displacement(curve: str, curvature: float, shift: float) -> float:
    """``E[dist(w₀, shifted γ)] / r`` of Zhao et al. 2024, Figure 7.

    Args:
        curve: ``parabola`` or ``circle``.
        curvature: κ at w₀, at least 0, in units of 1/length.
        shift: r, above 0, a length.

    Raises:
        ConfigError: An argument is none of these.

    Example:
        >>> round(expected_displacement("circle", 10.0, 0.1), 4)
        0.5987
    """
    if curve not in CURVES:
        raise ConfigError(f"curve must be one of {', '.join(CURVES)}, got {curve!r}")
    if not (math.isfinite(shift) and shift > 0):
        raise ConfigError(f"shift must be a finite length above 0, got {shift}")
    return CURVES[curve].expected_distance(curvature * shift)
