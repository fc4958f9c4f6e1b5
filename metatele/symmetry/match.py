r"""Units of one network in the order and scale of another's: weight matching, in place on tensors in double precision.

Orders are those of "Git Re-Basin" (Ainsworth, Hayase and Srinivasa, ICLR 2023): with X the weights of a space's units
``[k, m]``, one row a unit, and R those of the reference,

.. math::
    \max_P \; \langle R, P X \rangle, \qquad C = R X^T,

is a linear assignment in each space while the others stay, and spaces take turns until none changes. Rows can only be
compared in one scale. That is the balanced one, where what writes a unit has the norm of what reads it,
``s = (‖reads‖ / ‖writes‖)^½``: the scales of the least sum of squares, which depend on the function alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metatele.network.spaces import Place, Space
from metatele.symmetry.exact import Element, act_

_BALANCED = 1e-9  # largest change of a log-scale, from which scales are balanced
_SWEEPS = 500  # of balancing; chains of layers take some ten
_GAIN = 1e-12  # relative gain of an assignment that is more than rounding
_CHUNK = 1 << 22  # elements that are read at a time
Tensors = Mapping[str, Tensor]  # parameters by name, on the CPU


@torch.no_grad()
def balance_(spaces: Sequence[Space], tensors: Tensors, aims: Sequence[Tensor] | None = None) -> list[Tensor]:
    r"""Bring the units of all scale spaces to balanced scale, together, or as far from it as others are.

    The scale s of a unit makes ``s² ‖writes‖² - ‖reads‖² / s²`` what is wanted, 0 for balance. That difference is what
    gradient flow keeps.

    Args:
        spaces: Those of scales; units without a reader or a writer keep theirs.
        tensors: Moved; in double precision.
        aims: The differences ``[k]`` that are wanted, see :func:`imbalances`; those of balance if not given.

    Returns:
        The scales ``[k]`` that were applied, of each space.

    Example:
        >>> from metatele.symmetry.find import find_symmetries
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> spaces = [s for s in find_symmetries(model, torch.ones(5, 3)).spaces if s.group == "scale"]
        >>> tensors = {name: p.detach().double() for name, p in model.named_parameters()}
        >>> (scales,) = balance_(spaces, tensors)
        >>> writes = tensors["0.weight"].square().sum(1) + tensors["0.bias"].square()
        >>> torch.allclose(writes, tensors["2.weight"].square().sum(0))
        True
    """
    total = [torch.ones(space.k, dtype=torch.float64) for space in spaces]
    for _ in range(_SWEEPS):
        largest = 0.0
        for n, (space, scale) in enumerate(zip(spaces, total, strict=True)):
            s = _balancing(space, tensors, aims[n] if aims is not None else torch.zeros(space.k, dtype=torch.float64))
            largest = max(largest, float(s.log().abs().max()))
            act_(space, Element(s, 1 / s), tensors)
            scale *= s
        if largest <= _BALANCED:
            break
    return total


def imbalances(spaces: Sequence[Space], tensors: Tensors) -> list[Tensor]:
    """``‖writes‖² - ‖reads‖²`` of the units of each space ``[k]``, which gradient flow keeps.

    Args:
        spaces: Of scales.
        tensors: Parameters.
    """
    return [writes - reads for writes, reads in (_squares(space, tensors) for space in spaces)]


def _squares(space: Space, tensors: Tensors) -> Tensor:
    """Squared norms of what writes the units and of what reads them ``[2, k]``."""
    squares = torch.zeros(2, space.k, dtype=torch.float64)
    for place, at in _parts(space):
        squares[int(place.reads)] += tensors[place.name].reshape(-1)[at].square().sum(1)
    return squares


def _parts(space: Space) -> Iterator[tuple[Place, Tensor]]:
    """Places with the numbers of their elements ``[k, m]``, a part at a time: those of a vocabulary alone are many."""
    for place in space.places:
        for offsets in place.offsets.split(max(1, _CHUNK // place.base.numel())):
            yield place, place._replace(offsets=offsets).indices()


def _balancing(space: Space, tensors: Tensors, aim: Tensor) -> Tensor:
    """A step of a space's scales; the whole way where no parameter is on both sides."""
    writes, reads = _squares(space, tensors)
    both = (writes > 0) & (reads > 0)
    writes, reads, aim = torch.where(both, writes, 1.0), torch.where(both, reads, 1.0), torch.where(both, aim, 0.0)
    root = (aim.square() + 4 * writes * reads).sqrt() + aim.abs()
    square = torch.where(aim >= 0, root / (2 * writes), 2 * reads / root)  # without loss of digits
    written, read = ({place.name for place in space.places if place.reads == side} for side in (False, True))
    return square ** (0.25 if written & read else 0.5)  # else units that feed each other overshoot


