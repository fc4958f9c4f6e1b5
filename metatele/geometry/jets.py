r"""Quantities that move along a curve: each with its first derivatives at t = 0, through products and inverses.

A *jet* is the list ``[a, a', a'', …]``; an entry is ``None`` where it is zero for all curves. Products follow Leibniz's
rule, activations and their inverses Faà di Bruno's. All jets in one expression are of one length, at most four.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb

import torch
from torch import Tensor

from metatele.geometry.landscape import RANK
from metatele.network.bias import with_ones
from metatele.perceptron.activations import Activation
from metatele.symmetry import pseudo_inverse

Jet = list[Tensor | None]


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """``a + b``."""
    return b if a is None else a if b is None else a + b


def scaled(factor: int, a: Tensor) -> Tensor:
    """``factor · a``, without an operation where the factor is 1."""
    return a if factor == 1 else factor * a


def leibniz(length: int, term: Callable[[int, int], Tensor | None]) -> Jet:
    """``Σ_i C(j, i) term(i, j - i)`` for the orders j below ``length``; a term is ``None`` where it is zero.

    Example:
        >>> leibniz(3, lambda i, k: torch.ones(1))  # 2ʲ
        [tensor([1.]), tensor([2.]), tensor([4.])]
    """
    result: Jet = []
    for j in range(length):
        total: Tensor | None = None
        for i in range(j + 1):
            found = term(i, j - i)
            if found is not None:
                total = add(total, scaled(comb(j, i), found))
        result.append(total)
    return result


def times(a: Jet, b: Jet) -> Jet:
    """Leibniz: ``(ab)⁽ʲ⁾ = Σ C(j, i) a⁽ⁱ⁾ b⁽ʲ⁻ⁱ⁾`` for matrices.

    Example:
        >>> t = [torch.zeros(1, 1), torch.ones(1, 1), None]  # t at 0
        >>> times(t, t)[2]  # (t²)'' = 2
        tensor([[2.]])
    """

    def term(i: int, k: int) -> Tensor | None:
        left, right = a[i], b[k]
        return None if left is None or right is None else left @ right

    return leibniz(len(a), term)


def through(f: Activation, z: Jet) -> Jet:
    """``f(z)``: Faà di Bruno's rule."""
    start = z[0]
    assert start is not None
    f1, f2, f3 = (f.derivative(start), None, None) if f.piecewise_linear else f.derivatives(start)
    z1, z2, z3 = (*z[1:], None, None, None)[:3]
    result: Jet = [f(start), None if z1 is None else f1 * z1]
    second = None if z2 is None else f1 * z2
    if f2 is not None and z1 is not None:
        second = add(second, f2 * z1.square())
    result.append(second)
    third = None if z3 is None else f1 * z3
    if f2 is not None and f3 is not None and z1 is not None:
        third = add(third, f3 * z1 * z1.square())
        if z2 is not None:
            third = add(third, 3 * f2 * z1 * z2)
    result.append(third)
    return result[: len(z)]


def back(f: Activation, z: Tensor, b: Jet) -> Jet:
    """``y`` with ``f(y) = b`` and ``y(0) = z``: Faà di Bruno's rule solved for the derivatives of y."""
    f1, f2, f3 = (f.derivative(z), None, None) if f.piecewise_linear else f.derivatives(z)
    y: Jet = [z]
    for j, target in enumerate(b[1:], 1):
        assert target is not None  # MA is among its terms
        first, second = (*y[1:], None, None)[:2]
        if f2 is not None and first is not None and j == 2:
            target = target - f2 * first.square()
        if f2 is not None and f3 is not None and first is not None and second is not None and j == 3:
            target = target - 3 * f2 * first * second - f3 * first * first.square()
        y.append(target / f1)
    return y


def acted(powers: Sequence[Tensor], A: Jet) -> Jet:
    """``exp(tM) A``, from ``M, M², …``."""

    def term(i: int, j: int) -> Tensor | None:
        a = A[j]
        return a if a is None or i == 0 else powers[i - 1] @ a

    return leibniz(len(A), term)


def inverse_jet(G: Jet) -> Jet:
    """Inverse matrices: ``P⁽ʲ⁾ = -P Σ_{i≥1} C(j, i) G⁽ⁱ⁾ P⁽ʲ⁻ⁱ⁾``."""
    start = G[0]
    assert start is not None
    first = torch.linalg.inv(start)
    P: Jet = [first]
    for j in range(1, len(G)):
        total: Tensor | None = None
        for i in range(1, j + 1):
            g, p = G[i], P[j - i]
            if g is not None and p is not None:
                total = add(total, scaled(comb(j, i), g @ p))
        P.append(None if total is None else -(first @ total))
    return P


def pseudo_inverse_jet(H: Jet) -> Jet:
    """Of full rank, tall or wide: ``(HᵀH)⁻¹Hᵀ`` or ``Hᵀ(HHᵀ)⁻¹``, in double precision as it squares H."""
    start = H[0]
    assert start is not None
    if all(t is None for t in H[1:]):
        return [pseudo_inverse(start, rank_tolerance=RANK), *H[1:]]
    pseudo_inverse(start.detach(), rank_tolerance=RANK)  # refuses what is rank deficient
    precise: Jet = [None if t is None else t.double() for t in H]
    turned: Jet = [None if t is None else t.mT for t in precise]
    if start.shape[-1] >= start.shape[-2]:
        P = times(turned, inverse_jet(times(precise, turned)))
    else:
        P = times(inverse_jet(times(turned, precise)), turned)
    return [None if t is None else t.to(start.dtype) for t in P]


def padded(W: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """A matrix with a column for the bias, if the layer has one: a derivative's is zero, as the bias stays."""
    if W is None or bias is None:
        return W
    return torch.cat([W, torch.zeros_like(W[..., :1])], -1)


def acted_from_the_right(T: Jet, powers: Sequence[Tensor]) -> Jet:
    """``T exp(-tM)``, from ``M, M², …``; a last column of T that belongs to a bias is not moved."""
    k = powers[0].shape[-1]

    def term(i: int, j: int) -> Tensor | None:
        t = T[j]
        if t is None or i == 0:
            return t
        moved = scaled((-1) ** i, t[..., :k] @ powers[i - 1])
        return moved if t.shape[-1] == k else padded(moved, moved)

    return leibniz(len(T), term)


def difference(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """``a - b``."""
    return a if b is None else -b if a is None else a - b


def with_ones_jet(H: Jet) -> Jet:
    """A row of ones below the inputs, for a bias; its derivatives are zero."""
    start = H[0]
    assert start is not None
    rest: Jet = [None if t is None else torch.cat([t, torch.zeros_like(t[..., :1, :])], -2) for t in H[1:]]
    return [with_ones(start), *rest]
