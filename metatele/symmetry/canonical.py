r"""One point for a whole orbit: the elements that lead from any of its points to the same one.

Changes of basis, scales and phases form a group that acts linearly, and the points of an orbit where ``‖θ‖²`` is least
are one orbit of its rotations alone (Kempf and Ness 1979). So the smallest point is found first, space by space in
closed form and swept until nothing changes; what rotations are left is fixed by eigenbases, then signs, then an order.

For units written by X and read by Y, with ``A = XXᵀ`` and ``B = YYᵀ``, the least ``‖MX‖² + ‖M^{-T}Y‖²`` is at

.. math::
    M^T M = A^{-1} \# B = L^{-T} (L^T B L)^{1/2} L^{-1}, \qquad A = LL^T

and there ``M A Mᵀ = M^{-T} B M⁻¹``. Of scales that is ``s⁴ = ‖y‖² / ‖x‖²``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from metatele.errors import SingularInputError
from metatele.network.spaces import Place, Space
from metatele.symmetry.exact import Element, act_, taken
from metatele.symmetry.scales import least_scales

_CHUNK = 1 << 22  # elements that are read at a time
_WORST = 1e12  # condition of a Gram matrix, up to which its inverse is known in double precision
_CLEAR = 1e-6  # of a row's cubes: how much must have a sign
_LEAST = 1e-13  # of the largest element: a mean that is rounding
_FEW = 3  # sweeps, after which scales that are alone are solved for together
_EACH, _FARTHEST = 12, 1.95  # sweeps between two looks at how fast they converge, and the longest step
_EVEN = 1e-9  # relative difference of gains that count as one size
Do = Callable[[Space, Element], None]
_NONCOMPACT, _TURNING = ("GL", "scale", "phase"), ("O", "GL", "phase")


@dataclass(eq=False)
class Course:
    """What was done to each of some spaces, in order.

    Attributes:
        path: Spaces and the elements that acted.
        notes: What of a space was left as it was, by its number.
        sweeps: Rounds of the search for the smallest point.
        change: The largest change of the last one.
    """

    path: list[tuple[Space, Element]] = field(default_factory=list)
    notes: dict[int, str] = field(default_factory=dict)
    sweeps: int = 0
    change: float = 0.0


def inverse_of(space: Space, element: Element) -> Element:
    """The inverse, by which what the element did is undone.

    Args:
        space: Whose element it is.
        element: It.
    """
    return (
        Element(-element.value, -element.inverse) if space.group == "shift" else Element(element.inverse, element.value)
    )


def canonical_(
    spaces: Sequence[Space], tensors: Mapping[str, Tensor], sweeps: int, tolerance: float, rounding: float
) -> Course:
    """Move parameters to the canonical point of their orbit, in place.

    Args:
        spaces: Which act.
        tensors: Parameters by name, in double precision.
        sweeps: Most rounds of the search for the smallest point.
        tolerance: Largest entry of ``M - 1`` at which it ends.
        rounding: Relative difference up to which two eigenvalues or norms may be one.
    """
    course = Course()

    def do(space: Space, element: Element) -> None:
        act_(space, element, tensors)
        course.path.append((space, element))

    numbered = list(enumerate(spaces))
    folded = set()
    gains = {place.gain[0] for s in spaces for place in s.places if place.gain is not None}
    for n, space in numbered:
        if (place := gain_place(space, gains)) is not None:
            folded.add(n)
            if (element := folding(place, tensors)) is not None:
                do(space, element)
            else:
                course.notes[n] = "a gain is zero"
    shifts = [space for space in spaces if space.group == "shift"]
    for _ in shifts:  # one's bias may be what another is carried to
        count = len(course.path)
        for space in shifts:
            x = torch.cat([_flat(place, tensors) for place in space.places], 1)
            c = -x.mean(1)
            if float(c.abs().max()) > _LEAST * float(x.abs().max()):
                do(space, Element(c, -c))
        if count == len(course.path):
            break
    fixed = {n for n, space in numbered if not _even_gains(space, tensors)}
    course.notes.update(dict.fromkeys(fixed, "gains of a norm differ and cannot be moved"))
    shrinking = [(n, s) for n, s in numbered if s.group in _NONCOMPACT and n not in folded | fixed]
    _shrink(course, shrinking, tensors, do, sweeps, tolerance)
    covers = {n: o for n, s in numbered if s.group == "perm" and (o := _cover(s, numbered, fixed)) is not None}
    for n, space in numbered:
        if n in covers:
            do(space, _by_values(space, spaces[covers[n]], tensors))
    turned = []
    for n, space in numbered:
        if space.group in _TURNING and n not in fixed and not (space.group == "GL" and n in course.notes):
            element, even = _turn(space, tensors, rounding)
            if element is None:
                course.notes[n] = f"{even} of its eigenvalues are equal"
            else:
                do(space, element)
                turned.append(n)
    _sign(course, [(n, s) for n, s in numbered if s.group in _TURNING], set(turned), tensors, do)
    for n, space in numbered:
        if space.group == "perm" and (n not in covers or covers[n] not in turned):
            each = sum(place.base.shape[1] * len(place.offsets) for place in space.places)
            sizes = sum((x.square().flatten(1).sum(1).cpu() for _, x in _pieces(space, tensors)), torch.zeros(space.k))
            order = sizes.argsort(descending=True, stable=True)
            last = sizes[order]
            near = rounding / each**0.5  # what is rounded at random averages out
            if equal := int((last[:-1] - last[1:] <= near * last[:-1]).sum()):
                course.notes[n] = f"{equal} units are as large as another"
            do(space, Element(order, order.argsort()))
    return course


# --- elements of parameters


def _flat(place: Place, tensors: Mapping[str, Tensor]) -> Tensor:
    return taken(place, tensors[place.name]).clone()


def _pieces(space: Space, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Place, Tensor]]:
    """Elements by unit ``[k, b, n]`` in pieces, with the signs of gains, so that all are moved by M or ``M^{-T}``."""
    for whole in space.places:
        for offsets in whole.offsets.split(max(1, _CHUNK // whole.base.numel())):
            place = whole._replace(offsets=offsets)
            x = _flat(place, tensors)
            if place.gain is not None:
                name, rows = place.gain
                x = x * tensors[name].reshape(-1)[rows.to(x.device)].sign()[:, None]
            yield place, x.view(*place.base.shape, -1)


def _squares(space: Space, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """``Σ x²`` of each unit, written and read ``[k]``."""
    found = [torch.zeros(space.k, dtype=torch.float64), torch.zeros(space.k, dtype=torch.float64)]
    for place, x in _pieces(space, tensors):
        found[place.reads] += x.square().flatten(1).sum(1).cpu()
    return found[0], found[1]


def _grams(space: Space, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """``XXᵀ``, written and read ``[k, k]``; of phases of each pair ``[k, 2, 2]``."""
    shape = (space.k, 2, 2) if space.group == "phase" else (space.k, space.k)
    found = [torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)]
    for place, x in _pieces(space, tensors):
        X = x.unflatten(1, (-1, 2)).transpose(1, 2).flatten(2) if space.group == "phase" else x.flatten(1)
        found[place.reads] += (X @ X.mT).cpu()
    return found[0], found[1]


# --- gains of norms


def gain_place(space: Space, gains: set[str]) -> Place | None:
    """The place of a scale space that is a norm's gains and can be made one; ``None`` if there is none or more.

    Args:
        space: Which.
        gains: Names of gains.
    """
    mine = [p for p in space.places if p.name in gains and not p.reads and p.base.shape[1] == len(p.offsets) == 1]
    return mine[0] if space.group == "scale" and len(mine) == 1 else None


def folding(place: Place, tensors: Mapping[str, Tensor], signed: bool = False) -> Element | None:
    """The scales that make gains 1, or as ``signed`` would not, -1 where they are negative.

    Args:
        place: Of the gains.
        tensors: Parameters.
        signed: Whether scales may be negative.
    """
    gains = _flat(place, tensors)[:, 0].double()
    if not bool((gains != 0).all() & gains.isfinite().all()):
        return None
    gains = gains if signed else gains.abs()
    return Element(1 / gains, gains)


def _even_gains(space: Space, tensors: Mapping[str, Tensor]) -> bool:
    for place in space.places:
        if place.gain is not None:
            sizes = tensors[place.gain[0]].reshape(-1)[place.gain[1].to(tensors[place.gain[0]].device)].abs()
            if not float(sizes.max() - sizes.min()) <= _EVEN * float(sizes.max()) or not float(sizes.max()) > 0:
                return False
    return True


# --- the smallest point


def _shrink(
    course: Course,
    numbered: list[tuple[int, Space]],
    tensors: Mapping[str, Tensor],
    do: Do,
    sweeps: int,
    tolerance: float,
) -> None:
    version = dict.fromkeys(tensors, 0)
    seen: dict[int, list[int]] = {}
    power = {n: 1.0 / _uses(space) for n, space in numbered}
    partial: dict[int, str] = {}
    changes: list[float] = []
    over = 1.0
    for _ in range(sweeps):
        course.change, course.sweeps = 0.0, course.sweeps + 1
        for n, space in numbered:
            now = [version[name] for name in space.parameters]
            if n in course.notes or seen.get(n) == now:
                continue
            solved = power[n] == 1 and over == 1
            try:
                element, missing = _smaller(space, tensors, over if power[n] == 1 else power[n])
            except SingularInputError as error:
                course.notes[n] = str(error)
                continue
            change = _size(space, element)
            if change > tolerance:
                do(space, element)
                course.change = max(course.change, change)
                for name in space.parameters:
                    version[name] += 1
                now = [version[name] for name in space.parameters] if solved else []
            seen[n] = now
            if missing:
                partial[n] = f"{missing} units are not both written and read"
        if not course.change > tolerance:
            break
        changes.append(course.change)
        if course.sweeps == _FEW and (least := least_scales([space for _, space in numbered], tensors)) is not None:
            for (_, space), element in zip(numbered, least, strict=True):
                do(space, element)
            seen, changes = {}, []
        if len(changes) == _EACH:
            over, changes = _over(over, (changes[-1] / changes[-1 - _EACH // 2]) ** (2 / _EACH)), []
    course.notes.update({n: text for n, text in partial.items() if n not in course.notes})


def _over(over: float, rate: float) -> float:
    """How far steps go beyond the exact ones of each space, from how fast a sweep converges (Young 1954)."""
    if rate >= 1:
        return 1.0 + (over - 1) / 2
    if rate <= over - 1:
        return over
    coupling = (rate + over - 1) ** 2 / (rate * over**2)
    return min(2 / (1 + max(0.0, 1 - coupling) ** 0.5), _FARTHEST)


def _uses(space: Space) -> int:
    """How many places an element of a parameter is in: a step for each of them at once would go too far."""
    most = 1
    for name in {place.name for place in space.places}:
        mine = [place for place in space.places if place.name == name]
        if len(mine) > 1:
            most = max(most, int(torch.bincount(torch.cat([place.indices().reshape(-1) for place in mine])).max()))
    return most


def _smaller(space: Space, tensors: Mapping[str, Tensor], power: float) -> tuple[Element, int]:
    """What makes a space's elements smallest, to a power of it, and how many units have no such."""
    if space.group == "GL":
        P = _mean(*_grams(space, tensors))
        values, U = torch.linalg.eigh(P)
        root = values.clamp_min(torch.finfo(values.dtype).tiny) ** (power / 2)
        return Element((U * root) @ U.mT, (U / root) @ U.mT), 0
    a, b = _squares(space, tensors)
    fine = (a > 0) & (b > 0)
    s = torch.where(fine, b / a.where(fine, a.new_ones(())), 1.0) ** (power / 4)
    if space.group == "phase":
        none = torch.zeros_like(s)
        return Element(torch.stack([s, none], -1), torch.stack([1 / s, none], -1)), int((~fine).sum())
    return Element(s, 1 / s), int((~fine).sum())


