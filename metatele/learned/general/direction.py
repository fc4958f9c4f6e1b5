r"""Directions: momentum whitened by the second moments of a layer's inputs, and drawn towards equal singular values.

With V a running gradient ``[o, i]``, A the average of ``hhᵀ``, μ its mean eigenvalue and R a root with
``RᵀR = (A/μ + λ)^{-1}``,

.. math::
    X = V R^T, \qquad Y = r\, \frac{msign(X)}{‖msign(X)‖} + (1 - r) \frac{X}{‖X‖}, \qquad D = Y R

``msign(UΣVᵀ) = UVᵀ``. r = 0 is K-FAC's step for errors that are alike, r = 1 is Muon's in coordinates where the inputs
are even. It does not matter which root is taken: ``msign(XQ) = msign(X)Q`` for every rotation Q.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metatele.network.use import TINY

# Newton and Schulz's iteration with slopes at zero as large as the fifth degree allows: singular values from 0.003 on
# come to between 0.7 and 1.2 in five iterations (Jordan et al. 2024).
_QUINTIC = (3.4445, -4.7750, 2.0315)
# Shorter side of matrices from which a GPU iterates in bfloat16, ten times as fast as in float32: what it rounds moves
# singular values less than they are apart anyway. Smaller ones are bound by calls.
_HALF = 256
_ALIGNED = 8  # numbers that rows are padded to a multiple of, without which tensor cores stand still


def norms(X: Tensor) -> Tensor:
    """``‖X‖`` of matrices ``[m, o, i]``, ``[m]``."""
    return torch.linalg.vector_norm(X, dim=(-2, -1))


def msign(X: Tensor, iterations: int = 5) -> Tensor:
    """``UVᵀ`` of ``X = UΣVᵀ``, up to singular values between about 0.7 and 1.2.

    Args:
        X: Matrices ``[..., o, i]``.
        iterations: Of Newton and Schulz.

    Example:
        >>> X = torch.tensor([[3.0, 0.0], [0.0, -0.5]])
        >>> msign(X).round(decimals=0) + 0.0
        tensor([[ 1.,  0.],
                [ 0., -1.]])
    """
    Y = _normed(X)
    if Y.dim() != 3:
        Y = Y.reshape(-1, *Y.shape[-2:])
    return evened(Y, iterations).view(X.shape)


def lengths_of(X: Tensor) -> Tensor:
    """The same ``[m, 1, 1]``, and never zero."""
    return torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp_min_(TINY)


def _normed(X: Tensor) -> Tensor:
    """``X/‖X‖``."""
    return X / lengths_of(X)


def evened(X: Tensor, iterations: int) -> Tensor:
    """Newton and Schulz from matrices ``[m, o, i]`` of norm 1."""
    if X.is_cuda and X.dtype == torch.float32 and min(X.shape[-2:]) >= _HALF and not X.requires_grad and _has_half(X):
        return evened_in_half(X, iterations)
    return _iterated(X, iterations)


def _has_half(X: Tensor) -> bool:
    """Whether the device has tensor cores for bfloat16."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(X.device) >= (8, 0)


