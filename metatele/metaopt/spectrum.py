r"""Second moments by their eigenpairs, and the teleports made of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Spectrum(NamedTuple):
    r"""A second moment ``M = s (V diag(e) Vᵀ + c (I - V Vᵀ))`` with mean eigenvalue s.

    A teleport by ``g = ((M/s + λ)/(1 + λ))^{-p/2}`` turns the coordinates in which a gradient step is made; made
    there and pulled back, a step is multiplied by

    .. math:: g^T g = \left(\frac{M/s + λ}{1 + λ}\right)^{-p}

    which is the identity for M proportional to the identity, for λ → ∞, and for p = 0.

    Attributes:
        values: e ``[..., r]``, in units of s.
        vectors: V ``[..., k, r]``, orthonormal columns.
        rest: c ``[..., 1]``, in units of s; meaningless if r = k.
        scale: s ``[...]``.
    """

    values: Tensor
    vectors: Tensor
    rest: Tensor
    scale: Tensor

    @staticmethod
    @torch.no_grad()
    def of(moment: Tensor, keep: float = 0.0) -> Spectrum:
        """Of symmetric matrices ``[..., k, k]``; one that is not finite or zero counts as the identity.

        Args:
            moment: The matrices.
            keep: Eigenvalues below ``keep * s`` may be replaced by their mean where that saves work: V then
                has at most half as many columns as rows.

        Example:
            >>> spectrum = Spectrum.of(torch.diag(torch.tensor([3.0, 1.0])))
            >>> spectrum.scale, spectrum.values
            (tensor(2.), tensor([0.5000, 1.5000]))
        """
        k = moment.shape[-1]
        scale = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
        sound = torch.isfinite(scale) & (scale > 0)  # a second moment is no larger than its diagonal
        scale = torch.where(sound, scale, 1.0)
        eye = torch.eye(k, dtype=moment.dtype, device=moment.device)
        values, vectors = _eigenpairs(torch.where(sound[..., None, None], moment / scale[..., None, None], eye))
        values = values.clamp_min(0)
        rest = values[..., :1]
        if keep > 0:
            large = int((values >= keep).sum(-1).max())
            if 2 * large <= k:
                rest = values[..., : k - large].mean(-1, keepdim=True)
                values, vectors = values[..., k - large :], vectors[..., k - large :]
        return Spectrum(values, vectors, rest, scale)

    @property
    def whole(self) -> bool:
        """Whether every eigenvalue is there."""
        return self.vectors.shape[-1] == self.vectors.shape[-2]

    @property
    def participation(self) -> Tensor:
        """``(Σe)²/(k Σe²)``, in (0, 1]: 1 if all directions are alike, 1/k if there is one alone; ``[...]``."""
        k = self.vectors.shape[-2]
        squares = self.values.square().sum(-1)
        if not self.whole:
            squares = squares + (k - self.values.shape[-1]) * self.rest[..., 0].square()
        return k / squares  # the eigenvalues sum to k

    def multipliers(self, damping: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
        """``((e + λ)/(1 + λ))^{-p}`` for the eigenvalues ``[..., r]`` and for the rest ``[..., 1]``."""
        damping, power = damping.unsqueeze(-1), power.unsqueeze(-1)
        one = (1 + damping).log()
        return ((one - (self.values + damping).log()) * power).exp(), (
            (one - (self.rest + damping).log()) * power
        ).exp()

    def from_left(self, x: Tensor, damping: Tensor, power: Tensor) -> Tensor:
        """``gᵀg x`` for ``x [..., k, m]``."""
        m, rest = self.multipliers(damping, power)
        inside = self.vectors.mT @ x
        if self.whole:
            return self.vectors @ (m.unsqueeze(-1) * inside)
        return rest.unsqueeze(-1) * x + self.vectors @ ((m - rest).unsqueeze(-1) * inside)

    def from_right(self, x: Tensor, damping: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
        """``y = x gᵀg`` for ``x [..., m, k]``, and ``tr(y M yᵀ)``."""
        m, rest = self.multipliers(damping, power)
        inside = x @ self.vectors
        columns = inside.square().sum(-2)
        size = (columns * m.square() * self.values).sum(-1)
        if not self.whole:
            outside = (x.square().sum((-2, -1)) - columns.sum(-1)).clamp_min(0)
            size = size + outside * (rest.square() * self.rest)[..., 0]
        size = size * self.scale
        if self.whole:
            return (inside * m.unsqueeze(-2)) @ self.vectors.mT, size
        return rest.unsqueeze(-1) * x + (inside * (m - rest).unsqueeze(-2)) @ self.vectors.mT, size


def _eigenpairs(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors; LAPACK gives up on some matrices in single precision, with an error or without."""
    try:
        values, vectors = torch.linalg.eigh(matrices)
        if bool(torch.isfinite(values).all()):
            return values, vectors
    except RuntimeError:
        pass
    values, vectors = torch.linalg.eigh(matrices.double())
    return values.to(matrices.dtype), vectors.to(matrices.dtype)
