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
QUINTIC = (3.4445, -4.7750, 2.0315)
# Shorter side of matrices from which a GPU iterates in bfloat16, ten times as fast as in float32: what it rounds moves
# singular values less than they are apart anyway. Smaller ones are bound by calls.
_HALF = 256
_LEAST = 1e-6  # share that is drawn to msign, below which no less is
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


def lengths_of(X: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The same ``[m, 1, 1]``, and never zero; added up in another dtype, if one is given."""
    return torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=dtype).clamp_min_(TINY)


def _normed(X: Tensor) -> Tensor:
    """``X/‖X‖``."""
    return X / lengths_of(X)


def evened(X: Tensor, iterations: int) -> Tensor:
    """Newton and Schulz from matrices ``[m, o, i]`` of norm 1."""
    return evened_in_half(X, iterations) if in_half(X) else _iterated(X, iterations)


def in_half(X: Tensor) -> bool:
    """Whether the iteration of matrices runs in bfloat16: where the device has tensor cores for it."""
    wide = X.is_cuda and X.dtype == torch.float32 and min(X.shape[-2:]) >= _HALF and not X.requires_grad
    return wide and (torch.version.hip is not None or torch.cuda.get_device_capability(X.device) >= (8, 0))


def evened_in_half(X: Tensor, iterations: int) -> Tensor:
    """The iteration in bfloat16."""
    return _halved(X, torch.ones_like(X[:, :1, :1]), iterations).to(X.dtype).mul_(QUINTIC[2] ** -0.25)


def _halved(X: Tensor, lengths: Tensor, iterations: int) -> Tensor:
    """``c^{1/4} msign(X)`` in bfloat16, of matrices that are ``lengths [m, 1, 1]`` long.

    They are padded by zeros, which stay zeros.
    """
    m, o, i = X.shape
    Y = X.new_empty(m, -(-o // _ALIGNED) * _ALIGNED, -(-i // _ALIGNED) * _ALIGNED, dtype=torch.bfloat16)
    Y[:, o:].zero_()
    Y[:, :o, i:].zero_()
    torch.mul(X, QUINTIC[2] ** 0.25 / lengths, out=Y[:, :o, :i])
    return squared_out(Y, iterations)[:, :o, :i]


def _iterated(X: Tensor, iterations: int) -> Tensor:
    a, b, c = QUINTIC
    tall = X.shape[-2] > X.shape[-1]
    Y = X
    for _ in range(iterations):
        G = torch.bmm(Y.mT, Y) if tall else torch.bmm(Y, Y.mT)
        P = torch.baddbmm(G, G, G, beta=b, alpha=c)
        Y = torch.baddbmm(Y, Y, P, beta=a) if tall else torch.baddbmm(Y, P, Y, beta=a)
    return Y


def squared_out(Y: Tensor, iterations: int) -> Tensor:
    """The same of ``c^{1/4} X``, without a copy of a large matrix: for those whose memory is what takes the time.

    With ``H = √c XXᵀ`` the polynomial is ``a + b XXᵀ + c (XXᵀ)² = (H + b/(2√c))² + a - b²/(4c)``, so that each
    iteration is three products and two sums on diagonals.

    Args:
        Y: ``c^{1/4} X [m, o, i]``; it is overwritten.
        iterations: Of Newton and Schulz.

    Returns:
        ``c^{1/4}`` times what the iteration gives.

    Example:
        >>> X = torch.tensor([[[0.6, 0.0], [0.0, 0.8]]])
        >>> bool((squared_out(X * 2.0315**0.25, 5) * 2.0315**-0.25 - msign(X)).abs().max() < 1e-5)
        True
    """
    a, b, c = QUINTIC
    m, k = len(Y), min(Y.shape[-2:])
    tall = Y.shape[-2] > k
    other, H, P = torch.empty_like(Y), Y.new_empty(m, k, k), Y.new_empty(m, k, k)
    inner, outer = H.diagonal(dim1=-2, dim2=-1), P.diagonal(dim1=-2, dim2=-1)
    for _ in range(iterations):
        torch.bmm(Y.mT if tall else Y, Y if tall else Y.mT, out=H)
        inner.add_(b / (2 * c**0.5))
        torch.bmm(H, H, out=P)
        outer.add_(a - b * b / (4 * c))
        torch.bmm(Y if tall else P, P if tall else Y, out=other)
        Y, other = other, Y
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
    a, b, c = QUINTIC
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
    least = 1 / QUINTIC[0] ** 10  # smaller ones the iteration does not bring to 1 either
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
        rest: c, of what is left ``[m, 1, 1]``; of a diagonal A all there is, ``[m, 1, i]``; nothing where it is 1.
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

    @property
    def over_rest(self) -> Root:
        """``R/c`` of an R with vectors, whose rest is then 1 and left out; any other as it is."""
        if self.along is None or self.rest is None:
            return self
        return Root(None, self.vectors, self.along / self.rest)

    def turn_(self, X: Tensor) -> Tensor:
        """``X R`` of a symmetric R in X's own memory; if R has vectors, of one that is :attr:`over_rest`.

        Example:
            >>> root = Root.of_factor(torch.ones(1, 2, 1), torch.ones(1), torch.ones(1))
            >>> X = torch.tensor([[[1.0, 2.0]]])
            >>> expected = root.right(X) / root.rest
            >>> bool((root.over_rest.turn_(X) - expected).abs().max() < 1e-6)
            True
        """
        if self.vectors is None or self.along is None:
            assert self.rest is not None
            return X.mul_(self.rest)
        return X.baddbmm_(torch.bmm(X, self.vectors).mul_(self.along), self.vectors.mT)

    def products(self, o: int, i: int) -> int:
        """Operations of one :meth:`right`, of a matrix."""
        if self.dense is not None:
            return 2 * o * i * i
        return o * i if self.vectors is None else 4 * o * i * self.vectors.shape[-1]


def odds_of(spectral: Tensor) -> Tensor:
    """``(1 - r)/r``; a share below a millionth counts as one."""
    return (1 - spectral) / spectral.clamp_min(_LEAST)


def drawn_(X: Tensor, odds: Tensor, iterations: int = 5) -> Tensor:
    """A positive multiple of ``r Y/‖Y‖ + (1 - r) X/‖X‖`` with ``Y = msign(X)``, in X's own memory.

    Args:
        X: ``[m, o, i]``.
        odds: ``(1 - r)/r  [m, 1, 1]``.
        iterations: Of Newton and Schulz.

    Example:
        >>> X = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
        >>> made = drawn_(X, odds_of(torch.zeros(1, 1, 1)))
        >>> made / made.norm()
        tensor([[[0.6000, 0.0000],
                 [0.0000, 0.8000]]])
    """
    lengths = lengths_of(X)
    if in_half(X):
        Y = _halved(X, lengths, iterations)
        share = lengths_of(Y, X.dtype).div_(lengths)
    else:
        Y = _iterated(X.div_(lengths), iterations)
        share = lengths_of(Y)
    # What is made is given another length in any case, so that Y stays as it is.
    return torch.addcmul(Y, X, share.mul_(odds), out=X)


def directed_(X: Tensor, root: Root | None, odds: Tensor, iterations: int) -> Tensor:
    """A positive multiple of D of a momentum X, in X's own memory.

    Args:
        X: ``[m, o, i]``.
        root: R; of one with vectors its :attr:`Root.over_rest`.
        odds: ``(1 - r)/r  [m, 1, 1]``.
        iterations: Of Newton and Schulz.
    """
    if root is None:
        return drawn_(X, odds, iterations)
    if root.dense is None:
        return root.turn_(drawn_(root.turn_(X), odds, iterations))
    return torch.bmm(drawn_(root.right(X), odds, iterations), root.dense, out=X)
