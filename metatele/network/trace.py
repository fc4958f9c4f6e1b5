r"""One real pass of a module, written down as what its parameters do to its units.

A **unit** is a number that a network makes for each sample and position: one output of a linear layer, one channel of a
convolution. Every element of every activation carries the number of its unit; views, splits and transposes are done to
these numbers as they are done to the activations, so fused or grouped layouts need no rule. What is written down:

- **uses**: a parameter's elements, which units they write and which they read;
- **ties**: units that must change together, as the two sides of a sum;
- **links**: units that go in pairs, as the factors of a product, and relations between their scales;
- what forbids more: a nonlinearity mixes no units, GELU knows their scale, and an operation that is not known here
  freezes what it touches.

Nothing found here is taken for granted: :mod:`metatele.network.spaces` makes spaces of it, and each is verified.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

FIXED = 0  # the unit of inputs, outputs, and of whatever is not understood: it never changes
MIXES, SCALES, SWAPS, SHIFTS, ALONE = 1, 2, 4, 8, 16  # what may not be done to a unit: bits of its flags


class Use(NamedTuple):
    """One use of a parameter's elements ``[o, i, rest]``: element (o, i, r) lies at ``rows[o] + columns[i] + rest[r]``.

    Attributes:
        name: Of the parameter.
        step: Number of the operation.
        rows: Places of the outputs ``[o]``.
        columns: Of the inputs ``[i]``.
        rest: Of what belongs to all of them, as the pixels of a kernel.
        out: Units that are written ``[o]``; empty where the rows are no units.
        into: Units that are read ``[i]``; the same.
        groups: Of a grouped convolution: outputs and inputs in as many blocks, each of which sees its own.
    """

    name: str
    step: int
    rows: Tensor
    columns: Tensor
    rest: Tensor
    out: Tensor
    into: Tensor
    groups: int = 1


class Gain(NamedTuple):
    """Gains of a norm, ``y = γ n (+ β)``, one for each unit.

    Attributes:
        step: Number of the operation.
        units: Of n.
        out: Of y.
        name: Of γ.
        rows: Its elements, for each unit.
    """

    step: int
    units: Tensor
    out: Tensor
    name: str
    rows: Tensor


class Contraction(NamedTuple):
    """A product of two activations over their units, as queries and keys: ``a + b = c`` of log-scales."""

    step: int
    left: Tensor
    right: Tensor
    out: Tensor


@dataclass
class Record:
    """What a pass did.

    Attributes:
        count: Units.
        flags: What may not be done to each, by unit, as lists of ``(units, bits)``.
        uses: Of parameters.
        ties: Pairs of units ``[2, n]`` that change together.
        links: Pairs ``[2, n]`` that are permuted together.
        sums: Triples ``[3, n]`` of units whose log-scales obey ``a = b + c``.
        contractions: Products over units.
        marks: ``(units, number)``: units that were in the same role of the same operation.
        norms: Sets of units ``[n, k]`` that a norm saw together, with whether it takes their mean away.
        common: Sets of units ``[n, k]`` of which a number that is added to all is taken away again.
        shifts: ``(kind, units, step)`` of units to which a constant may be added.
        averages: ``(pairs, step)`` of weights and of units that are averaged by them, as values by attention.
        gains: Of norms.
        statistics: Of norms, in buffers: they go along where their units are permuted.
        sizes: Elements of each parameter.
        unknown: Operations that are not known, and how often.
    """

    count: int = 1
    flags: list[tuple[Tensor, int]] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    ties: list[Tensor] = field(default_factory=list)
    links: list[Tensor] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    marks: list[tuple[Tensor, int]] = field(default_factory=list)
    norms: list[tuple[Tensor, bool, int]] = field(default_factory=list)
    common: list[Tensor] = field(default_factory=list)
    shifts: list[tuple[str, Tensor, int]] = field(default_factory=list)
    averages: list[tuple[Tensor, int]] = field(default_factory=list)
    gains: list[Gain] = field(default_factory=list)
    statistics: list[Use] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)


Args: TypeAlias = tuple[Any, ...]
Named: TypeAlias = dict[str, Any]
NONE = torch.zeros(0, dtype=torch.int64)
ZERO = torch.zeros(1, dtype=torch.int64)
Rule = Callable[["Tracer", Any, tuple[Any, ...], dict[str, Any], Any], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register what operations of a name do to units."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class Tracer(TorchDispatchMode):
    """Carries units beside the tensors of a pass.

    Args:
        parameters: By name; each in a storage of its own.
        buffers: The same.
    """

    def __init__(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = {p.untyped_storage()._cdata: name for name, p in parameters.items()}
        self.buffers = {b.untyped_storage()._cdata: name for name, b in buffers.items()}
        self.record = Record(sizes={name: p.numel() for name, p in parameters.items()})
        self.elements: list[tuple[int, int]] = []  # ranges of units that are single elements of parameters
        self.labels: Any = WeakTensorKeyDictionary()
        self.squares: Any = WeakTensorKeyDictionary()  # squares, which may yet be summed over their units
        self.written: dict[Any, Tensor] = {}  # units of each use, by place: a weight that is used again writes the same
        self.read: dict[Any, Tensor] = {}
        self.step = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.step += 1
        packet = func.overloadpacket.__name__
        name = packet[:-1] if packet.endswith("_") and not packet.endswith("__") else packet
        seen = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not any(self.known(t) for t in seen):
            return out  # made of constants alone
        if name not in ("mean", "sum"):
            for t in seen:
                if t in self.squares:
                    self.forbid(self.squares.pop(t), MIXES | SCALES)
        found = RULES.get(name)
        if found is None:
            self.unknown(name, seen, out)
            return out
        try:
            found(self, func, args, kwargs, out)
        except RefusedError as reason:
            self.unknown(f"{name}: {reason}", seen, out)
        if packet != name and isinstance(out, Tensor) and out in self.labels:
            self.overwritten(out)
        return out

    def overwritten(self, t: Tensor) -> None:
        """A tensor was changed in place: so was all that shares its storage."""
        storage, mine = t.untyped_storage()._cdata, None
        for other, labels in list(self.labels.items()):
            if other is t or other.untyped_storage()._cdata != storage:
                continue
            mine = places(t).reshape(-1).sort() if mine is None else mine
            theirs = places(other)
            at = torch.searchsorted(mine.values, theirs.reshape(-1)).clamp_max(len(mine.values) - 1)
            hit = (mine.values[at] == theirs.reshape(-1)).view(theirs.shape)
            new = self.labels[t].reshape(-1)[mine.indices[at]].view(theirs.shape)
            self.labels[other] = torch.where(hit, new, labels)

    # --- tensors and their units

    def parameter(self, t: Any) -> str | None:
        """The name of the parameter that a tensor is, or is a view of."""
        if not isinstance(t, Tensor) or t in self.labels:
            return None
        return self.names.get(t.untyped_storage()._cdata)

    def known(self, t: Any) -> bool:
        """Whether a tensor is made of units, or of a parameter."""
        return isinstance(t, Tensor) and (t in self.labels or self.parameter(t) is not None)

    def units(self, t: Tensor) -> Tensor:
        """The units of a tensor's elements, shaped like it; those of a parameter's are new, one for each."""
        if t in self.labels:
            return self.labels[t]
        name = self.parameter(t)
        if name is None:
            return torch.zeros((), dtype=torch.int64).expand(t.shape)
        if t.numel() > 1 << 22:
            raise RefusedError("a large parameter as an activation")
        at = places(t).reshape(-1)
        distinct, inverse = at.unique(return_inverse=True)
        key = ("elements", name, tuple(distinct[[0, -1]].tolist()), len(distinct))
        new = self.written.get(key)
        if new is None:
            new = self.written[key] = self.new(len(distinct))
            self.elements.append((int(new[0]), int(new[-1])))
            none = torch.zeros(1, dtype=torch.int64)
            empty = torch.zeros(0, dtype=torch.int64)
            self.record.uses.append(Use(name, self.step, distinct, none, none, new, empty))
        return new[inverse].view(t.shape)

    def new(self, count: int) -> Tensor:
        """New units."""
        first = self.record.count
        self.record.count += count
        return torch.arange(first, first + count)

    def put(self, t: Tensor, units: Tensor) -> None:
        """Say what the units of a tensor are."""
        self.labels[t] = units if units.shape == t.shape else units.expand(t.shape)

    def forbid(self, units: Tensor, bits: int) -> None:
        """Units to which something may not be done."""
        self.record.flags.append((distinct(units), bits))

    def mark(self, units: Tensor, number: int) -> None:
        """Units that are in the same role of the same operation."""
        self.record.marks.append((distinct(units), number))

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Units that change together, element by element."""
        self.record.ties.append(pairs(a, b))

    def link(self, a: Tensor, b: Tensor) -> None:
        """Units that are permuted together."""
        self.record.links.append(pairs(a, b))

    def keep(self, before: Tensor, after: Tensor) -> None:
        """Freeze units that are single elements of a parameter, where some of them are left out.

        Another pass may take others, as those of longer sequences: what is done to the ones has to be done to all.
        """
        units = distinct(before)
        mine = torch.zeros(len(units), dtype=torch.bool)
        for first, last in self.elements:
            mine |= (units >= first) & (units <= last)
        if bool(mine.any()) and not bool(torch.isin(units[mine], distinct(after)).all()):
            self.tie(units[mine], ZERO)

    def unknown(self, name: str, seen: list[Tensor], out: Any) -> None:
        """Freeze what an operation touches."""
        self.record.unknown[name] = self.record.unknown.get(name, 0) + 1
        everything = MIXES | SCALES | SWAPS | SHIFTS
        for t in seen:
            if t in self.labels:
                self.forbid(self.labels[t], everything)
            elif (parameter := self.parameter(t)) is not None:
                self.freeze(parameter, t)
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.put(t, torch.zeros((), dtype=torch.int64))

    def freeze(self, name: str, t: Tensor) -> None:
        """A parameter, or the part of it that a view shows, is used in a way that is not understood."""
        none, empty = torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        self.record.uses.append(Use(name, self.step, none, none, none, empty, empty, -1))

    # --- what many operations need

    def channels(self, t: Tensor, dim: int) -> Tensor:
        """The units along a dimension ``[n]``; those at different samples and positions change together."""
        labels = self.units(t).movedim(dim, -1)
        if is_constant(labels):
            return labels[(0,) * (labels.dim() - 1)]
        rows = labels.reshape(-1, labels.shape[-1])
        rows = rows if len(rows) <= 1 else torch.unique(rows, dim=0)
        for other in rows[1:]:
            self.tie(rows[0], other)
        return rows[0]