def _mean(A: Tensor, B: Tensor) -> Tensor:
    r"""``A⁻¹ # B``, symmetric."""
    for moment in (A, B):
        values = torch.linalg.eigvalsh(moment)
        if not float(values[0]) * _WORST > float(values[-1]):
            raise SingularInputError("what writes or reads it has not its rank")
    L = torch.linalg.cholesky(A)
    C = L.mT @ B @ L
    values, U = torch.linalg.eigh((C + C.mT) / 2)
    R = torch.linalg.solve_triangular(L.mT, U * values.clamp_min(0) ** 0.25, upper=True)
    return R @ R.mT


def _size(space: Space, element: Element) -> float:
    if space.group == "GL":
        return float((element.value - torch.eye(space.k, dtype=torch.float64)).abs().max())
    first = element.value[:, 0] if space.group == "phase" else element.value
    return float((first - 1).abs().max())


# --- rotations, signs


def helmert(k: int) -> Tensor:
    """An orthonormal basis ``[k, k-1]`` of what is orthogonal to the vector of ones."""
    n = torch.arange(1, k, dtype=torch.float64)
    H = torch.ones(k, k - 1, dtype=torch.float64).triu()
    H[torch.arange(1, k), torch.arange(k - 1)] = -n
    return H / (n * (n + 1)).sqrt()


