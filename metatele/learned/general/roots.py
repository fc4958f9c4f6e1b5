"""Roots of the second moments of all of a network's matrices, those of one size in one go."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metatele.learned.general.direction import Root
from metatele.learned.general.layout import Bucket, Layout
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
    for number, bucket in enumerate(layout.buckets):
        found = [moments[part] for part in bucket.parts]
        if any(m is None for m in found):
            continue
        if bucket.way == "dense":
            dense.setdefault(bucket.shape[2], []).append(number)
        else:
            roots[number] = _root_of(bucket, found, damping[bucket.rows], rank)
    for numbers in dense.values():
        mine = [layout.buckets[number] for number in numbers]
        whole = [m.dense for bucket in mine for m in (moments[part] for part in bucket.parts) if isinstance(m, Moment)]
        R = Root.of_dense(torch.cat(whole), torch.cat([damping[bucket.rows] for bucket in mine])).dense
        assert R is not None
        for number, root in zip(numbers, R.split([bucket.shape[0] for bucket in mine]), strict=True):
            roots[number] = Root(root)
    return roots


def _root_of(bucket: Bucket, found: Sequence[Moment | Tensor | None], damping: Tensor, rank: int) -> Root:
    """Of all matrices of a bucket whose moments are no dense ones."""
    if bucket.way == "diagonal":
        return Root.of_diagonal(torch.cat([m for m in found if isinstance(m, Tensor)]), damping)
    moments = [m.factored(rank) for m in found if isinstance(m, Moment)]  # one with a bias may be a row too wide
    columns = max(m.tensor.shape[-1] for m in moments)
    F = torch.cat([torch.nn.functional.pad(m.tensor, (0, columns - m.tensor.shape[-1])) for m in moments])
    rest = torch.cat([m.rest.flatten() for m in moments if m.rest is not None])
    return Root.of_factor(F, rest, damping)