class RefusedError(Exception):
    """A case that a rule does not know."""


def distinct(units: Tensor) -> Tensor:
    """Each unit once; quickly for what was expanded."""
    for d in range(units.dim()):
        if units.stride(d) == 0 and units.shape[d] > 1:
            units = units.narrow(d, 0, 1)
    return units.reshape(-1).unique()


def pairs(a: Tensor, b: Tensor) -> Tensor:
    """Different pairs of units at the same place ``[2, n]``."""
    a, b = torch.broadcast_tensors(a, b)
    for d in range(a.dim()):
        if a.stride(d) == 0 and b.stride(d) == 0 and a.shape[d] > 1:
            a, b = a.narrow(d, 0, 1), b.narrow(d, 0, 1)
    both = torch.stack([a.reshape(-1), b.reshape(-1)])
    both = both[:, both[0] != both[1]]
    return both if both.shape[1] < 2 else torch.unique(both, dim=1)


def is_constant(labels: Tensor) -> bool:
    """Whether labels ``[..., n]`` are the same at all leading places."""
    if labels.dim() < 2 or not labels.numel():
        return labels.numel() > 0
    first = labels[(0,) * (labels.dim() - 1)]
    return all(s == 0 or n == 1 for s, n in zip(labels.stride()[:-1], labels.shape[:-1], strict=True)) or bool(
        (labels == first).all()
    )