def evened_in_half(X: Tensor, iterations: int) -> Tensor:
    """The iteration in bfloat16, padded by zeros, which stay zeros."""
    m, o, i = X.shape
    Y = X.new_zeros(m, -(-o // _ALIGNED) * _ALIGNED, -(-i // _ALIGNED) * _ALIGNED, dtype=torch.bfloat16)
    Y[:, :o, :i] = X
    return _iterated(Y, iterations)[:, :o, :i].to(X.dtype)


def _iterated(X: Tensor, iterations: int) -> Tensor:
    a, b, c = _QUINTIC
    tall = X.shape[-2] > X.shape[-1]
    Y = X
    for _ in range(iterations):
        G = torch.bmm(Y.mT, Y) if tall else torch.bmm(Y, Y.mT)
        P = torch.baddbmm(G, G, G, beta=b, alpha=c)
        Y = torch.baddbmm(Y, Y, P, beta=a) if tall else torch.baddbmm(Y, P, Y, beta=a)
    return Y


def polar_factor(G: Tensor, iterations: int = 5) -> Tensor:
    """P with ``P X ≈ msign(X)``, from ``G = XXᵀ``: about ``G^{-1/2}``.

    The same iteration, which never needs X: ``P ← p(G) P``, ``G ← p(G)² G``.

    Args:
        G: ``[m, k, k]``, of any scale.
        iterations: Of Newton and Schulz.

    Example:
        >>> X = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
        >>> bool((polar_factor(X @ X.mT) @ X - msign(X)).abs().max() < 1e-4)
        True
    """
    a, b, c = _QUINTIC
    trace = G.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].clamp_min(TINY)
    H, P = G / trace, None
    for step in range(iterations):
        p = torch.baddbmm(H, H, H, beta=b, alpha=c)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        P = p if P is None else torch.bmm(p, P)
        if step < iterations - 1:
            H = torch.bmm(p, torch.bmm(p, H))
    assert P is not None
    return P * trace.rsqrt()


def leading_factor(G: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """F and c with ``(c - FFᵀ) X`` about ``msign(X)`` along the largest directions of X, and as long across them.

    Args:
        G: ``XXᵀ [m, k, k]``.
        start: Directions ``[m, k, r]`` that many of the largest lie near; twice as many are taken.

    Returns:
        ``[m, k, 2 r]`` and ``[m, 1, 1]``.

    Example:
        >>> X = torch.diag(torch.tensor([9.0, 4.0, 1.0, 1.0]))[None]
        >>> F, c = leading_factor(X @ X.mT, torch.eye(4)[None, :, :1] + 0.1)
        >>> bool(((c * X - F @ (F.mT @ X)).diagonal(dim1=-2, dim2=-1) - 1).abs().max() < 0.05)
        True
    """
    k = G.shape[-1]
    trace = G.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].clamp_min(TINY)
    H = (G / trace).nan_to_num(0.0, 0.0, 0.0)  # LAPACK refuses what is not finite
    Q = torch.linalg.qr(start.nan_to_num(0.0, 0.0, 0.0)).Q
    Q = torch.linalg.qr(torch.cat([Q, torch.bmm(H, Q)], -1)).Q
    Q = torch.linalg.qr(torch.bmm(H, Q)).Q
    values, V = torch.linalg.eigh(torch.bmm(Q.mT, torch.bmm(H, Q)))
    least = 1 / _QUINTIC[0] ** 10  # smaller ones the iteration does not bring to 1 either
    left = (1 - values.sum(-1)).clamp_min(0) / max(k - Q.shape[-1], 1)
    c = left.clamp_min(least).rsqrt()
    longer = (c[:, None] - values.clamp_min(least).rsqrt()).clamp_min(0)
    scale = trace.rsqrt()
    return torch.bmm(Q, V) * (longer[:, None, :] * scale).sqrt(), c[:, None, None] * scale


def decomposed(G: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of Gram matrices ``[m, r, r]``; of what is not finite in them, as of zeros."""
    G = G.nan_to_num(0.0, 0.0, 0.0)  # LAPACK refuses it
    alone = G.is_cuda and len(G) == 1  # two are decomposed in one go, and faster than one
    values, V = torch.linalg.eigh(G.expand(2, -1, -1) if alone else G)
    return (values[:1], V[:1]) if alone else (values, V)


class Root(NamedTuple):
    """``(A/μ + λ)^{-1/2}`` of matrices' inputs, in one of three forms.

    Attributes:
        dense: R, a triangle ``[m, i, i]``; or nothing.
        vectors: U ``[m, i, r]``, orthonormal; or nothing.
        along: ``m_j - c`` of those, ``[m, 1, r]``.
        rest: c, of what is left ``[m, 1, 1]``; of a diagonal A all there is, ``[m, 1, i]``.
    """

    dense: Tensor | None
    vectors: Tensor | None = None
    along: Tensor | None = None
    rest: Tensor | None = None

    @staticmethod
    def of_dense(A: Tensor, damping: Tensor) -> Root:
        """Of whole moments, by Cholesky's triangle; the identity where that fails.

        Args:
            A: ``[m, i, i]``.
            damping: λ ``[m]``.
        """
        k = A.shape[-1]
        mean = A.diagonal(dim1=-2, dim2=-1).mean(-1)
        eye = torch.eye(k, dtype=A.dtype, device=A.device)
        scaled = A / mean.clamp_min(TINY)[:, None, None] + damping[:, None, None] * eye
        L, info = torch.linalg.cholesky_ex(scaled.nan_to_num(0.0, 0.0, 0.0))
        failed = (info != 0)[:, None, None]
        L = torch.where(failed, eye, L)
        return Root(torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False))

    @staticmethod
    def of_factor(F: Tensor, rest: Tensor, damping: Tensor, found: tuple[Tensor, Tensor] | None = None) -> Root:
        """Of factors ``A = FFᵀ + ρ``.

        Args:
            F: ``[m, i, r]``.
            rest: ρ ``[m]``.
            damping: λ ``[m]``.
            found: Of ``FᵀF`` what :func:`decomposed` gives, if that is known.
        """
        values, V = decomposed(F.mT @ F) if found is None else found
        keep = values > 1e-6 * values[..., -1:].clamp_min(TINY)
        U = (F @ V) * torch.where(keep, values.clamp_min(TINY).rsqrt(), 0.0)[:, None, :]
        mean = values.clamp_min(0).sum(-1) / F.shape[-2] + rest
        mean = mean.clamp_min(TINY)
        c = (rest / mean + damping).rsqrt()
        along = ((values.clamp_min(0) + rest[:, None]) / mean[:, None] + damping[:, None]).rsqrt()
        along = torch.where(keep, along - c[:, None], 0.0)
        return Root(None, U, along[:, None, :], c[:, None, None])

    @staticmethod
    def of_diagonal(a: Tensor, damping: Tensor) -> Root:
        """Of diagonals ``a [m, i]``."""
        mean = a.mean(-1, keepdim=True).clamp_min(TINY)
        return Root(None, rest=(a / mean + damping[:, None]).rsqrt()[:, None, :])

    def right(self, X: Tensor) -> Tensor:
        """``X Rᵀ`` of ``[m, o, i]``."""
        return torch.bmm(X, self.dense.mT) if self.dense is not None else self._symmetric(X)

    def back(self, Y: Tensor) -> Tensor:
        """``Y R``."""
        return torch.bmm(Y, self.dense) if self.dense is not None else self._symmetric(Y)

    def squared(self) -> Root:
        """Of ``RᵀR`` where R is symmetric: what :meth:`right` and :meth:`back` do together.

        Example:
            >>> root = Root.of_diagonal(torch.tensor([[2.0, 1.0]]), torch.ones(1))
            >>> X = torch.tensor([[[1.0, 2.0]]])
            >>> bool((root.squared().right(X) - root.back(root.right(X))).abs().max() < 1e-6)
            True
        """
        assert self.rest is not None
        along = None if self.along is None else self.along * (2 * self.rest + self.along)
        return Root(None, self.vectors, along, self.rest.square())

    def joined(self, K: Tensor, c: Tensor) -> Root:
        """``c R - KKᵀ`` of an R with vectors.

        Args:
            K: ``[m, i, r]``.
            c: ``[m, 1, 1]``.
        """
        assert self.vectors is not None
        assert self.along is not None
        assert self.rest is not None
        along = torch.cat([c * self.along, self.along.new_full((len(K), 1, K.shape[-1]), -1.0)], -1)
        return Root(None, torch.cat([self.vectors, K], -1), along, c * self.rest)

    def around(self, P: Tensor) -> Tensor:
        """``Rᵀ P R`` of symmetric ``[m, i, i]``."""
        return self.back(self.back(P).mT).mT

    def _symmetric(self, X: Tensor) -> Tensor:
        assert self.rest is not None
        if self.vectors is None or self.along is None:
            return X * self.rest
        return torch.baddbmm(self.rest * X, torch.bmm(X, self.vectors) * self.along, self.vectors.mT)

    def tensors(self) -> list[Tensor]:
        """Those there are."""
        return [t for t in self if t is not None]

    def products(self, o: int, i: int) -> int:
        """Operations of one :meth:`right`, of a matrix."""
        if self.dense is not None:
            return 2 * o * i * i
        return o * i if self.vectors is None else 4 * o * i * self.vectors.shape[-1]


def drawn(X: Tensor, spectral: Tensor, iterations: int = 5, even: Tensor | None = None) -> Tensor:
    """``r Y/‖Y‖ + (1 - r) X/‖X‖`` with ``Y = msign(X)``.

    Args:
        X: ``[m, o, i]``.
        spectral: r ``[m, 1, 1]``.
        iterations: Of Newton and Schulz.
        even: ``1 - r``, if that is known.

    Example:
        >>> X = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
        >>> drawn(X, torch.zeros(1, 1, 1))
        tensor([[[0.6000, 0.0000],
                 [0.0000, 0.8000]]])
    """
    Z = _normed(X)
    Y = evened(Z, iterations)
    return Z.mul_(1 - spectral if even is None else even).addcmul_(Y, spectral / lengths_of(Y))
