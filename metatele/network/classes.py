"""Classes of units that change together, and what may be done to each; from the record of a pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metatele.network.shared import shared
from metatele.network.trace import (
    ALONE,
    FIXED,
    MIXES,
    SCALES,
    SHIFTS,
    SWAPS,
    Record,
    Use,
)


class Classes(NamedTuple):
    """Classes of units that change together, and what may be done to each."""

    of: np.ndarray  # class of each unit
    flags: np.ndarray  # of each class
    scale: np.ndarray  # of each class: number of its scale variable, 0 for fixed
    sign: np.ndarray
    marks: np.ndarray  # signature of each class
    size: int
    partner: Mapping[int, set[int]]  # classes on the other side of a contraction
    sides: list[tuple[Use, int, np.ndarray]]  # every use with the classes that it writes (0) or reads (1)
    at: Mapping[int, list[int]]  # of each class, the numbers of the sides in which it is
    scratch: tuple[np.ndarray, np.ndarray]  # number in a space, -1 for none, and whether it is turned
    gain_of: np.ndarray  # of each unit, where gains are folded: which of them wrote it
    row_of: np.ndarray  # and which of its elements
    names: list[str]  # of the parameters of gains


def union(n: int, pairs: list[np.ndarray]) -> np.ndarray:
    """Numbers of the connected parts of n things that pairs ``[2, m]`` connect."""
    root = np.arange(n)
    if not pairs:
        return root
    a, b = np.concatenate(pairs, 1)
    while True:
        low, new = np.minimum(root[a], root[b]), root.copy()
        for side in (root[a], root[b]):
            np.minimum.at(new, side, low)
        while (new[new] != new).any():
            new = new[new]
        if (new == root).all():
            return np.unique(root, return_inverse=True)[1]
        root = new


def role(*numbers: int) -> np.uint64:
    """A number that stands for a role; sums of them tell sets of roles apart."""
    x = 0x9E3779B97F4A7C15
    for number in numbers:
        x = ((x ^ (number + 0x7F4A7C15)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        x ^= x >> 29
        x = (x * 0x94D049BB133111EB) & (2**64 - 1)
        x ^= x >> 32
    return np.uint64(x)


def classes_of(record: Record, folded: bool = False) -> Classes:
    """Classes of units; ``folded``, with what a norm's gains write tied to what they read, which may then be mixed."""
    n = record.count
    again, rigid = shared(record.uses)
    ties = [t.numpy() for t in record.ties] + again
    if folded:
        behind = _behind_gains(record, ties)
        ties += [np.stack([gain.units.numpy(), gain.out.numpy()]) for gain in record.gains]
    of = union(n, ties)
    # Number 0 is the class of the fixed unit.
    first = of[FIXED]
    of = np.where(of == first, 0, np.where(of < first, of + 1, of))
    count = int(of.max()) + 1
    flags = np.zeros(count, np.int64)
    flags[0] = MIXES | SCALES | SWAPS | SHIFTS | ALONE
    for units, bits in record.flags:
        flags[np.unique(of[units.numpy()])] |= bits
    flags[of[rigid]] |= SCALES
    if not folded:
        for gain in record.gains:
            flags[of[gain.units.numpy()]] |= MIXES
            flags[of[gain.out.numpy()]] |= MIXES
    marks = np.zeros(count, np.uint64)
    gain_of, row_of = np.full(n, -1), np.zeros(n, np.int64)

    def mark(units: Tensor, number: np.uint64) -> None:
        np.add.at(marks, of[units.numpy()], number)

    for units, number in record.marks:
        mark(units, role(1, number))
    for gain in record.gains:
        mark(gain.units, role(6, gain.step))
        mark(gain.out, role(7, gain.step))
    if folded:
        gain_of, row_of, odd = behind
        flags[of[odd]] |= MIXES
    for use in record.uses:
        if use.groups == -1:
            continue
        for side, units in enumerate((use.out, use.into)):
            each = len(units) // use.groups
            if use.groups == 1 or len(use.into) == use.groups:
                mark(units, role(2, use.step, side))
            else:  # units of different groups are never in the same role
                for g, part in enumerate(units.split(each)):
                    mark(part, role(2, use.step, side, g))
    none = torch.zeros(1, dtype=torch.int64)
    gains = [Use(g.name, g.step, g.rows, none, none, g.out, g.units, len(g.rows)) for g in record.gains]
    sides = [
        (use, side, of[units.numpy()])
        for use in (*record.uses, *([] if folded else gains))
        if use.groups != -1
        for side, units in enumerate((use.out, use.into))
        if len(units)
    ]
    at: dict[int, list[int]] = defaultdict(list)
    for n, (_, _, classes) in enumerate(sides):
        for c in np.unique(classes).tolist():
            at[c].append(n)
    scratch = np.full(count, -1), np.zeros(count, bool)
    scales, signs = scales_of(record, of, flags, count)
    return Classes(
        of,
        flags,
        scales,
        signs,
        marks,
        count,
        partners_of(record, of),
        sides,
        at,
        scratch,
        gain_of,
        row_of,
        [gain.name for gain in record.gains],
    )


