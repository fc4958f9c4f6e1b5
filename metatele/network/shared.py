"""Weights that are used more than once: what their uses write and read has to change together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations, permutations

import numpy as np
import torch
from torch import Tensor

from metatele.network.trace import FIXED, Use


def shared(uses: Iterable[Use]) -> tuple[list[np.ndarray], np.ndarray]:
    """What follows for units from elements of a parameter that are used more than once.

    Where a weight is used again as it was, its units change together. Where it is used transposed, what it wrote is
    what it reads, so that ``M = M⁻ᵀ``: no scales. Where two uses share elements in another way, nothing may change.

    Args:
        uses: Of a pass.

    Returns:
        Pairs of units ``[2, n]`` that are tied, and units that may not be scaled.
    """
    layouts: dict[str, dict[object, Use]] = defaultdict(dict)
    ties: list[np.ndarray] = []
    rigid: list[Tensor] = [torch.zeros(0, dtype=torch.int64)]
    for use in uses:
        key = use.groups, use.rows.numpy().tobytes(), use.columns.numpy().tobytes(), use.rest.numpy().tobytes()
        first = layouts[use.name].setdefault(key, use)
        if first is not use and use.groups != -1:
            ties += _tie(first.out, use.out) + _tie(first.into, use.into)
    for kinds in layouts.values():
        for a, b in combinations(kinds.values(), 2):
            if -1 in (a.groups, b.groups):
                ties += _frozen(a) + _frozen(b)
            elif _overlap(a, b):
                axes = _aligned(a, b)
                if axes is None:
                    ties += _frozen(a) + _frozen(b)
                    continue
                for (x, side), (y, other) in axes:
                    ties += _tie(x, y)
                    if side != other:
                        rigid += [x, y]
    return ties, torch.cat(rigid).unique().numpy()


def _tie(a: Tensor, b: Tensor) -> list[np.ndarray]:
    """Units that are tied; to the fixed one where the other side has none."""
    if not len(a) and not len(b):
        return []
    fixed = torch.full((1,), FIXED)
    a, b = torch.broadcast_tensors(a if len(a) else fixed, b if len(b) else fixed)
    return [torch.stack([a, b]).numpy()]


def _frozen(use: Use) -> list[np.ndarray]:
    nothing = torch.zeros(0, dtype=torch.int64)
    return _tie(use.out, nothing) + _tie(use.into, nothing)


def _overlap(a: Use, b: Use) -> bool:
    def span(use: Use) -> tuple[int, int]:
        parts = (use.rows, use.columns, use.rest)
        return sum(int(p.min()) for p in parts), sum(int(p.max()) for p in parts)

    (low, high), (begin, end) = span(a), span(b)
    if low > end or begin > high:
        return False
    if max(len(u.rows) * len(u.columns) * len(u.rest) for u in (a, b)) > 1 << 22:
        return True  # perhaps

    def elements(use: Use) -> Tensor:
        return (use.rows[:, None, None] + use.columns[:, None] + use.rest).reshape(-1)

    return bool(torch.isin(elements(a), elements(b)).any())


_Axis = tuple[Tensor, int]  # units, and whether they are written (0), read (1), or none (2)


def _aligned(a: Use, b: Use) -> list[tuple[_Axis, _Axis]] | None:
    """The axes of two uses of the same elements in pairs, each in the order of the elements."""
    if a.groups != 1 or b.groups != 1:
        return None
    ours, theirs = _axes(a), _axes(b)
    if ours[0] != theirs[0]:
        return None
    for order in permutations(theirs[1]):
        if all(torch.equal(x[0], y[0]) for x, y in zip(ours[1], order, strict=True)):
            return [((x[1], x[2]), (y[1], y[2])) for x, y in zip(ours[1], order, strict=True)]
    return None


def _axes(use: Use) -> tuple[int, list[tuple[Tensor, Tensor, int]]]:
    """The first element, and of each axis its offsets in order, the units at them, and the side."""
    found, base = [], 0
    for side, (offsets, units) in enumerate(((use.rows, use.out), (use.columns, use.into), (use.rest, use.rest[:0]))):
        order = offsets.argsort()
        base += int(offsets[order[0]])
        found.append((offsets[order] - offsets[order[0]], units[order] if len(units) else units, side))
    return base, found
