r"""One use of a matrix-shaped parameter in a pass, reduced to moments where it is seen.

A layer that computes ``z = W h`` receives ``h [i, n]``, one column for each sample and position, and gets back
``δ = ∂L/∂z [o, n]``; then ``Σ δhᵀ = ∂L/∂W``. A bias is one more column of W, and one more row of h, which is always 1
(:mod:`metatele.network.bias`). Whole activations are not kept: what is asked for later is their second moments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from metatele.config import EquivariantConfig

WIDEST: int = EquivariantConfig.dense  # rows up to which a second moment is kept whole
RANK: int = EquivariantConfig.rank  # columns of a wider one's factor
ONE_BATCH = 2  # times rank: most columns of a factor of one batch, in which few samples then leave nothing out
SKETCH = 8  # times rank: random combinations that stand for more columns, enough to tell the largest directions
_TURNS = 6  # of a subspace: eigenvalues half as large then change those kept by some parts in ten thousand
_FEW_TURNS = 2  # the same of one batch's columns, whose average over batches is what counts
_BATCHED = 32  # rows up to which CUDA decomposes many matrices in one go; larger ones one by one, a millisecond each
_SQUARE_TURNS = 4  # of a subspace by M² where that is so, without any decomposition
_SHIFT = 1e-13  # in float64: keeps Cholesky's triangle of directions that depend on each other
_FEW = 1024  # columns whose random signs are remembered
SAME = 1e-5  # between fingerprints: other batches differ by a hundredth and more, the same one by rounding
TINY = 1e-38  # below float32's smallest normal number, so that no logarithm is of zero, nor a quotient by it


class Moment(NamedTuple):
    r"""A second moment, whole or as ``M = F Fᵀ + ρ I``, which takes memory linear in its rows.

    Attributes:
        tensor: M ``[..., k, k]``, or F ``[..., k, r]``.
        rest: ρ ``[..., 1, 1]``; ``None`` if the tensor is M.
    """

    tensor: Tensor
    rest: Tensor | None = None

    @staticmethod
    def of(columns: Tensor, widest: int = WIDEST, rank: int = RANK, exact: bool = True) -> Moment:
        """``x xᵀ`` of columns ``[..., k, n]``; of more than ``widest`` rows as a factor.

        Args:
            columns: x.
            widest: Rows.
            rank: Columns of a factor.
            exact: See :meth:`compressed`.

        Up to ``2 rank`` columns are the factor themselves. Of more, it has the ``rank`` largest directions, found from
        no more than ``8 rank`` random combinations of the columns; what it leaves out is spread evenly, so the trace is
        kept.

        Example:
            >>> Moment.of(torch.tensor([[1.0, 1.0], [0.0, 2.0]])).tensor
            tensor([[2., 2.],
                    [2., 4.]])
            >>> M = Moment.of(torch.ones(4, 5), widest=2, rank=2)
            >>> M.tensor.shape, round(float(M.trace), 3)
            (torch.Size([4, 2]), 20.0)
        """
        return Moment.sketched(columns, widest, rank).narrowed(rank, exact)

    @staticmethod
    def sketched(columns: Tensor, widest: int = WIDEST, rank: int = RANK) -> Moment:
        """The first half of :meth:`of`; :meth:`narrowed` is the other, which many moments may go through together.

        Returns:
            The whole matrix, or a factor of at most ``8 rank`` columns whose rest may be negative: it makes up for what
            random combinations miss of the trace.
        """
        if columns.shape[-2] <= widest:
            return Moment(columns @ columns.mT)
        n, most = columns.shape[-1], SKETCH * rank
        if n <= most:
            return Moment(columns, columns.new_zeros(*columns.shape[:-2], 1, 1))
        signs = (_few_signs if n <= _FEW else _signs)(n, most, columns.dtype, columns.device)
        sketch = columns @ (signs / most**0.5)
        return Moment(sketch, ((_squared(columns) - _squared(sketch)) / columns.shape[-2])[..., None, None])

    def narrowed(self, rank: int = RANK, exact: bool = False) -> Moment:
        """A factor of more than ``2 rank`` columns :meth:`compressed`; any other moment as it is.

        Example:
            >>> sketch = Moment.sketched(torch.ones(4, 5), widest=2, rank=2)
            >>> sketch.narrowed(2).tensor.shape, round(float(sketch.narrowed(2).trace), 3)
            (torch.Size([4, 2]), 20.0)
        """
        if self.rest is None or self.tensor.shape[-1] <= ONE_BATCH * rank:
            return self
        return self.compressed(rank, self.trace, exact)

    @staticmethod
    def zero(rows: int, like: Tensor, widest: int = WIDEST) -> Moment:
        """Of nothing, in the dtype and on the device of a tensor."""
        if rows <= widest:
            return Moment(like.new_zeros(rows, rows))
        return Moment(like.new_zeros(rows, 1), like.new_zeros(1, 1))

    @property
    def rows(self) -> int:
        """Number of rows k."""
        return self.tensor.shape[-2]

    @property
    def trace(self) -> Tensor:
        """``tr M``, ``[...]``."""
        if self.rest is None:
            return self.tensor.diagonal(dim1=-2, dim2=-1).sum(-1)
        return _squared(self.tensor) + self.rows * self.rest[..., 0, 0]

    @property
    def dense(self) -> Tensor:
        """M ``[..., k, k]``."""
        if self.rest is None:
            return self.tensor
        eye = torch.eye(self.rows, dtype=self.tensor.dtype, device=self.tensor.device)
        return self.tensor @ self.tensor.mT + self.rest * eye

    def scaled(self, factor: Tensor | float) -> Moment:
        """``c M`` for c ``[...]``, zero or positive."""
        if not isinstance(factor, Tensor):  # without a transfer
            return (
                Moment(self.tensor * factor)
                if self.rest is None
                else Moment(self.tensor * factor**0.5, self.rest * factor)
            )
        c = factor.to(self.tensor)[..., None, None]
        return Moment(self.tensor * c) if self.rest is None else Moment(self.tensor * c.sqrt(), self.rest * c)

    def plus(self, other: Moment, rank: int = RANK) -> Moment:
        """``M + M'``.

        Args:
            other: M', of the same size.
            rank: Columns that a factor has at most; what the largest of them leave out of the trace is spread evenly.

        Returns:
            A factor if both are, else the whole matrix.

        Example:
            >>> Moment(torch.eye(2)).plus(Moment(torch.ones(2, 2))).tensor
            tensor([[2., 1.],
                    [1., 2.]])
        """
        if self.rest is None or other.rest is None:
            return Moment(self.dense + other.dense)
        return self._joined(other, 1.0, 1.0, rank)

    def mixed(self, new: Moment, share: float, rank: int = RANK) -> Moment:
        """``(1 - share) M + share M'``; a factor of at most ``rank`` columns.

        Example:
            >>> Moment(torch.eye(2)).mixed(Moment(torch.ones(2, 2)), 0.25).tensor
            tensor([[1.0000, 0.2500],
                    [0.2500, 1.0000]])
        """
        if self.rest is None or new.rest is None:
            return Moment(self.dense.lerp(new.dense, share))
        return self._joined(new, 1 - share, share, rank)

    def over(self, count: float) -> Moment:
        """``M / n``; rounds as a division does."""
        return Moment(self.tensor / count) if self.rest is None else self.scaled(1 / count)

    def map(self, function: Callable[[Tensor], Tensor]) -> Moment:
        """The same with a function applied to its tensors."""
        return Moment(function(self.tensor), None if self.rest is None else function(self.rest))

    def where(self, chosen: Tensor, other: Moment) -> Moment:
        """M where it is chosen, else the other.

        Args:
            chosen: Booleans ``[...]``.
            other: Of the same size.

        Returns:
            A factor if both are, else the whole matrix.

        Example:
            >>> Moment(torch.eye(2)).where(torch.tensor(False), Moment(torch.zeros(2, 2))).trace
            tensor(0.)
        """
        at = chosen[..., None, None]
        if self.rest is None or other.rest is None:
            return Moment(torch.where(at, self.dense, other.dense))
        columns = max(self.tensor.shape[-1], other.tensor.shape[-1])
        F, other_F = (torch.nn.functional.pad(m.tensor, (0, columns - m.tensor.shape[-1])) for m in (self, other))
        return Moment(torch.where(at, F, other_F), torch.where(at, self.rest, other.rest))

    def _joined(self, other: Moment, a: float, b: float, rank: int) -> Moment:
        """``a M + b M'`` of two factors; their columns are never copied side by side, which would take as long."""
        assert self.rest is not None
        assert other.rest is not None
        F, G, rest = self.tensor, other.tensor, a * self.rest + b * other.rest
        r = F.shape[-1]
        if r + G.shape[-1] <= rank:
            return Moment(torch.cat([a**0.5 * F, b**0.5 * G], -1), rest)
        across = (a * b) ** 0.5 * (F.mT @ G)
        rows = (torch.cat([a * (F.mT @ F), across], -1), torch.cat([across.mT, b * (G.mT @ G)], -1))
        V = directions_of(torch.cat(rows, -2), rank)
        joined = F @ (a**0.5 * V[..., :r, :]) + G @ (b**0.5 * V[..., r:, :])
        left = (a * self.trace + b * other.trace - _squared(joined)).clamp_min(0)
        return Moment(joined, left[..., None, None] / self.rows)

    def factored(self, rank: int = RANK) -> Moment:
        """A factor with its ``rank`` largest directions of a whole one, found by subspace iteration; else the same.

        Example:
            >>> M = Moment(torch.diag(torch.tensor([4.0, 1.0, 1.0]))).factored(1)
            >>> M.tensor.shape, M.dense.diagonal().round(decimals=3)
            (torch.Size([3, 1]), tensor([4.6670, 0.6670, 0.6670]))
        """
        if self.rest is not None:
            return self
        values, V = _largest(self.tensor, rank, _TURNS)
        columns = V * values[..., None, :].clamp_min(0).sqrt()
        rest = (self.trace - _squared(columns)).clamp_min(0) / self.rows
        return Moment(columns, rest[..., None, None])

    def compressed(self, rank: int, trace: Tensor, exact: bool = True) -> Moment:
        """A factor of this one's ``rank`` largest directions; what is left of the trace is spread evenly.

        Args:
            rank: Columns that it has at most.
            trace: ``[...]``, of the moment that the factor stands for.
            exact: Of many columns, too, the largest directions are those of a whole decomposition; else they are found
                by subspace iteration, several times as fast and some thousandths of the trace worse.

        Example:
            >>> factor = Moment(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(1, 1))
            >>> kept = factor.compressed(1, trace=torch.tensor(5.0))
            >>> kept.tensor.abs().flatten().tolist(), float(kept.rest)
            ([2.0, 0.0], 0.5)
        """
        F = self.tensor
        if F.shape[-1] > rank:
            G = F.mT @ F
            if exact or F.shape[-1] <= 2 * ONE_BATCH * rank or _one_by_one(G):
                V = directions_of(G, rank)
            else:
                _, V = _largest(G, rank, _FEW_TURNS)
            F = F @ V
        rest = (trace - _squared(F)).clamp_min(0) / self.rows
        return Moment(F, rest[..., None, None])


