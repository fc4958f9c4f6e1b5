"""Roots of the second moments of all of a network's matrices, those of one size in one go."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metatele.learned.general.direction import Root, decomposed
from metatele.learned.general.layout import Layout
from metatele.network.use import Moment


def roots_of(
    layout: Layout, moments: Sequence[Moment | Tensor | None], damping: Tensor, rank: int
) -> list[Root | None]:
    """Of each bucket; ``None`` where a moment is not known.

    Args:
        layout: Of the matrices.
        moments: Of each part's inputs.
        damping: λ of each matrix, ``[L]``.
        rank: Columns of a factor.

    Example:
        >>> import torch
        >>> layout = Layout([(1, 2, 3), (1, 4, 3)], ["dense"] * 2, [])
        >>> one, other = roots_of(layout, [Moment(torch.eye(3)[None]), None], torch.ones(2), 1)
        >>> one.dense[0, 0], other
        (tensor([0.7071, 0.0000, 0.0000]), None)
    """
    roots: list[Root | None] = [None] * len(layout.buckets)
    dense: dict[int, list[int]] = {}  # numbers of buckets by size
    factors: dict[int, list[tuple[int, Tensor, Tensor]]] = {}  # by columns
    for number, bucket in enumerate(layout.buckets):
        found = [moments[part] for part in bucket.parts]
        if any(m is None for m in found):
            continue
        if bucket.way == "dense":
            dense.setdefault(bucket.shape[2], []).append(number)
        elif bucket.way == "diagonal":
            a = torch.cat([m for m in found if isinstance(m, Tensor)])
            roots[number] = Root.of_diagonal(a, damping[bucket.rows])
        else:
            F, rest = _factor([m.factored(rank) for m in found if isinstance(m, Moment)])
            factors.setdefault(F.shape[-1], []).append((number, F, rest))
    for some in factors.values():
        values, V = decomposed(torch.cat([F.mT @ F for _, F, _ in some]))
        sizes = [len(F) for _, F, _ in some]
        for (number, F, rest), *both in zip(some, values.split(sizes), V.split(sizes), strict=True):
            roots[number] = Root.of_factor(F, rest, damping[layout.buckets[number].rows], (both[0], both[1]))
    for numbers in dense.values():
        mine = [layout.buckets[number] for number in numbers]
        whole = [m.dense for bucket in mine for m in (moments[part] for part in bucket.parts) if isinstance(m, Moment)]
        R = Root.of_dense(torch.cat(whole), torch.cat([damping[bucket.rows] for bucket in mine])).dense
        assert R is not None
        for number, root in zip(numbers, R.split([bucket.shape[0] for bucket in mine]), strict=True):
            roots[number] = Root(root)
    return roots


def _factor(moments: Sequence[Moment]) -> tuple[Tensor, Tensor]:
    """Those of a bucket side by side; one with a bias had been a row too wide for a whole matrix."""
    columns = max(m.tensor.shape[-1] for m in moments)
    F = torch.cat([torch.nn.functional.pad(m.tensor, (0, columns - m.tensor.shape[-1])) for m in moments])
    return F, torch.cat([m.rest.flatten() for m in moments if m.rest is not None])
