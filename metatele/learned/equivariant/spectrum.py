r"""Second moments by their eigenpairs, and the teleports made of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from metatele.config import EquivariantConfig
from metatele.network.use import Moment

_TILE = 8  # columns that a processor multiplies at once: a product with 80 takes less time than one with 78


class Turn(NamedTuple):
    """``gᵀg`` of one spectrum with its damping and power: ``U Vᵀ + c I``, or one matrix.

    Attributes:
        left: U ``[..., k, r]``, or the matrix ``[..., k, k]``.
        right: V ``[..., k, r]``; ``None`` if U is the matrix.
        rest: c ``[..., 1, 1]``.
    """

    left: Tensor
    right: Tensor | None
    rest: Tensor

    def from_left(self, x: Tensor) -> Tensor:
        """``gᵀg x`` for ``x [..., k, m]``."""
        if self.right is None:
            return self.left @ x
        return (self.left @ (self.right.mT @ x)).addcmul_(self.rest, x)

    def from_right(self, x: Tensor) -> Tensor:
        """``x gᵀg`` for ``x [..., m, k]``."""
        if self.right is None:
            return x @ self.left
        return ((x @ self.right) @ self.left.mT).addcmul_(self.rest, x)


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
    def of(
        moment: Tensor | Moment,
        keep: float = 0.0,
        last: Spectrum | None = None,
        whole: int = EquivariantConfig.whole,
        margin: int = EquivariantConfig.margin,
    ) -> Spectrum:
        """Of symmetric matrices ``[..., k, k]``; one that is not finite or zero counts as the identity.

        Args:
            moment: The matrices, or factors of them, whose columns alone are then turned: time and memory are linear
                in the rows.
            keep: Of a matrix with more than ``whole`` rows, eigenvalues below ``keep * s`` may be replaced by their
                mean: V then has at most half as many columns as rows, and a multiple of 8.
            last: The spectrum of a matrix that was nearly the same. If it has fewer columns, they are turned by one
                step of subspace iteration, which takes a fraction of the time; eigenvalues near ``keep`` then come
                out too small by some per cent.
            whole: See ``keep``.
            margin: V keeps one more column, and one for every ``margin`` eigenvalues that are not below ``keep * s``.

        Example:
            >>> spectrum = Spectrum.of(torch.diag(torch.tensor([3.0, 1.0])))
            >>> spectrum.scale, spectrum.values
            (tensor(2.), tensor([0.5000, 1.5000]))
        """
        if isinstance(moment, Moment):
            if moment.rest is not None:
                return _of_factor(moment)
            moment = moment.tensor
        k = moment.shape[-1]
        scale = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
        sound = torch.isfinite(scale) & (scale > 0)  # a second moment is no larger than its diagonal
        if not bool(sound.all()):
            scale = torch.where(sound, scale, 1.0)
            eye = torch.eye(k, dtype=moment.dtype, device=moment.device)
            moment = torch.where(sound[..., None, None], moment, eye)
        moment = moment / scale[..., None, None]
        if last is not None and not last.whole and k > whole:
            turned = torch.linalg.qr(moment @ last.vectors).Q
            values, within = _eigenpairs(turned.mT @ (moment @ turned))
            if bool((values[..., 0] < keep).any()):  # else there may be others above it
                rest = (k - values.sum(-1, keepdim=True)).clamp_min(0) / (k - values.shape[-1])
                return Spectrum(values.clamp_min(0), turned @ within, rest, scale)
        values, vectors = _eigenpairs(moment)
        values = values.clamp_min(0)
        if keep > 0 and k > whole:
            large = int((values >= keep).sum(-1).max())
            columns = math.ceil((large + large // margin + 1) / _TILE) * _TILE
            if 2 * columns <= k:
                rest = values[..., : k - columns].mean(-1, keepdim=True)
                return Spectrum(values[..., k - columns :], vectors[..., k - columns :], rest, scale)
        return Spectrum(values, vectors, values[..., :1], scale)

    def cut(self, columns: int) -> Spectrum:
        """With its largest eigenvalues alone; those left out share their mean, with those that were left out before.

        Example:
            >>> spectrum = Spectrum.of(torch.diag(torch.tensor([4.0, 1.5, 0.5]))).cut(1)
            >>> spectrum.values, spectrum.rest
            (tensor([2.]), tensor([0.5000]))
        """
        k, r = self.vectors.shape[-2:]
        if r <= columns:
            return self
        left = self.values[..., :-columns].sum(-1, keepdim=True) + (k - r) * self.rest
        vectors = self.vectors[..., -columns:].clone()  # a view would keep the others in memory
        return Spectrum(self.values[..., -columns:], vectors, left / (k - columns), self.scale)

    @property
    def whole(self) -> bool:
        """Whether every eigenvalue is there."""
        return self.vectors.shape[-1] == self.vectors.shape[-2]

    @property
    def participation(self) -> Tensor:
        """``(Σe)²/(k Σe²)``, in (0, 1]: 1 if all directions are alike, 1/k if there is one alone; ``[...]``.

        Example:
            >>> Spectrum.of(torch.diag(torch.tensor([1.0, 0.0]))).participation
            tensor(0.5000)
        """
        k = self.vectors.shape[-2]
        squares = self.values.square().sum(-1)
        if not self.whole:
            squares = squares + (k - self.values.shape[-1]) * self.rest[..., 0].square()
        return k / squares  # the eigenvalues sum to k

    def multipliers(self, damping: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
        """``((e + λ)/(1 + λ))^{-p}`` for the eigenvalues ``[..., r]`` and for the rest ``[..., 1]``."""
        damping, power = damping.unsqueeze(-1), power.unsqueeze(-1)
        one = 1 + damping
        m = (one / (self.values + damping)).pow(power)
        return m, m if self.whole else (one / (self.rest + damping)).pow(power)

    def turn(self, damping: Tensor, power: Tensor, scaled: bool = False) -> Turn:
        """``gᵀg``, or ``gᵀg / s`` if it is to be scaled, for many uses.

        Example:
            >>> spectrum = Spectrum.of(torch.diag(torch.tensor([3.0, 1.0])))
            >>> spectrum.turn(torch.tensor(0.5), torch.tensor(1.0)).left  # 1.5 over 2 and over 1
            tensor([[0.7500, 0.0000],
                    [0.0000, 1.5000]])
        """
        m, rest = self.multipliers(damping, power)
        if scaled:
            m, rest = (t / self.scale.unsqueeze(-1) for t in (m, rest))
        V = self.vectors
        if self.whole:
            return Turn((V * m.unsqueeze(-2)) @ V.mT, None, rest.unsqueeze(-1))
        return Turn(V * (m - rest).unsqueeze(-2), V, rest.unsqueeze(-1))

    def from_left(self, x: Tensor, damping: Tensor, power: Tensor) -> Tensor:
        """``gᵀg x`` for ``x [..., k, m]``."""
        m, rest = self.multipliers(damping, power)
        inside = self.vectors.mT @ x
        if self.whole:
            return self.vectors @ (m.unsqueeze(-1) * inside)
        return torch.addcmul(self.vectors @ ((m - rest).unsqueeze(-1) * inside), rest.unsqueeze(-1), x)

    def from_right(self, x: Tensor, damping: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
        """``y = x gᵀg / s`` for ``x [..., m, k]``, and ``tr(y M yᵀ)``: with p = 1 and λ = 0, ``x M⁻¹``."""
        m, rest = (t / self.scale.unsqueeze(-1) for t in self.multipliers(damping, power))
        inside = x @ self.vectors
        columns = inside.square().sum(-2)
        size = torch.linalg.vecdot(columns, m.square() * self.values)
        if self.whole:
            return (inside * m.unsqueeze(-2)) @ self.vectors.mT, size * self.scale
        outside = (torch.linalg.vecdot(x.flatten(-2), x.flatten(-2)) - columns.sum(-1)).clamp_min(0)
        size = size + outside * (rest.square() * self.rest)[..., 0]
        inside = inside * (m - rest).unsqueeze(-2)
        return (inside @ self.vectors.mT).addcmul_(rest.unsqueeze(-1), x), size * self.scale


def _of_factor(moment: Moment) -> Spectrum:
    """Of ``M = F Fᵀ + ρ I``: the eigenvectors of M with eigenvalues other than ρ are those of ``F Fᵀ``."""
    assert moment.rest is not None
    F, rest = moment.tensor, moment.rest[..., 0]
    scale = moment.trace / moment.rows
    sound = torch.isfinite(scale) & (scale > 0)
    if not bool(sound.all()):
        scale, rest = torch.where(sound, scale, 1.0), torch.where(sound[..., None], rest, 1.0)
        F = torch.where(sound[..., None, None], F, 0.0)
    # Entries of FᵀF are as exact as the columns of F, large or small; double precision keeps it so.
    values, V = torch.linalg.eigh((F.mT @ F).double())
    values = values.clamp_min(0)
    # A column along which there is nothing but rounding stands for none: as its eigenvalue is ρ, it has no effect.
    there = values > 10 * torch.finfo(F.dtype).eps * values[..., -1:]
    shrink = torch.where(there, values, 1.0).rsqrt() * there
    values = torch.where(there, values, 0.0).to(F.dtype)
    s = scale.unsqueeze(-1)
    return Spectrum((values + rest) / s, F @ (V * shrink.unsqueeze(-2)).to(F.dtype), rest / s, scale)


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
