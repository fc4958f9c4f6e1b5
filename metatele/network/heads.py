r"""The heads of attention in a pass: which elements of which parameters make them, read from the graph of its outputs.

Scores ``qᵀk`` do not change if every query is multiplied by M and every key by ``M^{-T}``, and neither does what a
layer reads as ``Wₒ o`` if values, and so ``o``, are multiplied by N and ``Wₒ`` from the right by ``N⁻¹``. A **head** is
such a pair: what makes queries and what makes keys; what makes values and what reads them.

Labels are carried through the graph: each element of a parameter, and each output of a linear layer, has a number, and
views, transposes and splits are done to these numbers. A head is found where the numbers say that its queries and keys
are rows of weights, seen through nothing but views, factors and biases, used in one product and nowhere else. What was
rotated, normalised, dropped out or concatenated between is none, and neither is a weight that is used twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metatele.network import ranks
from metatele.network.labels import Bias, End, Users, constant
from metatele.network.views import Node, leaf_of, shape_out

_PRODUCTS = {  # slots of left and right factor, of an added bias, and whether the right one is turned
    "AddmmBackward0": (1, 2, 0, False),
    "MmBackward0": (0, 1, None, False),
    "LinearBackward0": (0, 1, 2, True),
}
_SCORES = {  # slots of the factors of products of activations
    "BmmBackward0": (0, 1),
    "BaddbmmBackward0": (1, 2),
}
_FUSED = "ScaledDotProduct"
_LARGEST = 2**28  # labels of one layer's outputs


class Side(NamedTuple):
    """A matrix ``[k, m]`` of a head's k units, in pieces ``[k, m_j]`` of parameters.

    Attributes:
        weights: Parameters.
        places: Numbers of their elements, for each ``[k, m_j]``.
    """

    weights: tuple[nn.Parameter, ...]
    places: tuple[Tensor, ...]

    def of(self, tensors: Mapping[int, Tensor]) -> Tensor:
        """The matrix in double precision, from tensors shaped like the parameters, by ``id``."""
        pieces = [
            tensors[id(p)].reshape(-1)[at.to(tensors[id(p)].device)]
            for p, at in zip(self.weights, self.places, strict=True)
        ]
        return torch.cat([piece.double() for piece in pieces], 1)

    def put_(self, matrix: Tensor, tensors: Mapping[int, Tensor]) -> None:
        """The inverse of :meth:`of`, into contiguous tensors."""
        widths = [at.shape[1] for at in self.places]
        for p, at, piece in zip(self.weights, self.places, matrix.split(widths, 1), strict=True):
            flat = tensors[id(p)].view(-1)
            flat[at.to(flat.device)] = piece.to(flat)


@dataclass(frozen=True, eq=False)
class Head:
    """Two sides that a change of basis leaves their product: the left by M, the right by ``M^{-T}``.

    Attributes:
        kind: ``"qk"`` or ``"vo"``.
        left: What makes queries, several where they share keys; or values.
        right: What makes keys; or what reads the values, as ``Wₒᵀ``, several where they share them.
    """

    kind: str
    left: tuple[Side, ...]
    right: tuple[Side, ...]

    @property
    def units(self) -> int:
        """K."""
        return len(self.left[0].places[0])

    @property
    def parameters(self) -> list[nn.Parameter]:
        """In it, each once."""
        return list({id(p): p for side in (*self.left, *self.right) for p in side.weights}.values())

    def is_like(self, other: Head) -> bool:
        """Whether another one, of another pass, has the same places."""
        mine, its = (*self.left, *self.right), (*other.left, *other.right)
        return (
            self.kind == other.kind
            and len(mine) == len(its)
            and all(
                len(a.weights) == len(b.weights)
                and all(p is q for p, q in zip(a.weights, b.weights, strict=True))
                and all(torch.equal(s, t) for s, t in zip(a.places, b.places, strict=True))
                for a, b in zip(mine, its, strict=True)
            )
        )


def agreed(passes: Sequence[Sequence[Head]], group: ranks.Group | None, like: Tensor) -> list[Head]:
    """The heads of several passes and ranks, if all found the same ones; else none.

    Args:
        passes: Their heads.
        group: Of ranks, all of which have to ask.
        like: On the device for messages.
    """
    first = list(passes[0]) if passes else []
    if any(len(one) != len(first) or not all(map(Head.is_like, first, one)) for one in passes):
        first = []
    if group is not None:  # sums of numbers and of their squares tell whether all are alike
        marks = [sum((n + 1) * int(s.places[0].sum()) for s in (*h.left, *h.right)) for n, h in enumerate(first)]
        mark = torch.tensor([len(first), sum(marks) % 1_000_003, 1], dtype=torch.float64, device=like.device)
        table = torch.stack([mark, mark**2])
        ranks.sum_([table], group)
        if bool((table[0] ** 2 != table[1] * table[0, 2]).any()):
            return []
    return first


class _Source(NamedTuple):
    """A linear layer of this pass.

    Attributes:
        weights: Numbers of its weight's elements ``[o, i]``, one row for each output.
        biases: Parameters that are added to its outputs and the numbers of their elements ``[o]``.
        ends: Where its outputs are used.
    """

    weight: nn.Parameter
    weights: Tensor
    biases: list[Bias]
    ends: list[End]


@torch.no_grad()
def heads_of(outputs: Iterable[Tensor], parameters: Sequence[nn.Parameter]) -> list[Head]:
    """The heads of attention in a pass.

    Args:
        outputs: Of the pass, with its graph.
        parameters: Of the model.

    Returns:
        Those that are certain, in the order of their elements in the parameters.

    Example:
        >>> model = nn.MultiheadAttention(8, 2, batch_first=True)
        >>> x = torch.randn(3, 5, 8)
        >>> [(head.kind, head.units) for head in heads_of(model(x, x, x), list(model.parameters()))]
        [('qk', 4), ('qk', 4), ('vo', 4), ('vo', 4)]
    """
    return _Finder(outputs, parameters).heads()


class _Finder:
    """One search."""

    def __init__(self, outputs: Iterable[Tensor], parameters: Sequence[nn.Parameter]) -> None:
        self.users = Users(outputs)
        self.order = {id(p): number for number, p in enumerate(parameters)}
        self.free: dict[int, Tensor] = {}  # elements of each parameter that are used once
        self.sources: list[_Source] = []
        self.readers: dict[Node, Bias] = {}
        if any(node.name() in _SCORES or node.name().startswith(_FUSED) for node in self.users.of):
            self._read(parameters)

    def _read(self, parameters: Sequence[nn.Parameter]) -> None:
        """Which elements each product uses, and what is done with its outputs."""
        leaves = {id(v): node for node in self.users.of if (v := leaf_of(node)) is not None}
        fused: dict[Node, Bias] = {}
        sums: dict[Node, Bias] = {}
        for p in parameters:
            node = leaves.get(id(p))
            if node is None or p.is_complex() or not p.is_contiguous():
                continue
            ends, _ = self.users.ends(node, 0, torch.arange(p.numel()).view(p.shape))
            count = torch.zeros(p.numel(), dtype=torch.int64)
            for end in ends:
                count += _are_in(end.labels, p.numel())
                product = None if end.node is None else _PRODUCTS.get(end.node.name())
                if end.factored or end.node is None:
                    continue
                if product is not None and end.slot == product[1] and end.labels.dim() == 2:
                    if _is_plain(end.node):
                        self.readers[end.node] = p, end.labels if product[3] else end.labels.t()
                elif product is not None and end.slot == product[2] and end.labels.dim() == 1:
                    fused[end.node] = p, end.labels
                elif end.node.name() == "AddBackward0" and end.labels.dim() == 1 and _is_plain(end.node):
                    sums[end.node] = p, end.labels
            self.free[id(p)] = count == 1
        for node, (p, places) in self.readers.items():
            shape = shape_out(node, 0)
            size, o = math.prod(shape), len(places)
            biases = [fused[node]] if node in fused else []
            biased = node.next_functions[_PRODUCTS[node.name()][2] or 0][0] is not None
            if size > _LARGEST or shape[-1] != o or (_PRODUCTS[node.name()][2] is not None and biased and not biases):
                continue
            labels = torch.arange(o, dtype=torch.int32).expand(shape)
            ends, added = self.users.ends(node, 0, labels, sums)
            if all(len(at) == o for _, at in added):
                self.sources.append(_Source(p, places, biases + added, ends))

    # --- pairs

    def heads(self) -> list[Head]:
        """See :func:`heads_of`."""
        found: list[Head] = []
        scores: dict[Node, dict[str, tuple[_Source, Tensor]]] = {}
        for source in self.sources:
            roles = [_role(end) for end in source.ends]
            if all(rows is None for _, rows in roles):
                continue
            size, ends = len(source.weights), source.ends
            seen = [end.labels if rows is None else rows for end, (_, rows) in zip(ends, roles, strict=True)]
            once = torch.stack([_are_in(labels, size) for labels in seen]).sum(0) == 1
            for end, (role, rows) in zip(ends, roles, strict=True):
                if rows is None or not bool(once[rows.long()].all()):
                    continue
                if role == "v":
                    found += self._values(source, end, rows)
                else:
                    scores.setdefault(end.node, {})[role] = source, rows
        for pair in scores.values():
            if len(pair) == 2:
                found += self._scores(*pair["q"], *pair["k"])
        return sorted(found, key=self._place)

    def _place(self, head: Head) -> tuple[int, str, int]:
        side = head.left[0]
        return self.order[id(side.weights[0])], head.kind, int(side.places[0].min())

    def _scores(self, source: _Source, rows: Tensor, other: _Source, columns: Tensor) -> Iterator[Head]:
        queries, keys = _units(rows), _units(columns)
        if queries is None or keys is None or (source is other and bool(torch.isin(rows, columns).any())):
            return
        with_keys: dict[int, set[int]] = {}
        with_queries: dict[int, set[int]] = {}
        for q, k in zip(queries.of.tolist(), keys.of.tolist(), strict=True):
            with_keys.setdefault(k, set()).add(q)
            with_queries.setdefault(q, set()).add(k)
        for k, mine in sorted(with_keys.items()):
            if any(len(with_queries[q]) > 1 for q in mine):
                continue
            sides = [self._side(source, queries.sets[q]) for q in sorted(mine)]
            key = self._side(other, keys.sets[k])
            if key is None or any(side is None for side in sides):
                continue
            yield Head("qk", tuple(s for s in sides if s is not None), (key,))

    def _values(self, source: _Source, end: End, rows: Tensor) -> Iterator[Head]:
        """Values, and who reads what a head makes of them."""
        shape = shape_out(end.node, 0)
        values = _units(rows)
        if values is None or math.prod(shape) > _LARGEST:
            return
        labels = rows.reshape(*shape[:-2], 1, shape[-1]).expand(shape)
        ends, _ = self.users.ends(end.node, 0, labels)
        reader = ends[0].node if len(ends) == 1 else None
        if reader is None or reader not in self.readers or ends[0].factored:
            return
        if ends[0].slot != _PRODUCTS[reader.name()][0]:
            return
        read = constant(ends[0].labels, (-1,))
        p, places = self.readers[reader]
        if read is None or len(read) != places.shape[1]:
            return
        for units in values.sets:
            columns = [(read == unit).nonzero()[:, 0] for unit in units]
            side = self._side(source, units)
            if side is None or len({len(c) for c in columns}) != 1 or not len(columns[0]):
                continue
            if any(not bool(self.free[id(p)][places[:, c]].all()) for c in columns):
                continue
            readers = [Side((p,), (places[:, c].t().contiguous(),)) for c in torch.stack(columns, 1)]
            yield Head("vo", (side,), tuple(readers))

    def _side(self, source: _Source, units: Tensor) -> Side | None:
        """What makes some outputs of a layer; nothing if its elements are used elsewhere too."""
        pieces = [(source.weight, source.weights[units.long()])]
        pieces += [(p, places[units.long()][:, None]) for p, places in source.biases]
        if not all(id(p) in self.free and bool(self.free[id(p)][places].all()) for p, places in pieces):
            return None
        return Side(tuple(p for p, _ in pieces), tuple(places.contiguous() for _, places in pieces))


class _Units(NamedTuple):
    """The heads among the matrices of a product.

    Attributes:
        sets: Units of each ``[h, k]``.
        of: Number of the set of each matrix ``[b]``.
    """

    sets: Tensor
    of: Tensor


def _units(rows: Tensor) -> _Units | None:
    """Sets of units of matrices ``[b, k]``, which have to be the same or to share none."""
    sets, of = torch.unique(rows, dim=0, return_inverse=True)
    flat = sets.reshape(-1)
    return None if len(flat.unique()) != len(flat) else _Units(sets, of)


def _is_plain(node: Node) -> bool:
    return all(getattr(node, f"_saved_{name}", 1) in (1, None) for name in ("alpha", "beta"))


def _are_in(labels: Tensor, size: int) -> Tensor:
    """Which numbers below a size are among labels."""
    found = torch.zeros(size, dtype=torch.bool)
    found[labels.reshape(-1).long()] = True
    return found


def _role(end: End) -> tuple[str, Tensor | None]:
    """Whether labels are queries, keys or values where they end, and those of each matrix ``[b, k]``."""
    node, slot, labels, _ = end
    if node is None:
        return "", None
    if node.name().startswith(_FUSED):
        if slot > 2 or labels.dim() != 4:
            return "", None
        times, left = divmod(shape_out(node, 0)[1], labels.shape[1])  # heads of queries that share keys and values
        return ("", None) if left else ("qkv"[slot], _per_matrix(labels.repeat_interleave(times, 1), -1))
    product = _SCORES.get(node.name())
    if product is None or slot not in product or labels.dim() != 3:
        return "", None
    if slot == product[0]:
        return "q", _per_matrix(labels, -1)
    keys, values = _per_matrix(labels, -2), _per_matrix(labels, -1)
    if keys is not None and values is not None:  # one token, or heads of one unit
        return "", None
    return ("k", keys) if keys is not None else ("v", values)


def _per_matrix(labels: Tensor, units: int) -> Tensor | None:
    """Of ``[..., n, k]`` or ``[..., k, n]``, the labels of the units ``[b, k]`` if all n have the same."""
    rows = constant(labels, (*range(labels.dim() - 2), units))
    return None if rows is None else rows.reshape(-1, rows.shape[-1])
