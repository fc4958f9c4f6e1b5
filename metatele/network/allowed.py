"""The spaces that the record of a pass allows, from the classes of its units."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from metatele.network.classes import Classes, classes_of, role, scales_of, union
from metatele.network.spaces import Carry, Place, Space
from metatele.network.trace import ALONE, MIXES, SHIFTS, SWAPS, Record, Use


def spaces_of(record: Record) -> list[Space]:
    """The spaces that a record allows; none of them is verified yet."""
    solved = classes_of(record)
    mixing = _mixing(record, solved)
    found: list[Space] = []
    taken = np.zeros(solved.size, bool)
    for classes, group in mixing:
        space = _space(solved, classes, group)
        if space is not None:
            found.append(replace(space, centred=_is_centred(record, solved, classes)))
            taken[list(_members(classes, solved.partner))] = True
    if record.gains:  # a change of basis passes a norm's gains, if what reads them takes them into account
        folded = classes_of(record, folded=True)
        behind = np.unique(folded.of[torch.cat([gain.out for gain in record.gains]).numpy()])
        for classes, group in _mixing(record, folded):
            if np.isin(classes, behind).any() and (space := _space(folded, classes, group)) is not None:
                found.append(replace(space, centred=_is_centred(record, folded, classes)))
    known: set[tuple[tuple[int, int], ...]] = set()
    found += _scales(solved, taken, known)
    scale, sign = scales_of(record, solved.of, solved.flags, solved.size, 1)
    found += _scales(solved._replace(scale=scale, sign=sign), taken, known)
    found += _permutations(record, solved, taken)
    found += _shifts(record, solved, mixing)
    parts = partly_used(record)
    return [space for space in found if parts.isdisjoint(space.parameters)]


def partly_used(record: Record) -> set[str]:
    """Names of parameters of which the pass uses some elements, and others not.

    Another pass may use these, as a table of positions in longer sequences, and they would have to move along.
    """
    uses: dict[str, list[Use]] = defaultdict(list)
    for use in record.uses:
        if use.groups != -1:
            uses[use.name].append(use)
    found = set()
    for name, of in uses.items():
        if any(len(use.rows) * len(use.columns) * len(use.rest) == record.sizes[name] for use in of):
            continue
        seen = np.zeros(record.sizes[name], bool)
        for use in of:
            seen[(use.rows[:, None, None] + use.columns[:, None] + use.rest).reshape(-1).numpy()] = True
        if not seen.all():
            found.add(name)
    return found


def _mixing(record: Record, solved: Classes) -> list[tuple[np.ndarray, str]]:
    """Sets of classes that may be mixed, GL or O."""
    of, flags = solved.of, solved.flags
    marks = solved.marks.copy()
    rotated = np.zeros(solved.size, bool)
    for contraction in record.contractions:
        for side, units in enumerate((contraction.left, contraction.right)):
            for n, row in enumerate(units.numpy()):
                np.add.at(marks, np.unique(of[row]), role(3, contraction.step, side, n))
    for pair, step in record.averages:  # what is averaged with the same weights
        values = of[pair[1].numpy()]
        for w in pair[0].unique().tolist():
            np.add.at(marks, np.unique(values[pair[0].numpy() == w]), role(5, step, w))
    for sets, _, step in record.norms:
        rotated[np.unique(of[sets.numpy()])] = True
        np.add.at(marks, of[np.unique(sets.numpy())], role(4, step))
    allowed = (flags & MIXES) == 0
    allowed[0] = False
    rows = [of[row.numpy()] for c in record.contractions for side in (c.left, c.right) for row in side]
    even = {c: len(set(marks[row].tolist())) == 1 for row in rows for c in row.tolist()}
    found, seen = [], np.zeros(solved.size, bool)
    numbers = np.nonzero(allowed)[0]
    keys = np.stack([marks[numbers]], 1)
    _, inverse = np.unique(keys, axis=0, return_inverse=True)
    for group in range(int(inverse.max()) + 1 if len(numbers) else 0):
        classes = numbers[inverse.reshape(-1) == group]
        if len(classes) < 2 or seen[classes].any():
            continue
        members = list(_members(classes, solved.partner))
        if not allowed[members].all() or not all(even.get(c, True) for c in members):
            continue
        seen[members] = True
        free = (solved.scale[members] > 0).all()
        found.append((classes, "GL" if free and not rotated[classes].any() else "O"))
    return found


def _is_centred(record: Record, solved: Classes, classes: np.ndarray) -> bool:
    return any(centred and np.isin(solved.of[sets.numpy()], classes).any() for sets, centred, _ in record.norms)


def _members(classes: np.ndarray, partner: Mapping[int, set[int]]) -> dict[int, tuple[int, bool]]:
    """Number in a space of each class, with whether it is turned the other way (``M^{-T}``)."""
    members = {int(c): (n, False) for n, c in enumerate(classes)}
    stack = list(members)
    while stack:
        c = stack.pop()
        n, back = members[c]
        for other in partner.get(c, ()):
            if other not in members:
                members[other] = (n, not back)
                stack.append(other)
    return members


def _space(solved: Classes, classes: np.ndarray, group: str) -> Space | None:
    places = _places(solved, _members(classes, solved.partner), len(classes), group)
    return None if places is None or len(places) < 1 else Space(group, len(classes), places)


def _scales(solved: Classes, taken: np.ndarray, known: set[tuple[tuple[int, int], ...]]) -> list[Space]:
    """Scales: variables in the order of the parameters that write their units, one space for those of the same role."""
    variables: dict[int, list[int]] = defaultdict(list)
    for c in np.nonzero(solved.scale > 0)[0]:
        variables[int(solved.scale[c])].append(int(c))
    spaces: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for v, classes in variables.items():
        same = tuple((c, int(solved.sign[c] * solved.sign[classes[0]])) for c in classes)
        if all(taken[c] for c in classes) or same in known:
            continue
        known.add(same)
        signature = tuple(sorted(int(solved.marks[c]) for c in classes))
        spaces[signature].append(v)
    found = []
    for vs in spaces.values():
        members = {c: (n, bool(solved.sign[c] < 0)) for n, v in enumerate(vs) for c in variables[v]}
        places = _places(solved, members, len(vs), "scale")
        if places:
            found.append(Space("scale", len(vs), places))
    return found


def _is_bias(use: Use, side: int) -> bool:
    return side == 0 and not len(use.into) and len(use.columns) == 1 and len(use.rest) == 1 and use.groups == 1


def phases_of(space: Space) -> Space | None:
    """The same units with rotations of pairs, as of RoPE, where a scale acts on two elements of each; not verified."""
    if space.group != "scale" or any(place.base.shape[1] % 2 for place in space.places):
        return None
    return Space("phase", space.k, space.places)


def _shifts(record: Record, solved: Classes, mixing: list[tuple[np.ndarray, str]]) -> list[Space]:
    """What may be added to units: to keys, which softmax does not see; to what is read by layers with a bias."""
    found: list[Space] = []
    by_out: dict[tuple[int, int], list[Use]] = defaultdict(list)  # biases, by their units
    for use, side, _ in solved.sides:
        if _is_bias(use, side):
            by_out[int(use.out[0]), len(use.out)].append(use)

    def bias_of(classes: np.ndarray) -> tuple[Place, ...]:
        number = {int(c): n for n, c in enumerate(classes)}
        places = []
        for s in sorted({s for c in classes.tolist() for s in solved.at.get(c, ())}):
            use, side, theirs = solved.sides[s]
            if not _is_bias(use, side):
                continue
            rows = np.nonzero(np.isin(theirs, classes))[0]
            mine = np.array([number[int(c)] for c in theirs[rows]])
            if not np.array_equal(np.sort(mine), np.arange(len(classes))):
                return ()
            places.append(Place(use.name, use.rows[torch.from_numpy(rows[np.argsort(mine)])][:, None], use.rest, False))
        return tuple(places)

    seen: set[bytes] = set()
    soft, biased = (
        {int(c) for kind, units, _ in record.shifts if kind == which for c in solved.of[units.numpy()].reshape(-1)}
        for which in ("softmax", "bias")
    )
    for contraction in record.contractions:
        for out, row in zip(contraction.out.numpy(), contraction.right.numpy(), strict=True):
            classes = solved.of[row]
            if int(solved.of[out]) not in soft or not biased >= set(classes.tolist()):
                continue
            if len(set(classes.tolist())) == len(classes) and classes.tobytes() not in seen:
                seen.add(classes.tobytes())
                if len(places := bias_of(classes)) == 1:
                    found.append(Space("shift", len(classes), places))
    for classes in [classes for classes, _ in mixing] + _added(record, solved, mixing):
        places = bias_of(classes)
        if len(places) != 1 or (solved.flags[classes] & (SHIFTS | ALONE)).any():
            continue
        number, carries = {int(c): n for n, c in enumerate(classes)}, []
        for s in sorted({s for c in classes.tolist() for s in solved.at.get(c, ())}):
            use, side, theirs = solved.sides[s]
            if side == 0:
                continue
            rows = np.nonzero(np.isin(theirs, classes))[0]
            mine = np.array([number[int(c)] for c in theirs[rows]])
            inner = by_out[int(use.out[0]), len(use.out)] if len(use.out) else []
            even = np.array_equal(np.sort(mine), np.arange(len(classes)))
            if len(inner) != 1 or use.groups != 1 or len(use.rest) > 1 or not even:
                break
            base = use.columns[torch.from_numpy(rows[np.argsort(mine)])][:, None]
            carries.append(
                Carry(Place(use.name, base, use.rows, True), inner[0].name, inner[0].rows + inner[0].rest[0])
            )
        else:
            if carries:
                found.append(Space("shift", len(classes), places, tuple(carries)))
    return found + _common(record, solved)


def _added(record: Record, solved: Classes, mixing: list[tuple[np.ndarray, str]]) -> list[np.ndarray]:
    """Classes of each bias that may not be mixed, but shifted."""
    mixed = np.zeros(solved.size, bool)
    for classes, _ in mixing:
        mixed[classes] = True
    free = ((solved.flags & (SHIFTS | ALONE)) == 0) & ~mixed
    found: dict[bytes, np.ndarray] = {}
    for kind, units, _ in record.shifts:
        classes = solved.of[units.numpy()].reshape(-1)
        classes = np.unique(classes[free[classes]])
        if kind == "bias" and len(classes):
            found.setdefault(classes.tobytes(), classes)
    return list(found.values())


def _common(record: Record, solved: Classes) -> list[Space]:
    """What may be added to all units of a set at once, as before a norm that takes their mean away: by each writer."""
    found: list[Space] = []
    seen: set[bytes] = set()
    by_name: dict[str, list[tuple[Use, np.ndarray]]] = defaultdict(list)
    read = np.zeros(solved.size, bool)
    for use in record.uses:
        by_name[use.name].append((use, solved.of[use.out.numpy()]))
        read[solved.of[use.into.numpy()]] = True
    for sets in record.common:
        for row in np.unique(solved.of[sets.numpy()], axis=0):
            classes = np.unique(row)
            if len(classes) < len(row) or len(row) < 2 or classes.tobytes() in seen or read[classes].any():
                continue
            seen.add(classes.tobytes())
            if (solved.flags[classes] & SHIFTS).any():
                continue
            for uses in by_name.values():
                layouts = {tuple(x.numpy().tobytes() for x in (u.rows, u.columns, u.rest)) for u, _ in uses}
                use, theirs = uses[0]
                if len(layouts) > 1 or use.groups != 1 or not len(theirs) or not np.isin(theirs, classes).any():
                    continue
                place = _place_of_all(use, theirs, classes)
                if place is not None:
                    found.append(Space("shift", len(place.base), (place,)))
    return found


def _place_of_all(use: Use, theirs: np.ndarray, classes: np.ndarray) -> Place | None:
    """Elements by what they have in common: of each the elements of all classes."""
    rows = [use.rows[torch.from_numpy(np.nonzero(theirs == c)[0])] for c in classes]
    if len({len(r) for r in rows}) > 1 or not len(rows[0]):
        return None
    each = torch.stack(rows)
    offsets = each[:, 0] - each[0, 0]
    if not torch.equal(each, each[0] + offsets[:, None]):
        return None
    base = (each[0][:, None, None] + use.columns[:, None] + use.rest).reshape(-1, 1)
    return Place(use.name, base, offsets, False)


def _permutations(record: Record, solved: Classes, taken: np.ndarray) -> list[Space]:
    """Permutations of bundles, which are classes that are linked."""
    links = [solved.of[t.numpy()] for t in record.links]
    links += [solved.of[np.stack([gain.units.numpy(), gain.out.numpy()])] for gain in record.gains]
    for c in record.contractions:
        out = np.broadcast_to(solved.of[c.out.numpy()][:, None], c.left.shape).reshape(-1)
        links.append(np.stack([out, solved.of[c.left.numpy()].reshape(-1)]))
        links.append(np.stack([out, solved.of[c.right.numpy()].reshape(-1)]))
    bundle = union(solved.size, links)
    count = int(bundle.max()) + 1
    blocked = np.zeros(count, bool)
    blocked[bundle[(solved.flags & SWAPS) != 0]] = True
    signature = np.zeros(count, np.uint64)
    np.add.at(signature, bundle, solved.marks * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1))
    size = np.bincount(bundle, minlength=count)
    only_mixing = np.ones(count, bool)
    only_mixing[bundle[~taken]] = False
    candidates = np.nonzero(~blocked & ~only_mixing)[0]
    keys = np.stack([signature[candidates], size[candidates].astype(np.uint64)], 1)
    _, inverse = np.unique(keys, axis=0, return_inverse=True)
    order = np.argsort(bundle, kind="stable")
    starts = np.searchsorted(bundle[order], np.arange(count + 1))
    found = []
    for group in range(int(inverse.max()) + 1 if len(candidates) else 0):
        bundles = candidates[inverse.reshape(-1) == group]
        if len(bundles) < 2:
            continue
        members: dict[int, tuple[int, bool]] = {}
        for n, b in enumerate(bundles):
            for c in order[starts[b] : starts[b + 1]]:
                members[int(c)] = (n, False)
        places = _places(solved, members, len(bundles), "perm")
        statistics = _statistics(record, solved, members, len(bundles))
        if places and statistics is not None:
            found.append(Space("perm", len(bundles), places, statistics=statistics))
    return found


def _statistics(
    record: Record, solved: Classes, members: Mapping[int, tuple[int, bool]], k: int
) -> tuple[Place, ...] | None:
    """Buffers of norms that hold a number for each of some units; ``None`` where they do so unevenly."""
    found: dict[object, Place] = {}
    for use in record.statistics:
        mine = np.array([members.get(int(c), (-1, False))[0] for c in solved.of[use.out.numpy()]])
        rows = np.nonzero(mine >= 0)[0]
        if not len(rows):
            continue
        rows = rows[np.argsort(mine[rows], kind="stable")]
        counts = np.bincount(mine[rows], minlength=k)
        if (counts != counts[0]).any():
            return None
        place = Place(use.name, use.rows[torch.from_numpy(rows)].view(k, -1), use.rest, False)
        found.setdefault((use.name, place.base.numpy().tobytes()), place)
    return tuple(found.values())


def _places(solved: Classes, members: Mapping[int, tuple[int, bool]], k: int, group: str) -> tuple[Place, ...] | None:
    """Where a change of some classes acts; ``None`` if it does so unevenly."""
    number, turned = solved.scratch
    for c, (n, back) in members.items():
        number[c], turned[c] = n, back
    found: list[Place] = []
    try:
        for s in sorted({s for c in members for s in solved.at.get(c, ())}):
            use, side, classes = solved.sides[s]
            if group == "perm" and side and use.groups > 1 and len(use.into) == use.groups:
                continue  # of a depthwise convolution all is moved with its outputs
            mine = number[classes]
            at = np.nonzero(mine >= 0)[0]
            for back in (False, True):
                rows = at[turned[classes[at]] == back]
                if not len(rows):
                    continue
                rows = rows[np.argsort(mine[rows], kind="stable")]
                counts = np.bincount(mine[rows], minlength=k)
                if (counts != counts[0]).any() and group != "scale":
                    return None
                units = (use.out, use.into)[side].numpy()[rows]
                gains = np.unique(solved.gain_of[units])
                if len(gains) > 1 or (gains[0] >= 0 and (counts != 1).any()):
                    return None
                gain = None
                if gains[0] >= 0:
                    gain = solved.names[gains[0]], torch.from_numpy(solved.row_of[units])
                mine_here = _of_use(use, side, rows, counts, k)
                found += [place._replace(reads=place.reads != back, gain=gain) for place in mine_here]
    finally:
        number[list(members)] = -1
    unique: dict[object, Place] = {}
    for place in found:  # a weight used again is moved once; so is one that an orthogonal change reads and writes
        side = place.reads and group not in ("O", "perm")
        unique.setdefault((place.name, side, place.base.numpy().tobytes(), place.offsets.numpy().tobytes()), place)
    return tuple(unique.values())


def _of_use(use: Use, side: int, rows: np.ndarray, counts: np.ndarray, k: int) -> list[Place]:
    axis, other = (use.rows, use.columns) if side == 0 else (use.columns, use.rows)
    base = axis[torch.from_numpy(rows) % len(axis)] if side == 1 and use.groups > 1 else axis[torch.from_numpy(rows)]
    if side == 1 and use.groups > 1:
        # Input (g, j) is read by the outputs of its group alone.
        each_in, each_out = len(use.columns), len(use.rows) // use.groups
        group = torch.from_numpy(rows) // each_in
        base = base + use.rows[group * each_out] - use.rows[0]
        other = use.rows[:each_out]
    offsets = (other[:, None] + use.rest[None]).reshape(-1)
    if (counts == counts[0]).all():
        return [Place(use.name, base.view(k, -1), offsets, side == 1)]
    return []
