"""Activation functions with what the symmetries need: inverse, range and three derivatives.

The exact action needs the inverse, positive rescaling needs positive homogeneity, and the
curvature of level-set curves needs derivatives up to the third order.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from metatele.errors import ConfigError, NotExactError


@dataclass(frozen=True)
class Activation(ABC):
    """An elementwise function ``f`` with its derivatives and, where it exists, its inverse.

    All methods take a tensor of any shape and give one of the same shape, dtype and device.

    Attributes:
        name: Key in :func:`activation`.
        range: Open interval of values; the exact action must stay inside it.
        invertible: Whether :meth:`inverse` exists on ``range``.
        positively_homogeneous: Whether ``f(c z) = c f(z)`` for every ``c > 0``.
        piecewise_linear: Whether the second derivative is zero wherever it exists.

    Example:
        >>> f = LeakyReLU(0.1)
        >>> f.inverse(f(torch.tensor([-2.0, 3.0])))
        tensor([-2.,  3.])
    """

    name: ClassVar[str]
    range: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    invertible: ClassVar[bool] = True
    positively_homogeneous: ClassVar[bool] = False
    piecewise_linear: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, z: Tensor) -> Tensor:
        """Value at ``z``."""

    @abstractmethod
    def derivatives(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """First, second and third derivative at ``z``."""

    def derivative(self, z: Tensor) -> Tensor:
        """First derivative at ``z``."""
        return self.derivatives(z)[0]

    def inverse(self, a: Tensor) -> Tensor:
        """The ``z`` with ``f(z) = a``; ``a`` must lie in :attr:`range`.

        Raises:
            NotExactError: The function has no inverse, or ``a`` leaves its range.
        """
        if not self.invertible:
            raise NotExactError(f"{self.describe()} has no inverse: {self.why_not_invertible()}")
        low, high = self.range
        if (math.isfinite(low) or math.isfinite(high)) and not bool(((a > low) & (a < high)).all()):
            raise NotExactError(
                f"a value lies outside the range ({low:g}, {high:g}) of {self.describe()}, "
                "so it has no preimage; use a smaller group element"
            )
        return self.unchecked_inverse(a)

    def unchecked_inverse(self, a: Tensor) -> Tensor:
        """:meth:`inverse` without its checks: not a number, or infinite, outside the range."""
        raise NotImplementedError

    def why_not_invertible(self) -> str:
        """The reason, and what to do, in words; of activations without inverse alone."""
        raise NotImplementedError

    def describe(self) -> str:
        """Specification that :func:`activation` turns back into this object."""
        return self.name


@dataclass(frozen=True)
class Identity(Activation):
    """``f(z) = z``; with it a perceptron is linear, and every group element acts exactly.

    Example:
        >>> Identity()(torch.tensor([-2.0, 3.0]))
        tensor([-2.,  3.])
    """

    name: ClassVar[str] = "identity"
    positively_homogeneous: ClassVar[bool] = True
    piecewise_linear: ClassVar[bool] = True

    def __call__(self, z: Tensor) -> Tensor:
        """Value at ``z``."""
        return z

    def derivatives(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """1, 0, 0."""
        zero = torch.zeros_like(z)
        return torch.ones_like(z), zero, zero

    def unchecked_inverse(self, a: Tensor) -> Tensor:
        """See the base class."""
        return a


@dataclass(frozen=True)
class LeakyReLU(Activation):
    """``f(z) = z`` for ``z > 0``, else ``slope · z``.

    Args:
        slope: Slope for negative ``z``; must be positive, or the function has no inverse.

    Raises:
        ConfigError: The slope is not positive, or infinite.

    Example:
        >>> f = LeakyReLU(0.1)
        >>> f(torch.tensor([-2.0, 3.0])), f.derivative(torch.tensor([-2.0, 3.0]))
        (tensor([-0.2000,  3.0000]), tensor([0.1000, 1.0000]))
    """

    slope: float = 0.01
    name: ClassVar[str] = "leaky_relu"
    positively_homogeneous: ClassVar[bool] = True
    piecewise_linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse slopes without an inverse."""
        if not 0 < self.slope < math.inf:
            raise ConfigError(f"slope of leaky_relu must be positive, got {self.slope}")

    def __call__(self, z: Tensor) -> Tensor:
        """Value at ``z``."""
        return F.leaky_relu(z, self.slope)

    def derivative(self, z: Tensor) -> Tensor:
        """1 or ``slope``; the left derivative at 0."""
        # One operation less than a comparison takes.
        return z.sign().clamp_(min=self.slope) if self.slope <= 1 else torch.where(z > 0, 1.0, self.slope).to(z.dtype)

    def derivatives(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """1 or ``slope``, then zeros (the kink has measure zero)."""
        zero = torch.zeros_like(z)
        return self.derivative(z), zero, zero

    def unchecked_inverse(self, a: Tensor) -> Tensor:
        """See the base class."""
        return F.leaky_relu(a, 1.0 / self.slope)

    def describe(self) -> str:
        """Name and slope."""
        return f"{self.name}:{self.slope!r}"


@dataclass(frozen=True)
class ReLU(Activation):
    """``f(z) = max(z, 0)``, with ``f'(0) = 0``; positive rescaling is its only symmetry here.

    Example:
        >>> ReLU()(torch.tensor([-2.0, 3.0]))
        tensor([0., 3.])
    """

    name: ClassVar[str] = "relu"
    range: ClassVar[tuple[float, float]] = (0.0, math.inf)
    invertible: ClassVar[bool] = False
    positively_homogeneous: ClassVar[bool] = True
    piecewise_linear: ClassVar[bool] = True

    def __call__(self, z: Tensor) -> Tensor:
        """Value at ``z``."""
        return torch.relu(z)

    def derivatives(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step function, then zeros."""
        zero = torch.zeros_like(z)
        return self.derivative(z), zero, zero

    def derivative(self, z: Tensor) -> Tensor:
        """Step function."""
        return (z > 0).to(z.dtype)

    def why_not_invertible(self) -> str:
        """See the base class."""
        return "it maps every negative number to 0; use the rescaling action"


@dataclass(frozen=True)
class Tanh(Activation):
    """``f(z) = tanh z``, with values in (-1, 1).

    Example:
        >>> Tanh().derivatives(torch.tensor(0.0))  # tanh z = z - z³/3 + …
        (tensor(1.), tensor(-0.), tensor(-2.))
    """

    name: ClassVar[str] = "tanh"
    range: ClassVar[tuple[float, float]] = (-1.0, 1.0)

    def __call__(self, z: Tensor) -> Tensor:
        """Value at ``z``."""
        return torch.tanh(z)

    def derivatives(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With ``t = tanh z``: ``1-t²``, ``-2t(1-t²)``, ``(1-t²)(6t²-2)``."""
        t = torch.tanh(z)
        d = 1 - t * t
        return d, -2 * t * d, d * (6 * t * t - 2)

    def unchecked_inverse(self, a: Tensor) -> Tensor:
        """See the base class."""
        return torch.atanh(a)


@dataclass(frozen=True)
class Sigmoid(Activation):
    """Logistic function ``f(z) = 1/(1 + exp(-z))``, with values in (0, 1).

    Example:
        >>> Sigmoid()(torch.tensor(0.0)), Sigmoid().derivative(torch.tensor(0.0))
        (tensor(0.5000), tensor(0.2500))
    """

    name: ClassVar[str] = "sigmoid"
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __call__(self, z: Tensor) -> Tensor:
        """Value at ``z``."""
        return torch.sigmoid(z)

    def derivatives(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With ``s = f(z)``, ``d = s(1-s)``: ``d``, ``d(1-2s)``, ``d(1-6d)``."""
        s = torch.sigmoid(z)
        d = s * (1 - s)
        return d, d * (1 - 2 * s), d * (1 - 6 * d)

    def unchecked_inverse(self, a: Tensor) -> Tensor:
        """See the base class."""
        return torch.logit(a)


@dataclass(frozen=True)
class Softplus(Activation):
    """``f(z) = log(1 + exp z)``, with values in (0, ∞).

    Example:
        >>> Softplus()(torch.tensor(0.0))  # log 2
        tensor(0.6931)
    """

    name: ClassVar[str] = "softplus"
    range: ClassVar[tuple[float, float]] = (0.0, math.inf)

    def __call__(self, z: Tensor) -> Tensor:
        """Value at ``z``, without the linear cut-off of ``torch.nn.Softplus``."""
        return torch.logaddexp(z, torch.zeros((), dtype=z.dtype, device=z.device))

    def derivatives(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sigmoid and its first two derivatives."""
        s = torch.sigmoid(z)
        d = s * (1 - s)
        return s, d, d * (1 - 2 * s)

    def unchecked_inverse(self, a: Tensor) -> Tensor:
        """See the base class."""
        # log(e^a - 1) = a + log(1 - e^-a) neither overflows for large a nor cancels for small a.
        return a + torch.log(-torch.expm1(-a))


@dataclass(frozen=True)
class SiLU(Activation):
    """``f(z) = z / (1 + exp(-z))``; not monotone, so it has no inverse and only the approximate action applies.

    Example:
        >>> SiLU()(torch.tensor(0.0)), SiLU().derivative(torch.tensor(0.0))
        (tensor(0.), tensor(0.5000))
    """

    name: ClassVar[str] = "silu"
    range: ClassVar[tuple[float, float]] = (-0.2784645427610738, math.inf)
    invertible: ClassVar[bool] = False

    def __call__(self, z: Tensor) -> Tensor:
        """Value at ``z``."""
        return F.silu(z)

    def derivatives(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Product rule on ``z · s(z)``."""
        s = torch.sigmoid(z)
        d1 = s * (1 - s)
        d2 = d1 * (1 - 2 * s)
        d3 = d1 * (1 - 6 * d1)
        return s + z * d1, 2 * d1 + z * d2, 3 * d2 + z * d3

    def why_not_invertible(self) -> str:
        """See the base class."""
        return "it falls and rises again below z = -1.28; use the approximate action"


_CLASSES: dict[str, type[Activation]] = {c.name: c for c in (Identity, LeakyReLU, ReLU, Tanh, Sigmoid, Softplus, SiLU)}


def activation(spec: str) -> Activation:
    """Activation from its specification.

    Args:
        spec: ``identity``, ``leaky_relu``, ``relu``, ``tanh``, ``sigmoid``, ``softplus`` or ``silu``;
            ``leaky_relu:0.1`` sets the slope, which is 0.01 otherwise.

    Raises:
        ConfigError: Unknown name, or a parameter where none is taken.

    Example:
        >>> activation("leaky_relu:0.1")
        LeakyReLU(slope=0.1)
    """
    name, _, parameter = spec.partition(":")
    if name not in _CLASSES:
        raise ConfigError(f"activation must be one of {', '.join(_CLASSES)}, got {spec!r}")
    if not parameter:
        return _CLASSES[name]()
    if name != "leaky_relu":
        raise ConfigError(f"activation {name} takes no parameter, got {spec!r}")
    try:
        return LeakyReLU(float(parameter))
    except ValueError as error:
        raise ConfigError(f"slope of leaky_relu must be a positive number, got {spec!r}") from error