def _within(space: Space, R: Tensor) -> Element:
    """A rotation of the coordinates that a space leaves free."""
    if space.centred:
        H = helmert(space.k)
        R = H @ R @ H.mT + 1 / space.k
    return Element(R, R.mT.contiguous())


def _turn(space: Space, tensors: Mapping[str, Tensor], rounding: float) -> tuple[Element | None, int]:
    """The rotation to the eigenbasis, largest first; ``None`` and how many eigenvalues are equal."""
    A, B = _grams(space, tensors)
    G = A + B
    if space.centred:
        H = helmert(space.k)
        G = H.mT @ G @ H
    values, U = torch.linalg.eigh((G + G.mT) / 2)
    gaps = (values[..., 1:] - values[..., :-1]) <= rounding * values[..., -1:].clamp_min(torch.finfo(values.dtype).tiny)
    if space.group == "phase":
        v = U[..., -1]  # [k, 2], along which a pair is largest; pairs of equals stay
        v = torch.where(gaps, torch.tensor([1.0, 0.0], dtype=v.dtype), v)
        value = torch.stack([v[:, 0], -v[:, 1]], -1)
        return Element(value, value * value.new_tensor([1.0, -1.0])), 0
    if bool(gaps.any()):
        return None, int(gaps.sum()) + 1
    return _within(space, U.flip(1).mT.contiguous()), 0


