r"""Spaces: hidden units whose basis, scale, order or origin may change without changing what a network computes.

A :class:`Space` says which elements of which parameters a change acts on, and how. With M acting on k units, what
writes them becomes ``M W`` and what reads them ``W M⁻¹``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

GROUPS = ("GL", "O", "scale", "phase", "perm", "shift")


class Place(NamedTuple):
    """Elements of a parameter that belong to the k units of a space: ``[k, m]``, at ``base[k, b] + offsets[n]``.

    Attributes:
        name: Of the parameter.
        base: Where each unit's elements begin ``[k, b]``.
        offsets: From there ``[n]``; m is ``b n``.
        reads: Whether they read the units (``W M⁻¹``) or write them (``M W``).
        gain: Of a norm, whose gains γ stay: its name, and those of its elements that scale the units ``[k]``. Then the
            change is ``D M D⁻¹`` with ``D = diag(γ)``.
    """

    name: str
    base: Tensor
    offsets: Tensor
    reads: bool
    gain: tuple[str, Tensor] | None = None

    def indices(self) -> Tensor:
        """Numbers of the elements in the flattened parameter ``[k, m]``."""
        return (self.base[:, :, None] + self.offsets).flatten(1)

    def view(self, tensor: Tensor) -> Tensor | None:
        """The elements as a view ``[k, …]`` of m in the order of :meth:`indices`, where they lie on a grid.

        No number of an element is written down then: those of a matrix take twice its own memory.
        """
        grid = self.grid() if tensor.is_contiguous() else None
        if grid is None:
            return None
        units, rest, first = grid
        sizes, strides = zip(units, *rest, strict=True)
        return tensor.as_strided(sizes, strides, tensor.storage_offset() + first)

    def grid(self) -> tuple[tuple[int, int], list[tuple[int, int]], int] | None:
        """Size and stride of the units and of the rest, and the first element; ``None`` where they are on no grid."""
        base, offsets = self.base.numpy(), self.offsets.numpy()
        levels = grid_of(base[:, 0]), grid_of(base[0]), grid_of(offsets)
        if levels[0] is None or levels[1] is None or levels[2] is None or len(levels[0]) > 1:
            return None
        if base.shape[1] > 1 and bool((base - base[:, :1] != base[0] - base[0, 0]).any()):
            return None
        units = levels[0][0] if levels[0] else (1, 1)
        return units, [*levels[1], *levels[2]], int(base[0, 0]) + int(offsets[0])


def grid_of(numbers: NDArray[np.int64]) -> list[tuple[int, int]] | None:
    """Sizes and strides of numbers that lie on a grid, the last fastest; ``None`` where they do not.

    Example:
        >>> grid_of(np.array([0, 1, 2, 10, 11, 12]))
        [(2, 10), (3, 1)]
    """
    levels: list[tuple[int, int]] = []
    while len(numbers) > 1:
        steps = np.diff(numbers)
        stride = int(steps[0])
        other = steps != stride
        size = int(other.argmax()) + 1 if other.any() else len(numbers)
        if stride <= 0 or len(numbers) % size:
            return None
        rows = numbers.reshape(-1, size)
        if len(rows) > 1 and bool((rows - rows[:, :1] != rows[0] - rows[0, 0]).any()):
            return None
        levels.insert(0, (size, stride))
        numbers = rows[:, 0]
    return levels


class Carry(NamedTuple):
    """Where a shift c of k units goes: what reads them as ``W h + b`` has ``b`` lowered by ``W c``.

    Attributes:
        weight: Its elements by unit ``[k, m]``.
        name: Of the bias.
        at: Its elements that belong to the m outputs ``[m]``.
    """

    weight: Place
    name: str
    at: Tensor


@dataclass(frozen=True, eq=False)
class Space:
    """k units and the group that may act on them.

    Attributes:
        group: One of :data:`GROUPS`.
        k: Units; of permutations, the things that are permuted, each of which may be many units; of phases, pairs.
        places: Where it acts.
        carries: Of shifts: where they go.
        blocks: Of permutations: whole parameters, one for each of the k, as of the experts of a mixture.
        statistics: Of permutations: places in buffers of norms, which go along.
        centred: Of O: a norm takes the units' mean away, so that rotations keep the vector of ones.
    """

    group: str
    k: int
    places: tuple[Place, ...]
    carries: tuple[Carry, ...] = ()
    centred: bool = False
    statistics: tuple[Place, ...] = ()
    blocks: tuple[tuple[str, ...], ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of those that it changes, each once."""
        whole = [name for block in self.blocks for name in block]
        return tuple(dict.fromkeys([p.name for p in self.places] + [c.name for c in self.carries] + whole))

    @property
    def dimension(self) -> int:
        """Of the group: the number of independent small changes."""
        k = self.k - self.centred
        return {"GL": k * k, "O": k * (k - 1) // 2, "scale": k, "phase": 2 * k, "perm": 0, "shift": k}[self.group]