class Matched(NamedTuple):
    """Orders in which units were put.

    Attributes:
        orders: ``[k]`` of each space; unit n is now what was unit ``order[n]``.
        sources: Of each tensor's elements, the numbers of those that they were, by name.
        sweeps: Over all spaces, of the start that was kept.

    Example:
        >>> Matched([torch.tensor([1, 0])], {"bias": torch.tensor([1, 0])}, 2).sources["bias"].tolist()
        [1, 0]
    """

    orders: list[Tensor]
    sources: dict[str, Tensor]
    sweeps: int


@torch.no_grad()
def match_orders_(
    spaces: Sequence[Space], tensors: Tensors, reference: Tensors, seed: int = 0, sweeps: int = 100, starts: int = 1
) -> Matched:
    """Bring the units of all permutation spaces to the order that is most like the reference's.

    One start takes spaces in the order in which they can be told: beginning with those whose other sides are inputs,
    outputs, or matched already, by these sides alone. Others begin with the order as it is, and let spaces take turns
    at random; so networks that are alike already do not become less so. Each goes on until no space changes; the best
    is kept.

    Args:
        spaces: Those of permutations.
        tensors: Moved; in double precision. Some may be buffers, which go along.
        reference: With the same names and shapes; what is not here is moved and not compared.
        seed: Of random orders.
        sweeps: At most, over all spaces.
        starts: How many from the order as it is.

    Returns:
        The orders.

    Example:
        >>> from metatele.symmetry.find import find_symmetries
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> spaces = [s for s in find_symmetries(model, torch.ones(5, 3)).spaces if s.group == "perm"]
        >>> reference = {name: p.detach().double() for name, p in model.named_parameters()}
        >>> tensors = {name: p.clone() for name, p in reference.items()}
        >>> order = torch.tensor([2, 0, 3, 1])
        >>> act_(spaces[0], Element(order, order.argsort()), tensors)
        >>> (found,) = match_orders_(spaces, tensors, reference).orders
        >>> order[found].tolist(), torch.equal(tensors["0.weight"], reference["0.weight"])
        ([0, 1, 2, 3], True)
    """
    random = torch.Generator().manual_seed(seed)
    names = {name for space in spaces for name in space.parameters}
    best, most = None, -float("inf")
    for start in range(starts + 1):
        matching = _Matching(spaces, {name: tensors[name].clone() for name in names}, reference)
        if start == 0:
            matching.anchored_()
        count = 0
        while count < sweeps and matching.sweep_(torch.randperm(len(spaces), generator=random).tolist()):
            count += 1
        if (found := matching.inner(matching.names)) > most:
            best, most = Matched(matching.orders, matching.sources, count), found
    assert best is not None
    for name, source in best.sources.items():
        tensors[name].copy_(tensors[name].reshape(-1)[source.view(-1)].view_as(tensors[name]))
    return best


def similarity(tensors: Tensors, reference: Tensors, names: Sequence[str]) -> float:
    """Cosine of the angle between two networks' parameters of some names; 0 where there are none."""
    inner = sum(float((tensors[name] * reference[name]).sum()) for name in names)
    norms = [sum(float(t[name].square().sum()) for name in names) for t in (tensors, reference)]
    return inner / (norms[0] * norms[1]) ** 0.5 if all(norms) else 0.0