def _sign(
    course: Course, numbered: list[tuple[int, Space]], turned: set[int], tensors: Mapping[str, Tensor], do: Do
) -> None:
    """Make each unit's sum of cubes positive, over those elements whose other units have their signs already."""
    open_ = {name: torch.zeros(t.numel(), dtype=torch.int16) for name, t in tensors.items()}

    def count(space: Space, by: int) -> None:
        for place in space.places:
            for offsets in place.offsets.split(max(1, _CHUNK // place.base.numel())):
                at = place._replace(offsets=offsets).indices().reshape(-1)
                open_[place.name].index_add_(0, at, torch.full_like(at, by, dtype=torch.int16))

    for _, space in numbered:
        count(space, 1)
    left = [(n, space) for n, space in numbered if n in turned]
    left.sort(key=lambda item: _TURNING.index(item[1].group))
    while left:
        rest = []
        for n, space in left:
            cubes, sizes, total = _cubes(space, tensors, open_)
            if not bool((cubes.abs() > _CLEAR * total).all() & (sizes > 0).all()):
                rest.append((n, space))
                continue
            sign = cubes.sign()
            if space.group == "phase":
                value = torch.stack([sign, torch.zeros_like(sign)], -1)
                do(space, Element(value, value))
            else:
                do(space, _within(space, sign.diag()))
            count(space, -1)
        if len(rest) == len(left):
            course.notes.update({n: "nothing tells its signs" for n, _ in rest})
            return
        left = rest


def _cubes(space: Space, tensors: Mapping[str, Tensor], open_: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of every unit ``Σ x³`` and ``Σ |x|³`` over columns that no other space may turn, and ``Σ |x|³`` over all."""
    size = space.k - space.centred
    found = [torch.zeros(size, dtype=torch.float64) for _ in range(3)]
    H = helmert(space.k) if space.centred else None
    # Of a balanced pair with opposite signs something has to be left. Which of the two counts more must not depend on
    # which reads and which writes: that may differ between heads that can be permuted.
    order = list(tensors)
    keys = sorted({(order.index(p.name), int(p.base.min())) for p in space.places})
    weights = {(order[name], at): 1 - n / (2 * len(keys)) for n, (name, at) in enumerate(keys)}
    for place, x in _pieces(space, tensors):
        free = (open_[place.name][place.indices()] == 1).view(x.shape).to(x.device)
        if space.group == "phase":
            x, free = x[:, ::2], free[:, ::2] & free[:, 1::2]
            free = free.flatten(1)
        else:
            free = free.flatten(1).all(0, keepdim=True)
        X = x.flatten(1)
        X = X if H is None else H.mT.to(X.device) @ X
        cubes = X**3 * weights[place.name, int(place.base.min())]
        for total, part in zip(found, (cubes * free, cubes.abs() * free, cubes.abs()), strict=True):
            total += part.sum(1).cpu()
    return found[0], found[1], found[2]


# --- orders


def _keys(space: Space) -> dict[tuple[str, bytes, bytes], Place]:
    return {
        (p.name, p.base.reshape(-1).sort().values.numpy().tobytes(), p.offsets.numpy().tobytes()): p
        for p in space.places
    }


def _cover(space: Space, numbered: Sequence[tuple[int, Space]], fixed: set[int]) -> int | None:
    """The space whose changes of basis hold these permutations."""
    mine = _keys(space)
    for n, other in numbered:
        if other.group in ("O", "GL") and other.k == space.k and n not in fixed and mine.keys() & _keys(other).keys():
            return n
    return None


def _by_values(space: Space, cover: Space, tensors: Mapping[str, Tensor]) -> Element:
    """An order by what a change of basis does not mix: the signs of gains."""
    theirs = _keys(cover)
    columns = [
        _flat(place, tensors).cpu().numpy().round(6)
        for key, place in _keys(space).items()
        if key not in theirs and place.base.shape[1] == len(place.offsets) == 1
    ]
    if not columns:
        return Element(torch.arange(space.k), torch.arange(space.k))
    order = torch.from_numpy(np.lexsort(np.concatenate(columns, 1).T[::-1]))
    return Element(order, order.argsort())
