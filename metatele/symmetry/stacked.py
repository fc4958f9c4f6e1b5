r"""Many spaces at a time: those of one kind and shape act together, on one vector that holds all parameters.

The weights lie one after another in a flat vector. Where the spaces of a module repeat, as heads do in a layer and
layers in a network, the elements ``[S, k, m]`` of S such spaces are one strided view of it. What would be a few
operations for each place of each space is then a few for each place of each kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metatele.network.spaces import Place, Space, grid_of
from metatele.symmetry.commuting import LARGEST, bundled, read_by
from metatele.symmetry.exact import Element, element_of
from metatele.symmetry.group import exponential

_DOUBLE = 1 << 24  # of all parameters together: more are kept in single precision, as they come


class _Spot(NamedTuple):
    """One place of S spaces in the flat vector: a strided view ``[…, k, …]`` of it, or the numbers ``[S, k, m]``."""

    lead: int  # how many sizes count the spaces
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    first: int
    numbers: Tensor | None
    reads: bool
    halves: int  # of phases: how many pairs of rows each unit has
    gain: Tensor | None  # numbers of the gains [S, k]

    @property
    def numel(self) -> int:
        return int(np.prod(self.sizes))

    def parts(self, flat: Tensor) -> Iterator[Tensor]:
        """Its elements, as views of no more than :data:`LARGEST`; one where they are copied by number."""
        if self.numbers is not None:
            yield flat[self.numbers]
            return
        view = flat.as_strided(self.sizes, self.strides, self.first)
        yield from view.split(max(1, self.sizes[-1] * LARGEST // max(self.numel, 1)), -1)

    def taken(self, part: Tensor) -> Tensor:
        """``[…, k, m]`` of such a part."""
        return part.flatten(self.lead + 1) if part.ndim > self.lead + 2 else part

    def factors(self, flat: Tensor, like: Tensor) -> Tensor | None:
        """What takes the gains of a norm into account, beside a part."""
        if self.gain is None:
            return None
        gain = flat[self.gain].double().view(*like.shape[: self.lead + 1], *[1] * (like.ndim - self.lead - 1))
        return gain if self.reads else 1 / gain


class _Carried(NamedTuple):
    """Where the shifts of S spaces go: the weights that read them, and sums over the spaces of one bias."""

    weight: _Spot
    at: Tensor  # numbers of the biases [S, m]
    targets: Tensor  # without repetition [T, m]
    sums: Tensor | None  # [T, S] of ones and zeros; None where T is S


@dataclasses.dataclass(frozen=True)
class _Bundle:
    """S spaces of one kind."""

    spaces: tuple[Space, ...]
    flipped: tuple[bool, ...]
    spots: tuple[_Spot, ...]
    carried: tuple[_Carried, ...]

    @property
    def kind(self) -> Space:
        return self.spaces[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all tangents together."""
        k = self.kind.k
        each = {"GL": (k, k), "O": (k, k), "phase": (k, 2)}.get(self.kind.group, (k,))
        return len(self.spaces), *each