def _signs(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    random = torch.Generator().manual_seed(rows)
    return torch.randint(2, (rows, columns), generator=random).to(device, dtype) * 2 - 1


_few_signs = lru_cache(maxsize=4)(_signs)  # drawing them takes longer than what they are drawn for


@lru_cache(maxsize=8)
def _begun(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where a subspace begins."""
    random = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=random, dtype=torch.float64).to(device, dtype)


def _largest(M: Tensor, rank: int, turns: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues ``[..., rank]`` of ``[..., k, k]`` and their vectors, by subspace iteration."""
    M = M.nan_to_num(0.0, 0.0, 0.0)  # which LAPACK refuses
    k = M.shape[-1]
    Q = _begun(k, min(k, ONE_BATCH * rank), M.dtype, M.device)
    for _ in range(turns):
        Q = torch.linalg.qr(M @ Q).Q
    values, V = torch.linalg.eigh(Q.mT @ M @ Q)
    return values[..., -rank:], (Q @ V)[..., -rank:]


def _one_by_one(M: Tensor) -> bool:
    """Whether matrices ``[..., k, k]`` would be decomposed one after another, each in milliseconds."""
    return M.is_cuda and M.shape[-1] > _BATCHED and not M.requires_grad


def directions_of(M: Tensor, rank: int) -> Tensor:
    """The directions ``[..., k, rank]`` of the largest eigenvalues."""
    if _one_by_one(M):
        return directions_by_turns(M, rank)
    return torch.linalg.eigh(M.nan_to_num(0.0, 0.0, 0.0))[1][..., -rank:]  # which refuses what is not finite


def directions_by_turns(M: Tensor, rank: int) -> Tensor:
    """An orthonormal basis ``[..., k, rank]`` of about the same directions, by products and triangles alone.

    In float64, in which a Gram matrix loses no direction that float32 had; zeros where there is no direction left.
    """
    k = M.shape[-1]
    A = M.nan_to_num(0.0, 0.0, 0.0).double()
    A = A / A.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(TINY)
    A = A @ A
    Q = _begun(k, min(k, rank), torch.float64, M.device)
    shift = _SHIFT * torch.eye(Q.shape[-1], dtype=torch.float64, device=M.device)
    for _ in range(_SQUARE_TURNS):
        Y = A @ Q
        Y = Y / torch.linalg.vector_norm(Y, dim=-2, keepdim=True).clamp_min(1e-200)
        L = torch.linalg.cholesky_ex(Y.mT @ Y + shift).L
        Q = torch.linalg.solve_triangular(L.mT, Y, upper=True, left=False)
    return Q.to(M.dtype)


def _squared(x: Tensor) -> Tensor:
    """``‖x‖²`` of matrices, without a matrix of squares."""
    return torch.linalg.vector_norm(x, dim=(-2, -1)).square()


class Fingerprint(NamedTuple):
    r"""Sums by which a batch ``x [B, d, n]`` is known again, whatever the order of its samples.

    They are sums over batch and samples of ``r_a = Σ_i x_i`` and ``r_b = Σ_i t_i x_i``, t a line from -1 to 1, so
    those of several passes, or of several processes, add up.

    Attributes:
        sums: ``Σ r``, ``[2]``.
        squares: ``Σ r²``, ``[2]``.
        columns: ``B n``.
    """

    sums: Tensor
    squares: Tensor
    columns: int

    @staticmethod
    @torch.no_grad()
    def of(columns: Tensor) -> Fingerprint:
        """Of what the first layer receives, ``[B, d, n]``.

        Example:
            >>> x = torch.tensor([[[1.0, 2.0], [3.0, 5.0]]])
            >>> whole = Fingerprint.of(x)
            >>> whole.sums, whole.columns
            (tensor([11.,  5.]), 2)
            >>> parts = Fingerprint.of(x[..., :1]).plus(Fingerprint.of(x[..., 1:]))
            >>> torch.equal(parts.numbers(), whole.numbers())
            True
        """
        rows = _ramps(columns.shape[-2], columns.dtype, columns.device) @ columns
        return Fingerprint(rows.sum((0, 2)), rows.square().sum((0, 2)), columns.shape[0] * columns.shape[-1])

    def plus(self, other: Fingerprint) -> Fingerprint:
        """Of the samples of both."""
        return Fingerprint(self.sums + other.sums, self.squares + other.squares, self.columns + other.columns)

    def numbers(self) -> Tensor:
        """``Σr / √(Bn Σr²)`` and ``log Σr²``, ``[4]``; zero where they are not finite.

        A sum may cancel: what counts is how large it is beside the largest there could be.
        """
        share = self.sums / (self.squares * self.columns).sqrt().clamp_min(TINY)
        return torch.cat([share, self.squares.clamp_min(TINY).log()]).nan_to_num(0.0, 0.0, 0.0)


def is_same_batch(numbers: Tensor | Sequence[float], others: Tensor | Sequence[float]) -> bool:
    """Whether the :meth:`~Fingerprint.numbers` of two batches, ``[4]`` each, differ by less than :data:`SAME`.

    Example:
        >>> x = torch.tensor([[[1.0, 2.0], [3.0, 5.0]]])
        >>> one, turned, other = (Fingerprint.of(t).numbers() for t in (x, x.flip(-1), 1.1 * x))
        >>> is_same_batch(one, turned), is_same_batch(one, other)
        (True, False)
    """
    pairs = zip(*(t.tolist() if isinstance(t, Tensor) else t for t in (numbers, others)), strict=True)
    return all(abs(a - b) < SAME for a, b in pairs)


@lru_cache(maxsize=32)
def _ramps(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Ones, and a line from -1 to 1, ``[2, rows]``."""
    ramp = torch.linspace(-1, 1, rows, dtype=dtype, device=device)
    return torch.stack([torch.ones_like(ramp), ramp])


class Use(NamedTuple):
    """What a matrix-shaped parameter received and got back in the passes of one step.

    Attributes:
        inputs: ``Σ hhᵀ / n``, with a last row and column for a bias; ``None`` if it was not asked for.
        errors: ``Σ δδᵀ``, up to a factor; ``None`` if it was not asked for.
        square: Mean ``z²``, ``[B]``; ``None`` if it was not asked for.
        columns: n.
    """

    inputs: Moment | None
    errors: Moment | None
    square: Tensor | None
    columns: int
