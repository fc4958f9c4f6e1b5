"""What is kept of each bucket for its directions, and how often they are made anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from metatele.config import GeneralConfig
from metatele.learned.general.direction import (
    Root,
    directed_,
    drawn_,
    leading_factor,
    lengths_of,
    odds_of,
    polar_factor,
)
from metatele.learned.general.layout import Bucket
from metatele.network.use import TINY

_SMALL = 3  # times a call's overhead, up to which a bucket's directions are made together with others'


@dataclass
class Kept:
    """Of a bucket.

    Attributes:
        root: Of the inputs' moments.
        factor: P of the last polar factor, ``[m, k, k]``, with the share of X that is not drawn to msign in it; of a
            ``leading`` one F and, as last column, c of ``P = c - FFᵀ``.
        leading: Whether P treats the largest directions alone one by one, and all others alike.
        exact: Whether msign is made anew for each direction.
        every: Steps that a direction is kept for.
        renew: Steps that a polar factor is.
        due: Age at which it is made anew.
        spectral: Share that is drawn to msign, ``[m, 1, 1]``.
        through: What root and factor are together, made where one of them is new and the root is no whole matrix: of a
            wide one ``RᵀR``, of a tall one ``RᵀPR``.
    """

    root: Root | None = None
    factor: Tensor | None = None
    leading: bool = False
    exact: bool = True
    every: int = 1
    renew: int = 1
    due: int = 0
    spectral: Tensor | None = None
    through: Root | Tensor | None = None

    def plan(self, config: GeneralConfig, bucket: Bucket, columns: int) -> None:
        """How often a bucket's directions are made anew, by what they cost beside a pass.

        Args:
            config: Settings.
            bucket: Whose.
            columns: Samples times positions of a pass.
        """
        c, (_, o, i) = config, bucket.shape
        k, wide = min(o, i), max(o, i)
        room = c.share * (6 * columns * o * i + c.overhead)
        turn = 0 if self.root is None else 2 * self.root.products(o, i)
        exact = c.orthogonal * (4 * k * k * wide + 2 * k**3) + turn
        self.exact = exact <= c.stale * room
        self.every = 1 if exact <= room or (not self.exact and 2 * k * o * i + turn <= room) else c.stale
        factor = 2 * k * k * wide + c.orthogonal * 8 * k**3
        self.lead(c, bucket)
        if self.leading:
            factor = 6 * (2 * k * k * wide + 16 * c.rank * k * k)  # thin products are slow
        self.renew = 1 if self.exact else min(max(c.hold, math.ceil(4 * factor / room)), 100)

    def lead(self, config: GeneralConfig, bucket: Bucket) -> None:
        """Tell whether the next polar factor is a leading one."""
        k = min(bucket.shape[1:])
        wide = 0 < config.leading <= k and k > 4 * config.rank  # else such a factor would be no smaller
        self.leading = wide and not self.exact and self._vectors is not None

    def is_settled(self, age: int) -> bool:
        """Whether a direction at that age only reads what is kept."""
        if self.exact:
            return True
        if self.factor is None or age >= self.due:
            return False
        plain = self.root is None or (self.root.dense is not None and self.factor.shape[-1] == self.factor.shape[-2])
        return plain or self.through is not None

    def tensors(self) -> list[Tensor]:
        """All that a direction then reads."""
        through = self.through.tensors() if isinstance(self.through, Root) else [self.through]
        root = [] if self.root is None else self.root.tensors()
        return [t for t in (self.spectral, self.factor, *through, *root) if t is not None]

    @property
    def _vectors(self) -> Tensor | None:
        return None if self.root is None else self.root.vectors

    def direction(self, X: Tensor, age: int, iterations: int) -> Tensor:
        """A positive multiple of D of a momentum X ``[m, o, i]``, which is overwritten where msign is made anew."""
        spectral = self.spectral
        assert spectral is not None
        if self.exact:
            root = None if self.root is None else self.root.over_rest
            return directed_(X, root, odds_of(spectral), iterations)
        wide = X.shape[1] <= X.shape[2]
        if self.factor is None or age >= self.due:
            self.due = age + min(self.renew, max(age, 1))
            turned = X if self.root is None else self.root.right(X)
            gram = torch.bmm(turned, turned.mT) if wide else torch.bmm(turned.mT, turned)
            size = (gram.diagonal(dim1=-2, dim2=-1).sum(-1)).clamp_min(TINY).sqrt()[:, None, None]
            a, b = spectral / min(X.shape[1:]) ** 0.5, (1 - spectral) / size
            vectors = self._vectors
            if self.leading and vectors is not None:
                F, c = leading_factor(gram, torch.bmm(turned, vectors) if wide else vectors)
                self.factor = torch.cat([F * a.sqrt(), (a * c + b).expand(-1, F.shape[1], 1)], -1)
            else:
                self.factor = polar_factor(gram, iterations).mul_(a)
                self.factor.diagonal(dim1=-2, dim2=-1).add_(b[..., 0])
            self.through = None
        if self.factor.shape[-1] != self.factor.shape[-2]:
            return self._led(X, wide)
        if self.root is None:
            return torch.bmm(self.factor, X) if wide else torch.bmm(X, self.factor)
        if self.root.dense is not None:  # what is small needs no more memory for less work
            turned = self.root.right(X)
            return self.root.back(torch.bmm(self.factor, turned) if wide else torch.bmm(turned, self.factor))
        if self.through is None:
            self.through = self.root.squared() if wide else self.root.around(self.factor)
        if isinstance(self.through, Root):
            return torch.bmm(self.factor, self.through.right(X))
        return torch.bmm(X, self.through)

    def _led(self, X: Tensor, wide: bool) -> Tensor:
        """The same with a leading factor."""
        assert self.factor is not None
        assert self.root is not None
        F, c = self.factor[..., :-1], self.factor[:, :1, -1:]
        if self.through is None:
            S = self.root.squared()
            if not wide:  # RᵀPR has few directions too
                K = self.root.right(F.mT).mT
                S = S.joined(K, c)
            self.through = S
        assert isinstance(self.through, Root)
        Y = self.through.right(X)
        return torch.baddbmm(c * Y, F, torch.bmm(F.mT, Y), alpha=-1) if wide else Y


class Together:
    """Buckets whose directions are made in one go, padded by zeros to one shape.

    On small networks calls take the time, not numbers. Zeros stay zeros in every product, and change no norm.

    Args:
        buckets: Each with what is kept of it, and where its change lies.
        iterations: Of Newton and Schulz.
    """

    def __init__(self, buckets: Sequence[tuple[Bucket, Kept, Tensor]], iterations: int) -> None:
        self.iterations, self._homes = iterations, [home for _, _, home in buckets]
        self.odds = odds_of(torch.cat([kept.spectral for _, kept, _ in buckets if kept.spectral is not None]))
        rows = [bucket.rows for bucket, _, _ in buckets]
        self._index: slice | Tensor = slice(rows[0].start, rows[-1].stop)
        if any(one.stop != other.start for one, other in pairwise(rows)):
            places = [number for row in rows for number in range(row.start, row.stop)]
            self._index = torch.tensor(places, device=self.odds.device)
        root = buckets[0][1].root
        self._root = None if root is None else root.over_rest
        if len(buckets) == 1:
            return
        o, i = (max(bucket.shape[axis] for bucket, _, _ in buckets) for axis in (1, 2))
        m = len(self.odds)
        like = self._homes[0]
        self._given, self._made, R = like.new_zeros(m, o, i), like.new_empty(m, o, i), like.new_zeros(m, i, i)
        self._into, self._from, begin = [], [], 0
        for bucket, kept, _ in buckets:
            n, o, i = bucket.shape
            self._into.append(self._given[begin : begin + n, :o, :i])
            self._from.append(self._made[begin : begin + n, :o, :i])
            assert kept.root is not None
            assert kept.root.dense is not None
            R[begin : begin + n, :i, :i] = kept.root.dense
            begin += n
        self._root = Root(R)

    @property
    def homes(self) -> list[int]:
        """Addresses of the changes."""
        return [home.data_ptr() for home in self._homes]

    def tensors(self) -> list[Tensor]:
        """What a step reads."""
        return [self.odds, *(() if self._root is None else self._root.tensors())]

    def step(self, lengths: Tensor) -> None:
        """Make directions of what lies where the changes will, and of them changes.

        Args:
            lengths: Of the changes of all matrices, ``[L, 1, 1]``.
        """
        if len(self._homes) == 1:
            made = directed_(self._homes[0], self._root, self.odds, self.iterations)
        else:
            torch._foreach_copy_(self._into, self._homes)
            assert self._root is not None
            assert self._root.dense is not None
            turned = drawn_(self._root.right(self._given), self.odds, self.iterations)
            made = torch.bmm(turned, self._root.dense, out=self._made)
        made.mul_((lengths[self._index] / lengths_of(made)).neg_())
        if len(self._homes) > 1:
            torch._foreach_copy_(self._homes, self._from)


def grouped(
    config: GeneralConfig, buckets: Sequence[Bucket], kept: Sequence[Kept], homes: Sequence[Tensor]
) -> tuple[list[Together], list[int]]:
    """Buckets that are stepped in one go, and numbers of the others.

    Args:
        config: Settings.
        buckets: All.
        kept: Of each.
        homes: Where the change of each lies.
    """
    alone = [n for n, one in enumerate(kept) if not one.exact or one.every > 1]
    sets: list[list[int]] = []
    smalls: set[int] = set()
    work = [_operations(config, [bucket]) for bucket in buckets]
    for n in sorted(set(range(len(kept))) - set(alone), key=lambda n: (-work[n], n)):
        root = kept[n].root
        small = root is not None and root.dense is not None and work[n] <= _SMALL * config.overhead
        for mine in sets if small else ():
            # Padding may cost what a call of its own does.
            padded = _operations(config, [buckets[k] for k in (*mine, n)])
            if mine[0] in smalls and padded <= sum(work[k] for k in (*mine, n)) + config.overhead * len(mine):
                mine.append(n)
                break
        else:
            sets.append([n])
            smalls |= {n} if small else set()
    found = [[(buckets[n], kept[n], homes[n]) for n in sorted(mine)] for mine in sets]
    return [Together(mine, config.orthogonal) for mine in found], alone


def _operations(config: GeneralConfig, buckets: Sequence[Bucket]) -> int:
    """Of directions made in one go."""
    m, (o, i) = sum(b.shape[0] for b in buckets), (max(b.shape[axis] for b in buckets) for axis in (1, 2))
    k, wide = min(o, i), max(o, i)
    return m * (config.orthogonal * (4 * k * k * wide + 2 * k**3) + 4 * o * i * i)