class _Matching:
    """Spaces of permutations, with the orders in which their units are."""

    def __init__(self, spaces: Sequence[Space], tensors: Tensors, reference: Tensors) -> None:
        self.spaces, self.tensors, self.reference = spaces, tensors, reference
        self.orders = [torch.arange(space.k) for space in spaces]
        self.sources = {name: torch.arange(t.numel()).view_as(t) for name, t in tensors.items()}
        self.names = self.compared(tensors)

    def move_(self, n: int, order: Tensor) -> None:
        for tensors in (self.tensors, self.sources):
            act_(self.spaces[n], Element(order, order.argsort()), tensors)
        self.orders[n] = self.orders[n][order]

    def compared(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name in self.reference]

    def sweep_(self, turns: Sequence[int]) -> bool:
        """One turn of each; whether any changed."""
        changed = [self.turn_(n) for n in turns]  # each has its turn
        return any(changed)

    def turn_(self, n: int) -> bool:
        space = self.spaces[n]
        order, gain = assigned(self.cost(n))
        if not gain:
            return False
        names = self.compared(space.parameters)
        before = self.inner(names)
        self.move_(n, order)
        if self.inner(names) > before:
            return True
        self.move_(n, order.argsort())  # weights from a space to itself: the assignment knows but one of their sides
        return False

    def inner(self, names: Iterable[str]) -> float:
        return sum(float((self.tensors[name] * self.reference[name]).sum()) for name in names)

    def cost(self, n: int, known: Mapping[str, Tensor] | None = None) -> Tensor:
        """``R Xᵀ`` ``[k, k]``; of the elements alone in which no other unknown order takes part."""
        total = torch.zeros(self.spaces[n].k, self.spaces[n].k, dtype=torch.float64)
        for X, R, at, name in self.rows(n):
            total += (R if known is None else R * (known[name][at] == 1)) @ X.mT
        return total

    def rows(self, n: int) -> Iterator[tuple[Tensor, Tensor, Tensor, str]]:
        for place, at in _parts(self.spaces[n]):
            if (R := self.reference.get(place.name)) is not None:
                yield self.tensors[place.name].reshape(-1)[at], R.reshape(-1)[at], at, place.name

    def anchored_(self) -> None:
        """A turn of each space, the best known first, by what is known of it."""
        unknown = {name: torch.zeros(self.reference[name].numel(), dtype=torch.int32) for name in self.names}
        for n in range(len(self.spaces)):
            for _, _, at, name in self.rows(n):
                unknown[name][at] += 1
        left = set(range(len(self.spaces)))
        while left:
            shares = {}
            for n in sorted(left):
                parts = [(R.square(), unknown[name][at] == 1) for _, R, at, name in self.rows(n)]
                whole = sum(float(square.sum()) for square, _ in parts)
                shares[n] = sum(float(square[own].sum()) for square, own in parts) / whole if whole else 0.0
            n = max(shares, key=lambda number: shares[number])
            order, gain = assigned(self.cost(n, unknown if shares[n] else None))
            if gain:
                self.move_(n, order)
            left.remove(n)
            for _, _, at, name in self.rows(n):
                unknown[name][at] -= 1


def assigned(cost: Tensor) -> tuple[Tensor, bool]:
    """The order of the largest sum ``Σ C[n, order[n]]``, and whether it is larger than that of the order as it is.

    Args:
        cost: ``C [k, k]``: how well each unit (column) does for each place (row).

    Example:
        >>> assigned(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
        (tensor([1, 0]), True)
    """
    from scipy.optimize import linear_sum_assignment

    order = torch.from_numpy(linear_sum_assignment(cost.numpy(), maximize=True)[1])
    gain = float((cost.gather(1, order[:, None])[:, 0] - cost.diagonal()).sum())
    return order, gain > _GAIN * float(cost.abs().max())