class Stacked:
    r"""Spaces of continuous groups, that act together by few operations.

    Spaces that commute may be put in another order; it is that of :attr:`spaces`.

    Args:
        spaces: No permutations.
        tensors: Parameters by name, for their shapes and devices.

    Attributes:
        spaces: In the order in which they act.
        names: Of what they change, in the order of ``tensors``.

    Example:
        >>> from metatele.symmetry.find import find_symmetries
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> tensors = {name: p.detach() for name, p in model.named_parameters()}
        >>> stacked = Stacked([s for s in find_symmetries(model, torch.ones(5, 3)).spaces if s.dimension], tensors)
        >>> w = stacked.flat(tensors)
        >>> stacked.act_(w, stacked.elements(torch.full((4,), 2.0).double().log(), bound=2.0))
        >>> bool(torch.allclose(stacked.parts(w)["2.weight"], tensors["2.weight"].double() / 2))
        True
    """

    def __init__(self, spaces: Sequence[Space], tensors: Mapping[str, Tensor]) -> None:
        moved = {name for space in spaces for name in space.parameters}
        read = {name for space in spaces for name in read_by(space)} - moved
        self.names = [name for name in tensors if name in moved]
        every = [*self.names, *(name for name in tensors if name in read)]
        self._shapes = {name: tensors[name].shape for name in every}
        sizes = [tensors[name].numel() for name in every]
        self._sizes, self.moved = sizes, sum(sizes[: len(self.names)])
        self._begins = dict(zip(every, np.cumsum([0, *sizes])[:-1].tolist(), strict=True))
        like = tensors[every[0]] if every else torch.zeros(())
        self.device = like.device
        exact = sum(sizes) <= _DOUBLE or any(tensors[name].dtype != torch.float32 for name in every)
        self.dtype = torch.float64 if exact else torch.float32
        self._missing = torch.zeros((), dtype=like.dtype, device=self.device)
        self._bundles = [self._bundle(members) for members in bundled(spaces, self._shapes, self._begins)]
        # Tangents of one kind of matrix lie beside each other: their exponentials are computed together.
        kinds = {n: _family(bundle.kind) for n, bundle in enumerate(self._bundles)}
        self._families = {kind: [n for n in kinds if kinds[n] == kind] for kind in dict.fromkeys(kinds.values())}

    @property
    def spaces(self) -> list[Space]:
        """In the order in which they act."""
        return [space for bundle in self._bundles for space in bundle.spaces]

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Tensors by name as one vector, what is changed first; those that are missing are zero."""
        parts = []
        for name, shape in self._shapes.items():
            t = tensors.get(name)
            parts.append(self._missing.expand(shape.numel()) if t is None else t.reshape(-1).to(self.device))
        return torch.cat(parts).to(self.dtype) if parts else torch.zeros(0, dtype=self.dtype)

    def parts(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of such a vector: what is changed, by name."""
        split = flat[: self.moved].split(self._sizes[: len(self.names)])
        return {name: part.view(self._shapes[name]) for name, part in zip(self.names, split, strict=True)}

    def pullback(self, weights: Tensor, cotangents: Tensor) -> Tensor:
        """:func:`~metatele.symmetry.exact.pullback` of all spaces, one vector; of flat vectors."""
        found = {n: _pullback(bundle, weights, cotangents) for n, bundle in enumerate(self._bundles)}
        order = [n for members in self._families.values() for n in members]
        parts = [found[n].reshape(-1) for n in order]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=self.device)

    def elements(self, tangents: Tensor, bound: float) -> list[Element]:
        """``exp(T)`` of each kind of spaces, stacked.

        Args:
            tangents: T of all spaces, in the order of :meth:`pullback`.
            bound: Of ``‖T‖`` of each.
        """
        found: dict[int, Element] = {}
        counts = [sum(int(np.prod(self._bundles[n].shape)) for n in members) for members in self._families.values()]
        for (kind, members), T in zip(self._families.items(), tangents.split(counts), strict=True):
            shapes = [self._bundles[n].shape for n in members]
            if kind[0] == "matrix":
                stack = T.view(-1, *shapes[0][1:])
                # A Taylor series for steps as short as they are: matrix_exp asks each time how long they are.
                g = exponential(stack, bound) if bound <= 0.5 else exponential(stack)
                value, inverse = g.matrix.reshape(-1), g.inverse.reshape(-1)
            else:
                element = element_of(self._bundles[members[0]].kind, T.view(-1, 2) if kind[0] == "phase" else T)
                value, inverse = element.value.reshape(-1), element.inverse.reshape(-1)
            each = [int(np.prod(shape)) for shape in shapes]
            pairs = zip(members, shapes, value.split(each), inverse.split(each), strict=True)
            found |= {n: Element(v.view(shape), i.view(shape)) for n, shape, v, i in pairs}
        return [found[n] for n in range(len(self._bundles))]

    def stack(self, elements: Sequence[Element]) -> list[Element]:
        """Elements of :attr:`spaces`, one for each, as :meth:`act_` takes them."""
        rest, found = iter(elements), []
        for bundle in self._bundles:
            pairs = [(next(rest), flip) for flip in bundle.flipped]
            turned = [Element(e.inverse.mT, e.value.mT) if flip else e for e, flip in pairs]
            value, inverse = (torch.stack([e[n] for e in turned]).to(self.device) for n in (0, 1))
            found.append(Element(value, inverse))
        return found

    def act_(self, weights: Tensor, elements: Sequence[Element]) -> None:
        """Move a flat vector in place."""
        for bundle, element in zip(self._bundles, elements, strict=True):
            _act_(bundle, element, weights)

    def each(self, elements: Sequence[Element]) -> list[tuple[Space, Element]]:
        """Elements of the spaces, one by one."""
        pairs = []
        for bundle, element in zip(self._bundles, elements, strict=True):
            rows = zip(bundle.spaces, bundle.flipped, element.value.unbind(0), element.inverse.unbind(0), strict=True)
            pairs += [(s, Element(i.mT, v.mT) if flip else Element(v, i)) for s, flip, v, i in rows]
        return pairs

    def _bundle(self, members: list[tuple[Space, bool, list[Place]]]) -> _Bundle:
        spots = [self._spot([places[n] for _, _, places in members]) for n in range(len(members[0][2]))]
        carried = []
        for n in range(len(members[0][0].carries)):
            carries = [space.carries[n] for space, _, _ in members]
            at = np.stack([c.at.numpy() + self._begins[c.name] for c in carries])
            targets, which = np.unique(at, axis=0, return_inverse=True)
            alone = len(targets) == len(at)
            sums = torch.from_numpy((np.arange(len(targets))[:, None] == which.reshape(-1)).astype(np.float64))
            own, unlike = (torch.from_numpy(a).to(self.device) for a in (at, at if alone else targets))
            weight = self._spot([c.weight for c in carries])
            carried.append(_Carried(weight, own, unlike, None if alone else sums.to(self.device)))
        flips = tuple(flip for _, flip, _ in members)
        return _Bundle(tuple(space for space, _, _ in members), flips, tuple(spots), tuple(carried))

    def _spot(self, places: list[Place]) -> _Spot:
        first, k, gain = places[0], places[0].base.shape[0], None
        if first.gain is not None:
            numbers = [self._begins[p.gain[0]] + p.gain[1].cpu() for p in places if p.gain is not None]
            gain = torch.stack(numbers).to(self.device)
        pairs = first.base.shape[1] // 2
        grids = [place.grid() for place in places]
        starts = np.array([0 if g is None else g[2] + self._begins[p.name] for g, p in zip(grids, places, strict=True)])
        lead = grid_of(starts)
        if grids[0] is None or lead is None:
            index = torch.stack([place.indices() + self._begins[place.name] for place in places])
            return _Spot(1, tuple(index.shape), (), 0, index.to(self.device), first.reads, pairs, gain)
        sizes, strides = zip(*(lead or [(1, 1)]), grids[0][0], *(grids[0][1] or [(1, 1)]), strict=True)
        assert sizes[len(lead or [0])] == k
        return _Spot(len(lead or [0]), sizes, strides, int(starts[0]), None, first.reads, pairs, gain)


