r"""The basis of attention heads, which nothing that a network computes depends on, and a canonical choice of it.

Scores ``qᵀk`` stay the same under ``W_q → M W_q``, ``W_k → M^{-T} W_k``; what is read of values under ``W_v → M W_v``,
``Wₒ → Wₒ M⁻¹``. Let X be the first of such a pair and Y the second, ``Y = Wₒᵀ`` for values, biases as a last column.
With ``A = XXᵀ`` and ``B = YYᵀ``,

.. math::
    A = LL^T, \qquad L^T B L = U Λ U^T, \qquad M = Λ^{1/4} U^T L^{-1}

makes both the same diagonal: ``M A Mᵀ = M^{-T} B M⁻¹ = Λ^{1/2}``. That is where ``‖X‖² + ‖Y‖²`` is least of all bases.
Λ are the eigenvalues of AB, which do not depend on the basis, so all bases lead to the same point: up to signs, which
are chosen so that the largest entry of each row of ``MX`` is positive, and up to rotations among equal Λ.

Moments of the queries and keys themselves, ``A = E[qqᵀ]``, do the same and ask for data. Weights that are drawn at
random are nearly balanced in the sense above, and gradient flow keeps ``XXᵀ - YYᵀ``; so an ordinary start stays where
it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from metatele.errors import SingularInputError
from metatele.network.heads import Head, Side
from metatele.symmetry.group import GroupElement

_WORST = 1e12  # condition of ``XXᵀ``, up to which its inverse is known in double precision
_UNEVEN = 1e-2  # relative asymmetry of a gradient: single precision leaves 1e-6, bfloat16 some 1e-3
_ROUNDING = 100.0  # times a parameter's rounding, by which products of weights may change
Tensors = Mapping[int, Tensor]  # by ``id`` of the parameter they belong to


def balancing(A: Tensor, B: Tensor) -> GroupElement:
    r"""M, with the same diagonal for ``M A Mᵀ`` and ``M^{-T} B M⁻¹``, largest first.

    Args:
        A: ``XXᵀ [k, k]``, or any second moment of what M acts on.
        B: The same of what ``M^{-T}`` acts on.

    Returns:
        M and its inverse, in double precision.

    Raises:
        SingularInputError: One of them has no inverse, or is not finite.

    Example:
        >>> g = balancing(torch.diag(torch.tensor([16.0, 1.0])), torch.eye(2))
        >>> g.matrix.abs().diagonal()
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    A, B = A.double(), B.double()
    for moment in (A, B):
        if not bool(torch.isfinite(moment).all()):
            raise SingularInputError("the second moments of a head are not finite, so they cannot be balanced")
        values = torch.linalg.eigvalsh(moment)
        if not float(values[0]) * _WORST > float(values[-1]):
            raise SingularInputError("the second moments of a head have no inverse")
    L = torch.linalg.cholesky(A)
    values, U = torch.linalg.eigh(L.mT @ B @ L)
    root, U = values.flip(0).clamp_min(torch.finfo(values.dtype).tiny) ** 0.25, U.flip(1)
    inverse = L @ U / root
    return GroupElement(root[:, None] * torch.linalg.solve_triangular(L.mT, U, upper=True).mT, inverse)


def imbalance(head: Head, tensors: Tensors) -> float:
    r"""``‖X‖ ‖Y‖ / tr Λ^{1/2}``, 1 in a balanced basis and more in all others.

    It is 1.0 to 1.4 where weights are drawn at random, about 1.5 after a change of basis of condition 4, 14 after one
    of condition 100.

    Args:
        head: Where.
        tensors: Weights.

    Raises:
        SingularInputError: It cannot be balanced.
    """
    A, B = _squares(head, tensors)
    return float(A.trace() * B.trace()) ** 0.5 / float(_roots(A, B).sum())


def _squares(head: Head, tensors: Tensors) -> tuple[Tensor, Tensor]:
    A, B = (torch.stack([(X := side.of(tensors)) @ X.mT for side in s]).sum(0).cpu() for s in (head.left, head.right))
    return A, B


def _roots(A: Tensor, B: Tensor) -> Tensor:
    """``Λ^{1/2}``, of the balanced basis."""
    g = balancing(A, B)
    return (g.matrix @ A @ g.matrix.mT).diagonal()