def places(t: Tensor) -> Tensor:
    """Where a view's elements lie in its storage, shaped like it."""
    at = torch.full((), int(t.storage_offset()), dtype=torch.int64)
    for size, stride in zip(t.shape, t.stride(), strict=True):
        at = at[..., None] + torch.arange(size) * stride
    return at


def along(t: Tensor, dim: int) -> Tensor:
    """Offsets of a view's elements along one dimension."""
    return torch.arange(t.shape[dim]) * t.stride(dim)


@torch.no_grad()
def traced(model: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Record:
    """The record of one pass; the model is left as it was, but for buffers that a pass changes.

    Raises:
        Exception: Whatever the model raises.
    """
    import metatele.network.rules  # noqa: F401  (fills the table)

    buffers = dict(model.named_buffers())
    tracer = Tracer(dict(model.named_parameters()), buffers)
    attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with attention, torch.backends.mkldnn.flags(enabled=False):
            for t in tree_leaves((inputs, named)):
                if isinstance(t, Tensor):
                    tracer.put(t, torch.zeros((), dtype=torch.int64))
            with tracer:
                out = model(*inputs, **named)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    from metatele.network.graph import tensors_in

    for t in tensors_in(out):
        if tracer.known(t):
            tracer.tie(tracer.units(t), torch.zeros((), dtype=torch.int64))
    for b in buffers.values():
        if b in tracer.labels:  # a pass that is still to come may read what this one has written
            tracer.tie(tracer.labels[b], torch.zeros((), dtype=torch.int64))
    return tracer.record