def _family(space: Space) -> tuple[str, int]:
    return ("matrix", space.k) if space.group in ("GL", "O") else (space.group, 0)


def _pieces(bundle: _Bundle, *flats: Tensor) -> Iterator[tuple[list[_Spot], list[list[Tensor]]]]:
    """Places that write, then those that read; small ones of matrix groups joined, large ones in parts.

    Of each vector the parts of its places, as they lie in it.
    """
    for reads in (False, True):
        spots = [spot for spot in bundle.spots if spot.reads == reads]
        matrix = bundle.kind.group in ("GL", "O")
        if matrix and len(spots) > 1 and sum(spot.numel for spot in spots) <= LARGEST:
            yield spots, [[next(spot.parts(flat)) for spot in spots] for flat in flats]
            continue
        for spot in spots:
            for parts in zip(*(spot.parts(flat) for flat in flats), strict=True):
                yield [spot], [[part] for part in parts]


def _joined(bundle: _Bundle, spots: list[_Spot], parts: list[Tensor]) -> Tensor:
    """``[S, k, m]`` of all places."""
    found = [spot.taken(part) for spot, part in zip(spots, parts, strict=True)]
    S, k = len(bundle.spaces), bundle.kind.k
    if len(found) > 1 and any(t.shape[:-1] != found[0].shape[:-1] for t in found):
        found = [t.reshape(S, k, -1) for t in found]
    joined = torch.cat(found, -1) if len(found) > 1 else found[0]
    return joined.reshape(S, k, -1).double()


def _gained(spots: list[_Spot], flat: Tensor, parts: list[Tensor], back: bool = False) -> list[Tensor]:
    """Parts in the coordinates in which a group acts, of a norm's gains; or back from there."""
    pairs = [(part, spot.factors(flat, part)) for spot, part in zip(spots, parts, strict=True)]
    return [t if f is None else (t.double() / f if back else t.double() * f) for t, f in pairs]


