"""Which spaces commute and are of one kind, so that they may act at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metatele.network.spaces import Place, Space

LARGEST = 1 << 22  # elements of a place that are moved at a time


def read_by(space: Space) -> set[str]:
    """Parameters that are looked at beside those that are changed."""
    gains = {place.gain[0] for place in space.places if place.gain is not None}
    return gains | {carry.weight.name for carry in space.carries}


def bundled(
    spaces: Sequence[Space], shapes: Mapping[str, torch.Size], begins: Mapping[str, int]
) -> list[list[tuple[Space, bool, list[Place]]]]:
    """Spaces of one kind that commute, in the order of their elements; what does not commute stays in its order."""
    bundles: list[tuple[Any, list[tuple[Space, bool, list[Place]]], int]] = []
    near: dict[str, list[tuple[int, Space]]] = {}  # by parameter: who touches it, in which bundle
    lines = _Lines(shapes)
    for space in spaces:
        flip, places = _oriented(space, begins)
        kind = _kind(space, places)
        touched = read_by(space) | set(space.parameters)
        others = {id(o): (n, o) for name in touched for n, o in near.get(name, ())}
        least = max((n + 1 for n, o in others.values() if not lines.commute(space, o)), default=0)
        size = max((p.base.numel() * len(p.offsets) for p in places), default=1)
        chosen = next(
            (n for n in range(least, len(bundles)) if bundles[n][0] == kind and bundles[n][2] + size <= LARGEST), None
        )
        if chosen is None:
            chosen = len(bundles)
            bundles.append((kind, [], 0))
        bundles[chosen][1].append((space, flip, places))
        bundles[chosen] = (kind, bundles[chosen][1], bundles[chosen][2] + size)
        for name in touched:
            near.setdefault(name, []).append((chosen, space))
    for _, members, _ in bundles:
        members.sort(key=lambda member: [_start(p, begins) for p in member[2]])
    return [members for _, members, _ in bundles]


def _start(place: Place, begins: Mapping[str, int]) -> int:
    return begins[place.name] + int(place.base.numpy()[0, 0]) + int(place.offsets.numpy()[0])


def _oriented(space: Space, begins: Mapping[str, int]) -> tuple[bool, list[Place]]:
    """Places in the order of their elements; of GL the first one writes: where it reads, ``M⁻ᵀ`` stands for M."""
    places = sorted(space.places, key=lambda place: (_start(place, begins), place.reads))
    gained = any(place.gain is not None for place in places)
    flip = space.group == "GL" and bool(places) and places[0].reads and not gained
    return flip, [p._replace(reads=not p.reads) for p in places] if flip else places


def _kind(space: Space, places: list[Place]) -> Any:
    """What spaces that are stacked have in common."""

    def of(place: Place) -> Any:
        grid = place.grid()
        shape = tuple(place.base.shape), len(place.offsets)
        return place.reads, place.gain is None, shape, None if grid is None else (grid[0], tuple(grid[1]))

    carries = tuple((of(c.weight), len(c.at)) for c in space.carries)
    return space.group, space.k, space.centred, tuple(of(place) for place in places), carries


class _Lines:
    """Which spaces commute, and do not write the same elements twice."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self.shapes = shapes
        self._known: dict[int, tuple[str, frozenset[int]] | None] = {}

    def commute(self, a: Space, b: Space) -> bool:
        """Whether they do, and may act at a time."""
        if a.group == b.group == "shift":
            pairs = [(c.at.numpy(), d.at.numpy()) for c in a.carries for d in b.carries if c.name == d.name]
            if any(not np.array_equal(one, other) and np.intersect1d(one, other).size for one, other in pairs):
                return False  # their sums cannot be written row by row
        else:
            shared = set(a.parameters) & set(b.parameters) if a.carries or b.carries else set()
            if shared or read_by(a) & set(b.parameters) or read_by(b) & set(a.parameters):
                return False
        return all(self._apart(p, q) for p in a.places for q in b.places if p.name == q.name)

    def _apart(self, p: Place, q: Place) -> bool:
        one, other = self._of(p), self._of(q)
        if one is None or other is None:
            return False
        return one[0] != other[0] or one[1].isdisjoint(other[1])

    def _of(self, place: Place) -> tuple[str, frozenset[int]] | None:
        if id(place) not in self._known:
            self._known[id(place)] = self._found(place)
        return self._known[id(place)]

    def _found(self, place: Place) -> tuple[str, frozenset[int]] | None:
        """Whole rows of a parameter, or whole columns, and which; ``None`` where they are neither."""
        shape, base, offsets = self.shapes[place.name], place.base.numpy(), place.offsets.numpy()
        if base.shape[1] != 1 and len(shape) < 2:
            return "rows", frozenset((base[..., None] + offsets).reshape(-1).tolist())
        if not len(shape) or base.shape[1] != 1:
            return None
        row = shape.numel() // shape[0]
        first: NDArray[np.int64] = base[:, 0]
        if np.array_equal(offsets, np.arange(row)) and not (first % row).any():
            return "rows", frozenset((first // row).tolist())
        if len(shape) == 1:
            return "rows", frozenset((first[:, None] + offsets).reshape(-1).tolist())
        rest = row // shape[1]
        whole = (np.arange(shape[0])[:, None] * row + np.arange(rest)).reshape(-1)
        if np.array_equal(np.sort(offsets), whole) and not (first % rest).any() and first.max() < row:
            return "columns", frozenset((first // rest).tolist())
        return None
