r"""Least squares by QR, with gradients: ``X H⁺`` without an SVD inside autograd.

The derivative of an SVD divides by differences of singular values; that of a QR factorisation
divides by the diagonal of R only, which is nonzero exactly when ``H`` has full rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metatele.errors import SingularInputError


def pseudo_inverse(H: Tensor, *, rank_tolerance: float | None = None) -> Tensor:
    """Moore-Penrose inverse of full-rank matrices, ``[..., d, n] -> [..., n, d]``.

    Constant single-precision matrices are factorised in double precision and rounded once.

    Args:
        H: Matrices of full rank, tall or wide.
        rank_tolerance: Least accepted ratio of diagonal entries of R; ``None`` takes
            ``eps · max(d, n)``, and 0 accepts everything without a device sync.

    Raises:
        SingularInputError: Some ``H`` is rank deficient to rounding.

    Example:
        >>> H = torch.tensor([[2.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
        >>> pseudo_inverse(H)
        tensor([[0.5000, 0.0000, 0.0000],
                [0.0000, 0.2500, 0.0000]])
    """
    tall = H if H.shape[-2] >= H.shape[-1] else H.mT
    precise = tall if H.requires_grad else tall.double()
    Q, R = torch.linalg.qr(precise)
    limit = torch.finfo(H.dtype).eps * max(H.shape[-2:]) if rank_tolerance is None else rank_tolerance
    if limit > 0 and not bool(torch.isfinite(H).all()):
        raise SingularInputError(f"layer inputs of shape {tuple(H.shape)} are not all finite")
    if limit > 0:
        _require_full_rank(R, H, limit)
    inverse = torch.linalg.solve_triangular(R, Q.mT, upper=True).to(H.dtype)
    return inverse + 0.0 if tall is H else inverse.mT + 0.0  # + 0.0 turns -0.0 into 0.0


def truncated_inverse(H: Tensor, rank_tolerance: float) -> Tensor:
    """Moore-Penrose inverse of constant matrices of any rank, ``[..., d, n] -> [..., n, d]``.

    With ``H = B C``, B an orthonormal basis of the span of the columns, it is ``C⁺ Bᵀ``: what least squares makes
    of inputs written in the coordinates of their own span. By an SVD in double precision, rounded once.

    Args:
        H: Constant matrices: the derivative is not that of a truncated SVD, so none is given.
        rank_tolerance: Singular values at or below this multiple of the largest count as zero.

    Raises:
        SingularInputError: Some entry is not finite.

    Example:
        >>> truncated_inverse(torch.tensor([[2.0, 2.0], [0.0, 0.0]]), rank_tolerance=1e-6)
        tensor([[0.2500, 0.0000],
                [0.2500, 0.0000]])
    """
    if not bool(torch.isfinite(H).all()):
        raise SingularInputError(f"layer inputs of shape {tuple(H.shape)} are not all finite")
    return torch.linalg.pinv(H.detach().double(), rtol=rank_tolerance).to(H.dtype) + 0.0


def inverse_factor(H: Tensor, rank_tolerance: float) -> Tensor:
    """``R⁻¹ [..., n, n]`` of ``H = QR`` for tall constant matrices ``[..., d, n]``, in double precision, rounded once.

    ``S H⁺ = S R⁻¹ Qᵀ`` has the norm of ``S R⁻¹``, so that nothing as large as ``H⁺`` need be made.

    Args:
        H: At least as many rows as columns.
        rank_tolerance: Least accepted ratio of diagonal entries of R.

    Raises:
        SingularInputError: Some ``H`` is rank deficient to the tolerance, or not finite.

    Example:
        >>> inverse_factor(torch.tensor([[3.0], [4.0]]), rank_tolerance=1e-6).abs()  # 1/‖H‖; the sign is QR's
        tensor([[0.2000]])
    """
    R = torch.linalg.qr(H.double(), mode="r")[1]
    if not bool(torch.isfinite(H).all()):
        raise SingularInputError(f"layer inputs of shape {tuple(H.shape)} are not all finite")
    _require_full_rank(R, H, rank_tolerance)
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    return torch.linalg.solve_triangular(R, eye.expand_as(R), upper=True).to(H.dtype)


def has_full_rank(H: Tensor, rank_tolerance: float) -> Tensor:
    """Whether each matrix ``[..., d, n]`` is finite and of full rank, by the diagonal of its QR factorisation.

    Args:
        H: Tall or wide.
        rank_tolerance: A ratio of diagonal entries of R at or below it is rank deficient.

    Returns:
        Booleans ``[...]``.

    Example:
        >>> has_full_rank(torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 2.0], [1.0, 2.0]]]), rank_tolerance=1e-6)
        tensor([ True, False])
    """
    finite = torch.isfinite(H).all(-1).all(-1)
    tall = torch.where(finite[..., None, None], H, 0.0)
    R = torch.linalg.qr((tall if H.shape[-2] >= H.shape[-1] else tall.mT).double(), mode="r")[1]
    return finite & (_diagonal_ratio(R) > rank_tolerance)


def _diagonal_ratio(R: Tensor) -> Tensor:
    diagonal = R.detach().diagonal(dim1=-2, dim2=-1).abs()
    return diagonal.amin(-1) / diagonal.amax(-1).clamp_min(torch.finfo(R.dtype).tiny)


def _require_full_rank(R: Tensor, H: Tensor, limit: float) -> None:
    ratio = _diagonal_ratio(R)
    if not bool((ratio > limit).all()):
        raise SingularInputError(
            f"layer inputs of shape {tuple(H.shape)} must have full rank; a diagonal ratio of their QR "
            f"factorisation is {float(ratio.nan_to_num(nan=0.0).min()):.1e}, at or below {limit:.1e}",
            page="docs/teleporting.md#moves",
        )


def default_damping(dtype: torch.dtype) -> float:
    """Relative damping that keeps rank-deficient problems finite and barely moves others: ``eps^{3/4}``."""
    return torch.finfo(dtype).eps ** 0.75


def damped_right_solve(B: Tensor, A: Tensor, damping: float) -> Tensor:
    r"""Minimiser of ``‖X A - B‖² + λ‖X‖²`` with ``λ = damping · ‖A‖²_F``.

    Args:
        B: ``[..., m, n]``.
        A: ``[..., k, n]``, of any rank.
        damping: Relative damping, positive.

    Returns:
        ``X`` of shape ``[..., m, k]``.

    Example:
        >>> damped_right_solve(torch.eye(2), torch.tensor([[3.0, 4.0]]), damping=1.0)  # Aᵀ/(25 + 25)
        tensor([[0.0600],
                [0.0800]])
    """
    return DampedInverse.of(A, damping).after(B)


class DampedInverse(NamedTuple):
    r"""``A⁺ = Aᵀ(AAᵀ + λI)⁻¹ = (AᵀA + λI)⁻¹Aᵀ`` with ``λ = damping · ‖A‖²_F``, in factors.

    By QR of ``[Aᵀ; √λ I]``, or of ``[A; √λ I]`` if A has more rows than columns, which never squares the
    condition number and costs what the smaller side costs.

    Attributes:
        Q: Upper part of the orthogonal factor.
        R: Triangular factor.
        tall: Whether A has more rows than columns.

    Example:
        >>> inverse = DampedInverse.of(torch.tensor([[3.0, 4.0]]), damping=1.0)  # Aᵀ/(25 + 25)
        >>> inverse.after(torch.eye(2))
        tensor([[0.0600],
                [0.0800]])
    """

    Q: Tensor
    R: Tensor
    tall: bool

    @staticmethod
    def of(A: Tensor, damping: float) -> DampedInverse:
        """Of ``A [..., k, n]``, of any rank."""
        tall = A.shape[-2] > A.shape[-1]
        upper = A if tall else A.mT
        # The floor keeps an all-zero A solvable: X = 0, with a zero derivative.
        size = torch.linalg.vector_norm(A, dim=(-2, -1), keepdim=True)
        root = (damping**0.5 * size).clamp_min(torch.finfo(A.dtype).tiny ** 0.5)
        eye = torch.eye(upper.shape[-1], dtype=A.dtype, device=A.device)
        Q, R = torch.linalg.qr(torch.cat([upper, root * eye], -2))
        return DampedInverse(Q[..., : upper.shape[-2], :], R, tall)

    def after(self, B: Tensor) -> Tensor:
        """``B A⁺`` for ``B [..., m, n]``."""
        return self._through(B) if self.tall else self._back(B)

    def transposed_after(self, B: Tensor) -> Tensor:
        """``B (A⁺)ᵀ`` for ``B [..., m, k]``."""
        return self._back(B) if self.tall else self._through(B)

    def _through(self, B: Tensor) -> Tensor:
        """``B R⁻¹ Qᵀ``."""
        return torch.linalg.solve_triangular(self.R, B, upper=True, left=False) @ self.Q.mT

    def _back(self, B: Tensor) -> Tensor:
        """``B Q R⁻ᵀ``."""
        return torch.linalg.solve_triangular(self.R, self.Q.mT @ B.mT, upper=True).mT
