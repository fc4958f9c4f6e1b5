r"""From a Lie algebra element to a group element of GL(k).

Each parametrisation maps ``T`` of shape ``[..., k, k]`` to a :class:`GroupElement`, a matrix
together with what is used as its inverse.

=============== =================== ============================ =======================
name            matrix              inverse                      exact inverse
=============== =================== ============================ =======================
``exp``         exp(T)              exp(-T)                      yes
``cayley``      (I-T/2)⁻¹(I+T/2)    (I+T/2)⁻¹(I-T/2)             yes
``first-order`` I+T                 I-T                          only to O(‖T‖²)
``direct``      I+T                 (I+T)⁻¹ by LU                yes
=============== =================== ============================ =======================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metatele.errors import ConfigError, ShapeMismatchError


class GroupElement(NamedTuple):
    """``matrix`` acts on the hidden units, ``inverse`` undoes it on the outgoing weights.

    Both have shape ``[..., k, k]``.

    Example:
        >>> g = direct(torch.tensor([[1.0]]))  # doubles the unit
        >>> g.matrix, g.inverse
        (tensor([[2.]]), tensor([[0.5000]]))
    """

    matrix: Tensor
    inverse: Tensor


def _identity(T: Tensor) -> Tensor:
    if T.ndim < 2 or T.shape[-1] != T.shape[-2]:
        raise ShapeMismatchError(f"expected square matrices [..., k, k], got shape {tuple(T.shape)}")
    return torch.eye(T.shape[-1], dtype=T.dtype, device=T.device)


def exponential(T: Tensor, max_norm: float | None = None) -> GroupElement:
    """``g = exp(T)``.

    Args:
        T: ``[..., k, k]``.
        max_norm: A bound on every ``‖T‖_F`` that the caller guarantees, at most 0.5. With it the
            Taylor series is cut where the remainder drops below rounding, and the even and odd
            parts are shared between ``exp(T)`` and ``exp(-T)``.

    Returns:
        ``exp(T)`` with the inverse ``exp(-T)``.

    Raises:
        ShapeMismatchError: T is not square.
        ConfigError: ``max_norm`` is not in (0, 0.5].

    Example:
        >>> g = exponential(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))  # rotation by one radian
        >>> torch.allclose(g.matrix[0, 0], torch.tensor(1.0).cos())
        True
    """
    if max_norm is None:
        _identity(T)
        return GroupElement(torch.linalg.matrix_exp(T), torch.linalg.matrix_exp(-T))
    if not 0 < max_norm <= 0.5:
        raise ConfigError(f"max_norm must lie in (0, 0.5], got {max_norm}")
    eye = _identity(T)
    tolerance = torch.finfo(T.dtype).eps / 4
    half = 1  # the series ends with the powers T^(2·half) and T^(2·half+1)
    while 2 * max_norm ** (2 * half + 2) / math.factorial(2 * half + 2) > tolerance:
        half += 1
    # exp(±T) = E ± O with E = I + T²/2! + T⁴/4! + … and O = T + T (T²/3! + T⁴/5! + …), from the same powers of T².
    power = square = T @ T
    even, odd = torch.add(eye, square, alpha=1 / 2), square / 6
    for j in range(2, half + 1):
        power = power @ square
        even = torch.add(even, power, alpha=1 / math.factorial(2 * j))
        odd = torch.add(odd, power, alpha=1 / math.factorial(2 * j + 1))
    odd = T + T @ odd
    return GroupElement(even + odd, even - odd)


def cayley(T: Tensor) -> GroupElement:
    """``g = (I - T/2)⁻¹ (I + T/2)``, equal to ``exp(T)`` to O(‖T‖³), for ``T [..., k, k]``.

    Raises:
        ShapeMismatchError: T is not square.

    Example:
        >>> g = cayley(torch.tensor([[0.0, 0.5], [-0.5, 0.0]]))
        >>> torch.allclose(g.matrix @ g.inverse, torch.eye(2))
        True
    """
    eye = _identity(T)
    plus, minus = eye + T / 2, eye - T / 2
    return GroupElement(torch.linalg.solve(minus, plus), torch.linalg.solve(plus, minus))


def first_order(T: Tensor) -> GroupElement:
    """``g = I + T`` with ``I - T`` in place of the inverse, right only to O(‖T‖²), for ``T [..., k, k]``.

    The parametrisation of the paper's experiments (Zhao et al. 2024, Algorithm 2); the loss drifts by O(‖T‖²).

    Raises:
        ShapeMismatchError: T is not square.

    Example:
        >>> g = first_order(torch.tensor([[0.1]]))
        >>> g.matrix @ g.inverse  # 1 - 0.1²
        tensor([[0.9900]])
    """
    eye = _identity(T)
    return GroupElement(eye + T, eye - T)


def direct(T: Tensor) -> GroupElement:
    """``g = I + T`` with its true inverse, for ``T [..., k, k]``.

    Raises:
        ShapeMismatchError: T is not square.
        torch.linalg.LinAlgError: ``I + T`` is singular.

    Example:
        >>> direct(torch.tensor([[0.25]])).inverse
        tensor([[0.8000]])
    """
    eye = _identity(T)
    return from_matrix(eye + T)


def from_matrix(matrix: Tensor) -> GroupElement:
    """The group element with a given matrix ``[..., k, k]``, inverted by LU.

    Raises:
        ShapeMismatchError: It is not square.
        torch.linalg.LinAlgError: It is singular.

    Example:
        >>> from_matrix(torch.tensor([[2.0, 0.0], [0.0, 4.0]])).inverse
        tensor([[0.5000, 0.0000],
                [0.0000, 0.2500]])
    """
    return GroupElement(matrix, torch.linalg.solve(matrix, _identity(matrix).expand_as(matrix)))


def identity(k: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> GroupElement:
    """The neutral element of GL(k): it moves nothing.

    Example:
        >>> identity(2).matrix
        tensor([[1., 0.],
                [0., 1.]])
    """
    eye = torch.eye(k, dtype=dtype, device=device)
    return GroupElement(eye, eye)


def compose(second: GroupElement, first: GroupElement) -> GroupElement:
    """Product ``second · first``: first act with ``first``, then with ``second``; both ``[..., k, k]``.

    Example:
        >>> twice, thrice = direct(torch.tensor([[1.0]])), direct(torch.tensor([[2.0]]))
        >>> compose(twice, thrice).matrix
        tensor([[6.]])
    """
    return GroupElement(second.matrix @ first.matrix, first.inverse @ second.inverse)


PARAMETRISATIONS: dict[str, Callable[[Tensor], GroupElement]] = {
    "exp": exponential,
    "cayley": cayley,
    "first-order": first_order,
    "direct": direct,
}


def random_algebra(
    shape: tuple[int, ...], norm: float, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Gaussian algebra elements ``[..., k, k]`` scaled to a Frobenius norm.

    Args:
        shape: ``(..., k, k)``.
        norm: ``‖T‖_F`` of each.
        generator: Where randomness comes from; draws are made on its device.
        dtype: Of the result.

    Example:
        >>> T = random_algebra((2, 3, 3), 0.1, torch.Generator().manual_seed(0))
        >>> torch.allclose(T.norm(dim=(-2, -1)), torch.tensor(0.1))
        True
    """
    T = torch.randn(shape, generator=generator, dtype=dtype)
    return T * (norm / T.norm(dim=(-2, -1), keepdim=True))