def _behind_gains(record: Record, ties: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each unit the gain that wrote it, or what changes with it, and the gain's element; -1 for none.

    Returns:
        Both, and units for which gains do not go along with a change of basis: ``D M D⁻¹`` is no rotation, so that a
        norm or a product does not know it, and units that are added have to have the same gains.
    """
    n = record.count
    of = union(n, ties)
    number, row, wrong = np.full(n, -1), np.full(n, -1), np.zeros(n, bool)
    for which, gain in enumerate(record.gains):
        classes, rows = of[gain.out.numpy()], gain.rows.numpy()
        # A gain that is used again is the same one.
        same = next((m for m, other in enumerate(record.gains[:which]) if other.name == gain.name), which)
        wrong[classes[(number[classes] >= 0) & ((number[classes] != same) | (row[classes] != rows))]] = True
        number[classes], row[classes] = same, rows
    known = [gain.units for gain in record.gains] + [sets.reshape(-1) for sets, _, _ in record.norms]
    known += [side.reshape(-1) for c in record.contractions for side in (c.left, c.right)]
    for units in known:
        classes = of[units.numpy()]
        wrong[classes[number[classes] >= 0]] = True
    return number[of], row[of], np.nonzero(wrong[of])[0]


def scales_of(
    record: Record, of: np.ndarray, flags: np.ndarray, count: int, which: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Log-scales of classes: each is plus or minus a variable, or zero (variable 0).

    Relations ``a = b + c`` with a zero among them tie two scales together; of three that are free one is fixed: the
    product (0), or another one to find what the first choice leaves out. That loses symmetries and never makes a wrong
    one.
    """
    zero = (flags & SCALES) != 0
    triples = [of[t.numpy()] for t in record.sums]
    for c in record.contractions:
        left, right = of[c.left.numpy()], of[c.right.numpy()]
        out = np.broadcast_to(of[c.out.numpy()][:, None], left.shape)
        triples.append(np.stack([out.reshape(-1), left.reshape(-1), right.reshape(-1)]))
    relations = np.concatenate(triples, 1) if triples else np.zeros((3, 0), np.int64)
    relations = np.unique(relations, axis=1)
    parent, sign = np.arange(count), np.ones(count, np.int64)
    while True:
        # Everything in terms of its root; a cycle with the wrong sign is zero.
        parent, sign, zero = _rooted(parent, sign, zero)
        r = parent[relations]
        z = zero[r]
        free = (~z).sum(0)
        alone = free == 1
        if alone.any():
            zero[r[:, alone][~z[:, alone]]] = True
            relations = relations[:, ~alone]
            continue
        relations, r, z, free = (x[..., free > 0] for x in (relations, r, z, free))
        two = free == 2
        if two.any():
            new: dict[int, tuple[int, int]] = {}
            for column in relations[:, two].T:
                s = sign[column] * np.array([1, -1, -1])
                roots = parent[column]
                live = [i for i in range(3) if not zero[roots[i]]]
                if len(live) != 2:
                    continue
                i, j = live
                a, b = int(roots[i]), int(roots[j])
                if a == b:
                    if s[i] + s[j] != 0:
                        zero[a] = True
                elif a not in new and b not in new:
                    new[a] = (b, int(-s[i] * s[j]))
                    parent[a], sign[a] = b, int(-s[i] * s[j])
            if not new and not alone.any():
                relations = relations[:, ~two] if not two.all() else relations[:, :0]
            continue
        if relations.shape[1] == 0:
            break
        zero[r[which][~z[which]]] = True  # three are free: one is fixed
    zero[0] = True
    return np.where(zero[parent], 0, parent + 1), sign


def _rooted(parent: np.ndarray, sign: np.ndarray, zero: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    while True:
        above = parent[parent]
        if (above == parent).all():
            break
        sign = sign * np.where(parent == np.arange(len(parent)), 1, sign[parent])
        parent = above
    zero = zero.copy()
    zero[parent[zero]] = True
    return parent, sign, zero


def partners_of(record: Record, of: np.ndarray) -> dict[int, set[int]]:
    """The classes on the other side of a contraction."""
    found: dict[int, set[int]] = defaultdict(set)
    for contraction in record.contractions:
        left, right = of[contraction.left.numpy()], of[contraction.right.numpy()]
        for a, b in zip(left.reshape(-1).tolist(), right.reshape(-1).tolist(), strict=True):
            found[a].add(b)
            found[b].add(a)
    return found
