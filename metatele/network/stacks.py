"""Moments of many parts in one go, those of one size as one stack: on a GPU calls take the time, not numbers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from metatele.network.use import ONE_BATCH, Moment


def all_narrowed(moments: Sequence[Moment], rank: int) -> list[Moment]:
    """:meth:`Moment.narrowed` of each.

    Args:
        moments: ``[groups, k, ...]``.
        rank: Columns of a factor.

    Example:
        >>> sketches = [Moment.sketched(torch.ones(1, 4, 5), widest=2, rank=2)] * 2
        >>> [m.tensor.shape for m in all_narrowed(sketches, 2)]
        [torch.Size([1, 4, 2]), torch.Size([1, 4, 2])]
    """
    found = list(moments)
    wide = [n for n, m in enumerate(moments) if m.rest is not None and m.tensor.shape[-1] > ONE_BATCH * rank]
    chosen = [moments[n] for n in wide]
    done = _in_stacks([m.tensor.shape[1:] for m in chosen], [chosen], lambda _, stacks: stacks[0].narrowed(rank))
    for n, m in zip(wide, done, strict=True):
        found[n] = m
    return found


def all_mixed(old: Sequence[Moment], new: Sequence[Moment], shares: Sequence[float], rank: int) -> list[Moment]:
    """:meth:`Moment.mixed` of each pair.

    Args:
        old: ``[groups, k, ...]``.
        new: The same.
        shares: Of the new ones.
        rank: Columns of a factor.

    Example:
        >>> mixed = all_mixed([Moment(torch.eye(2)[None])] * 2, [Moment(torch.ones(1, 2, 2))] * 2, [0.25, 0.5], 1)
        >>> [m.tensor[0, 0].tolist() for m in mixed]
        [[1.0, 0.25], [1.0, 0.5]]
    """
    keys = [
        (m.tensor.shape[1:], m.rest is None, n.tensor.shape[1:], n.rest is None, share)
        for m, n, share in zip(old, new, shares, strict=True)
    ]
    return _in_stacks(keys, [old, new], lambda numbers, both: both[0].mixed(both[1], shares[numbers[0]], rank))


def magnitudes(moments: Sequence[Moment | Tensor]) -> list[float]:
    """Of each a number that is finite where all of it is, and a factor's squares."""
    kinds: dict[float, list[tuple[int, Tensor]]] = {2.0: [], 1.0: []}  # by the norm
    for number, m in enumerate(moments):
        if not isinstance(m, Moment):
            kinds[1.0].append((number, m))
        else:
            kinds[1.0 if m.rest is None else 2.0].append((number, m.tensor))
            if m.rest is not None:
                kinds[1.0].append((number, m.rest))
    norms = [norm for order, some in kinds.items() if some for norm in torch._foreach_norm([t for _, t in some], order)]
    found = [0.0] * len(moments)
    places = [number for some in kinds.values() for number, _ in some]
    for number, size in zip(places, torch.stack(norms).tolist() if norms else (), strict=True):
        found[number] += size
    return found


def _in_stacks(
    keys: Sequence[Hashable],
    moments: Sequence[Sequence[Moment]],
    function: Callable[[list[int], list[Moment]], Moment],
) -> list[Moment]:
    """A function of moments that are alike in stacks of those with one key."""
    sets: dict[Hashable, list[int]] = {}
    for number, key in enumerate(keys):
        sets.setdefault(key, []).append(number)
    found: dict[int, Moment] = {}
    for numbers in sets.values():
        if len(numbers) == 1:
            found[numbers[0]] = function(numbers, [each[numbers[0]] for each in moments])
            continue
        made = function(numbers, [_stack([each[n] for n in numbers]) for each in moments])
        sizes = [len(moments[0][n].tensor) for n in numbers]
        rests = [None] * len(numbers) if made.rest is None else made.rest.split(sizes)
        found |= dict(zip(numbers, map(Moment, made.tensor.split(sizes), rests), strict=True))
    return [found[number] for number in range(len(keys))]


def _stack(moments: Sequence[Moment]) -> Moment:
    rests = [m.rest for m in moments if m.rest is not None]
    return Moment(torch.cat([m.tensor for m in moments]), torch.cat(rests) if rests else None)