def balances(heads: Sequence[Head], tensors: Tensors, above: float = 1.0) -> list[tuple[Head, GroupElement]]:
    """The changes that lead to a balanced basis, of all heads if one of them is out of balance.

    The sizes of values and of what reads them are one more choice, as steps relative to a size depend on it: values are
    made as large as the network's balanced queries and keys, unit by unit, or 1 where these may not be changed.

    Args:
        heads: Of a network.
        tensors: Its weights.
        above: :func:`imbalance` of one of them, from which they are changed.
    """
    found: list[tuple[Head, GroupElement]] = []
    worst, size, units = 0.0, 0.0, 0.0
    for head in heads:
        try:
            g = balancing(*_squares(head, tensors))
            worst = max(worst, imbalance(head, tensors))
        except SingularInputError:
            continue
        found.append((head, g))
        if head.kind == "qk":
            size += float((g.matrix @ head.left[0].of(tensors).cpu()).square().sum())
            units += head.units
    if not worst >= above:
        return []
    changes = []
    for head, g in found:
        X = g.matrix @ head.left[0].of(tensors).cpu()
        signs = X.gather(1, X.abs().argmax(1, keepdim=True)).sign()
        c = math.sqrt((size / units if units else 1.0) * head.units / float(X.square().sum())) * signs
        c = c if head.kind == "vo" else signs
        changes.append((head, GroupElement(c * g.matrix, g.inverse / c.mT)))
    return changes


def products(head: Head, tensors: Tensors) -> Tensor:
    """What a change of basis leaves as it is: ``leftᵀ right`` of all sides, in a row."""
    return torch.cat([(a.of(tensors).mT @ b.of(tensors)).reshape(-1) for a in head.left for b in head.right])


def turn_(head: Head, g: GroupElement, tensors: Tensors, dual: bool = False) -> None:
    """Weights in another basis: the left by g, the right by ``g^{-T}``; gradients are ``dual``, the other way round.

    Args:
        head: Where.
        g: The change.
        tensors: Like the parameters, contiguous, by ``id``.
        dual: They are gradients.
    """
    left, right = (g.inverse.mT, g.matrix) if dual else (g.matrix, g.inverse.mT)
    done: list[tuple[Side, Tensor]] = []
    for sides, change in ((head.left, left), (head.right, right)):
        for side in sides:
            X = side.of(tensors)
            done.append((side, change.to(X.device) @ X))
    for side, X in done:
        side.put_(X, tensors)


def turned_(head: Head, g: GroupElement, weights: Tensors, gradients: Tensors) -> bool:
    """Move weights to another basis if a gradient shows that the loss does not change, and they can be told exactly.

    Args:
        head: Where.
        g: The change.
        weights: Moved.
        gradients: Of them, not moved.

    Returns:
        Whether they were moved.
    """
    if not asymmetry(head, weights, gradients, g) <= _UNEVEN:
        return False
    kept = [(weights[id(p)], weights[id(p)].clone()) for p in head.parameters]
    before = products(head, weights)
    turn_(head, g, weights)
    after = products(head, weights)
    bound = _ROUNDING * max(torch.finfo(new.dtype).eps for new, _ in kept)
    if float((after - before).norm()) <= bound * float(before.norm()):
        return True
    for new, old in kept:
        new.copy_(old)
    return False


def asymmetry(head: Head, weights: Tensors, gradients: Tensors, g: GroupElement) -> float:
    """How far a gradient is from one of a loss that does not depend on the basis, relative.

    Of such a loss ``Σ G Xᵀ`` over the left sides is ``Σ Y Hᵀ`` over the right ones, X and Y the weights and G and H
    their gradients: the derivative along each change of basis is zero. It is measured in the basis that g leads to,
    where nothing is so large that it hides the rest.

    Args:
        head: Of it.
        weights: By ``id`` of their parameter.
        gradients: The same.
        g: A change.
    """
    M, inverse = g.matrix, g.inverse
    total, scale = torch.zeros_like(M), 0.0
    for sides, change, dual, sign in ((head.left, M, inverse.mT, 1.0), (head.right, inverse.mT, M, -1.0)):
        for side in sides:
            X, G = change @ side.of(weights).cpu(), dual @ side.of(gradients).cpu()
            total += G @ X.mT if sign > 0 else -X @ G.mT
            scale += float(X.norm() * G.norm())
    return float(total.norm()) / scale if scale else 0.0