def _pullback(bundle: _Bundle, weights: Tensor, cotangents: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=weights.device)
    group, fresh = bundle.kind.group, True
    for spots, (ws, vs) in _pieces(bundle, weights, cotangents):
        reads = spots[0].reads
        V = _joined(bundle, spots, _gained(spots, weights, vs, back=True))
        if group == "shift":
            part = V.sum(-1) if V.shape[-1] > 1 else V[..., 0]
            total, fresh = part if fresh else total + part, False
            continue
        X = _joined(bundle, spots, _gained(spots, weights, ws))
        sign = -1.0 if reads else 1.0
        if group == "GL" or group == "O":
            a, b = (X, V.mT) if reads and group == "GL" else (V, X.mT)
            sign = sign if group == "GL" else 1.0
            if not fresh:
                total = torch.baddbmm(total, a, b, alpha=sign)
                continue
            part = a @ b
        elif group == "scale":
            part = (X * V).sum(-1)
        else:
            x, v = (_pairs(spots[0], t) for t in (X, V))
            turned = x[..., 0, :] * v[..., 1, :] - x[..., 1, :] * v[..., 0, :]
            part, sign = torch.stack([sign * (X * V).sum(-1), turned.flatten(2).sum(-1)], -1), 1.0
        total = torch.add(total, part, alpha=sign) if not fresh or sign < 0 else part
        fresh = False
    for carried in bundle.carried:
        W, V = _weights(bundle, carried, weights), cotangents[carried.at].double()
        part = (W @ V.unsqueeze(-1)).squeeze(-1)
        total = total - part
    if group == "O":
        total = (total - total.mT) / 2
        if bundle.kind.centred:
            k = bundle.kind.k
            centre = torch.eye(k, dtype=total.dtype, device=total.device) - 1 / k
            total = centre @ total @ centre
    return total


def _pairs(spot: _Spot, t: Tensor) -> Tensor:
    """Rows of phases ``[S, k, p, 2, n]``."""
    return t.view(*t.shape[:2], spot.halves, 2, -1)


def _weights(bundle: _Bundle, carried: _Carried, flat: Tensor) -> Tensor:
    """W of a carry ``[S, k, m]``."""
    spot = carried.weight
    whole = flat[spot.numbers] if spot.numbers is not None else flat.as_strided(spot.sizes, spot.strides, spot.first)
    return _joined(bundle, [spot], [whole])


def _act_(bundle: _Bundle, element: Element, flat: Tensor) -> None:
    group = bundle.kind.group
    for carried in bundle.carried:
        change = (element.value.unsqueeze(1) @ _weights(bundle, carried, flat)).squeeze(1)
        change = change if carried.sums is None else carried.sums @ change
        flat[carried.targets] = (flat[carried.targets] - change).to(flat.dtype)
    for spots, (parts,) in _pieces(bundle, flat):
        spot, g = spots[0], element.inverse if spots[0].reads else element.value
        if group in ("scale", "shift"):
            part = parts[0]
            g = (element.value if group == "shift" else g).view(
                *part.shape[: spot.lead + 1], *[1] * (part.ndim - spot.lead - 1)
            )
            factors = spot.factors(flat, part) if group == "shift" else None  # gains commute with scales
            g = g if factors is None else g / factors
            _ = part.mul_(g) if group == "scale" else part.add_(g)
            new = [part]
        else:
            X = _joined(bundle, spots, _gained(spots, flat, parts))
            if group == "phase":
                a, b = g.unbind(-1)
                a, b = a[..., None, None], (-b if spot.reads else b)[..., None, None]
                x, y = _pairs(spot, X).unbind(-2)
                Y = torch.stack([a * x - b * y, b * x + a * y], -2).view_as(X)
            else:
                Y = (g.mT if spot.reads else g) @ X
            sizes = [part.numel() // (X.shape[0] * X.shape[1]) for part in parts]
            split = [y.reshape(p.shape) for y, p in zip(Y.split(sizes, -1), parts, strict=True)]
            new = _gained(spots, flat, split, back=True)
            for part, y, s in zip(parts, new, spots, strict=True):
                _ = part.copy_(y) if s.numbers is None else None
        for s, y in zip(spots, new, strict=True):
            if s.numbers is not None:
                flat[s.numbers] = y.to(flat.dtype)
