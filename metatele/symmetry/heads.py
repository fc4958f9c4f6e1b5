r"""The basis of attention heads, which nothing that a network computes depends on, and a canonical choice of it.

Scores ``qᵀk`` stay the same under ``q → Mq``, ``k → M^{-T}k``; what is read of values under ``v → Mv``, ``Wₒ → Wₒ M⁻¹``.
With ``A = E[qqᵀ]`` and ``B = E[kkᵀ]`` over tokens (of values ``A = E[vvᵀ]`` and ``B = WₒᵀWₒ``),

.. math::
    A = LL^T, \qquad L^T B L = U Λ U^T, \qquad M = Λ^{1/4} U^T L^{-1}

makes both second moments the same diagonal: ``M A Mᵀ = M^{-T} B M⁻¹ = Λ^{1/2}``. Λ are the eigenvalues of AB, which do
not depend on the basis; so all bases lead to the same point, up to signs where Λ are different. Signs are chosen so that
the largest entry of each row of ``M W_q`` is positive.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metatele.errors import SingularInputError
from metatele.network.heads import Head, Side
from metatele.symmetry.group import GroupElement

_WORST = 1e12  # condition of a second moment, up to which its inverse is known in double precision


def balancing(A: Tensor, B: Tensor) -> GroupElement:
    r"""M, with the same diagonal for ``M A Mᵀ`` and ``M^{-T} B M⁻¹``, largest first.

    Args:
        A: Second moment ``[k, k]`` of what M acts on.
        B: Of what ``M^{-T}`` acts on.

    Returns:
        M and its inverse, in double precision.

    Raises:
        SingularInputError: One of them has no inverse, as of fewer tokens than units, or is not finite.

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
            raise SingularInputError("the second moments of a head have no inverse: it saw too few different tokens")
    L = torch.linalg.cholesky(A)
    values, U = torch.linalg.eigh(L.mT @ B @ L)
    root, U = values.flip(0).clamp_min(torch.finfo(values.dtype).tiny) ** 0.25, U.flip(1)
    inverse = L @ U / root
    return GroupElement(root[:, None] * torch.linalg.solve_triangular(L.mT, U, upper=True).mT, inverse)


def condition(g: GroupElement) -> float:
    """Largest singular value over the smallest one.

    Example:
        >>> condition(GroupElement(torch.diag(torch.tensor([2.0, 0.5])), torch.diag(torch.tensor([0.5, 2.0]))))
        4.0
    """
    values = torch.linalg.svdvals(g.matrix)
    return float(values[0] / values[-1])


def balance_of(head: Head, tensors: Mapping[int, Tensor]) -> GroupElement:
    """:func:`balancing` of a head, with signs.

    Args:
        head: With its moments.
        tensors: Weights by ``id`` of their parameter.

    Raises:
        SingularInputError: It cannot be balanced.
    """
    A = head.moment / max(1, head.columns[0])
    if head.other is None:
        B = sum(W @ W.mT for W in (side.of(tensors).cpu() for side in head.right))
        assert isinstance(B, Tensor)
    else:
        B = head.other / max(1, head.columns[1])
    g = balancing(A, B)
    W = g.matrix @ head.left[0].of(tensors).cpu()
    signs = W.gather(1, W.abs().argmax(1, keepdim=True)).sign()
    signs = torch.where(signs == 0, 1.0, signs)
    return GroupElement(signs * g.matrix, g.inverse * signs.mT)


def products(head: Head, tensors: Mapping[int, Tensor]) -> Tensor:
    """What a change of basis leaves as it is: ``leftᵀ right`` of all sides, in a row."""
    return torch.cat(
        [(a.of(tensors).mT @ b.of(tensors)).reshape(-1) for a in head.left for b in head.right]
    )


def turn_(head: Head, g: GroupElement, tensors: Mapping[int, Tensor], dual: bool = False) -> None:
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


def asymmetry(head: Head, weights: Mapping[int, Tensor], gradients: Mapping[int, Tensor], g: GroupElement) -> float:
    """How far a gradient is from one of a loss that does not depend on the basis, relative.

    Of such a loss ``Σ G Xᵀ`` over the left sides is ``Σ Y Hᵀ`` over the right ones, X and Y the weights and G and H their
    gradients: the derivative along each change of basis is zero. It is measured in the basis that g leads to, where
    nothing is so large that it hides the rest.

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
