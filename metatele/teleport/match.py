"""A network's units in the order and scale of another network's."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metatele.errors import ConfigError, NotExactError, ShapeMismatchError, UnsupportedModelError
from metatele.network import ranks
from metatele.network.graph import tensors_in
from metatele.network.spaces import Space
from metatele.network.unwrap import unwrapped
from metatele.symmetry.find import Symmetries, find_symmetries
from metatele.symmetry.match import balance_, imbalances, match_orders_, similarity

_SAME = 1e-6  # relative change of a scale that is none
_ROUNDING = 1e4  # times that of the coarsest parameter: how far outputs may change
_WORDS = {"perm": "order", "scale": "scale"}


class MatchRow(NamedTuple):
    """A space.

    Attributes:
        kind: ``"perm"`` or ``"scale"``.
        units: k.
        moved: How many of them were: put elsewhere, or scaled.
        parameters: Names of those that it belongs to.
    """

    kind: str
    units: int
    moved: int
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class MatchReport:
    """What :func:`match_` did; prints as a table.

    Attributes:
        rows: Of the spaces that it uses.
        similarity: Cosine between the two networks' parameters that are in them, before and after; 1 if they are the
            same.
        drift: Relative change of the outputs.
        sweeps: That changed something, after the first turn of each space.
        left: How many spaces of other groups were found, which stay as they are.

    Example:
        >>> rows = (MatchRow("perm", 64, 63, ("0.weight", "0.bias", "2.weight")),)
        >>> print(MatchReport(rows, (0.02, 0.41), 1e-7, 4, {"GL": 2}))
        what   units  moved  parameters
        order  64     63     0.weight, 0.bias, 2.weight
        similarity 0.0200 before, 0.4100 after; outputs changed by 1.0e-07
        left as they are: 2 GL
    """

    rows: tuple[MatchRow, ...]
    similarity: tuple[float, float]
    drift: float
    sweeps: int
    left: Mapping[str, int]

    @property
    def moved(self) -> int:
        """Units that were put elsewhere."""
        return sum(row.moved for row in self.rows if row.kind == "perm")

    def __str__(self) -> str:
        if not self.rows:
            return "no units were found whose order or scale may be changed"
        cells = [("what", "units", "moved", "parameters")]
        for row in self.rows:
            names = ", ".join(row.parameters[:3]) + (", ..." if len(row.parameters) > 3 else "")
            cells.append((_WORDS[row.kind], str(row.units), str(row.moved), names))
        widths = [max(len(line[column]) for line in cells) for column in range(4)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        before, after = self.similarity
        lines.append(f"similarity {before:.4f} before, {after:.4f} after; outputs changed by {self.drift:.1e}")
        if self.left:
            lines.append(f"left as they are: {', '.join(f'{count} {group}' for group, count in self.left.items())}")
        return "\n".join(lines)

    __repr__ = __str__


@torch.no_grad()
def match_(
    model: nn.Module,
    reference: nn.Module,
    inputs: Any,
    found: Symmetries | None = None,
    seed: int = 0,
    sweeps: int = 100,
    starts: int = 1,
    scales: bool = True,
    **named: Any,
) -> MatchReport:
    r"""Put the units of a network in the order of another's; what it computes stays the same.

    Two networks that were trained apart have the same features in different places, so that the mean of their weights
    computes nothing. With X the weights of a space's units ``[k, m]`` and R the reference's, the order is

    .. math::
        \arg\max_P \; \langle R, P X \rangle

    for one space after another until none changes ("Git Re-Basin", Ainsworth et al., ICLR 2023), hidden units,
    channels, residual streams and attention heads alike. Both are compared as they are, and in balanced scale, where
    what writes a unit has the norm of what reads it. Then ``‖writes‖² - ‖reads‖²`` of each unit, which gradient flow
    keeps, is made the reference's, and the more similar of the two stays; the model as it was, if it is the most
    similar. A copy of the reference with its units in another order and scale comes back to the reference.

    Running statistics of norms go along with their channels. Bases (GL, O), phases and shifts are left as they are:
    heads are compared in the bases that they have, see :func:`metatele.balance_heads_`. Scales of parameters in half
    precision stay, where they would be rounded. Averages and memories of an optimizer do not go along.

    Args:
        model: Moved, in place and in its dtype, parameters without gradients too.
        reference: Of the same architecture; not changed.
        inputs: Of a pass: a tensor, or a tuple of all positional arguments; at least two samples if there is batch
            norm.
        found: What :func:`find_symmetries` found in the model, which is else done here.
        seed: Of the order in which spaces take turns.
        sweeps: At most, over all spaces.
        starts: How often turns are taken from the order as it is; the best counts.
        scales: Whether scales are matched too.
        **named: Further arguments of the pass.

    Returns:
        How many units moved, and how alike the two are.

    Raises:
        ShapeMismatchError: Their parameters differ in name or shape.
        ConfigError: Weights are not finite, or a setting is out of range.
        NotExactError: Outputs changed by more than rounding. The model is as it was.

    Example:
        >>> make = lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = torch.manual_seed(0)
        >>> model, reference, x = make(), make(), torch.randn(5, 3)
        >>> before = model(x)
        >>> print(match_(model, reference, x))
        what   units  moved  parameters
        ...
        >>> torch.allclose(model(x), before, atol=1e-6)
        True
    """
    model, reference = unwrapped(model), unwrapped(reference)
    _check(model, reference, sweeps, starts)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    own = dict(model.named_parameters())
    spaces = (found if found is not None else find_symmetries(model, inputs, **named)).spaces
    if unknown := [name for space in spaces for name in space.parameters if name not in own]:
        raise ConfigError(f"found is of another model: there is no parameter {unknown[0]}")
    permuted = [_with_statistics(space) for space in spaces if space.group == "perm"]
    half = {name for name, p in own.items() if p.dtype not in (torch.float32, torch.float64)}
    scaled = [space for space in spaces if space.group == "scale" and scales and not half & set(space.parameters)]
    left: dict[str, int] = {}
    for space in spaces:
        if space.group not in ("perm", "scale") or (space.group == "scale" and space not in scaled):
            left[space.group] = left.get(space.group, 0) + 1

    start = _doubles(model, permuted + scaled)
    theirs = {name: p for name, p in _doubles(reference, permuted + scaled).items() if name in own}
    names, aims = [name for name in own if name in start], imbalances(scaled, theirs)
    before = after = similarity(start, theirs, names)
    best, moved, count = start, [0] * len(permuted + scaled), 0
    for balanced in (False, True) if scaled else (False,):
        tensors, like = ({name: t.clone() for name, t in these.items()} for these in (start, theirs))
        first = [torch.ones(space.k, dtype=torch.float64) for space in scaled]
        if balanced:
            first = balance_(scaled, tensors)
            balance_(scaled, like)
        matched = match_orders_(permuted, tensors, like, seed, sweeps, starts)
        last = balance_(scaled, tensors, aims)
        changes = [s[_came_from(x, matched.sources)] * t for x, s, t in zip(scaled, first, last, strict=True)]
        if (alike := similarity(tensors, theirs, names)) > after:
            after, best, count = alike, tensors, matched.sweeps
            moved = [int((order != torch.arange(len(order))).sum()) for order in matched.orders]
            moved += [int(((change - 1).abs() > _SAME).sum()) for change in changes]
    drift = _written(model, best, inputs, named)
    rows = [
        MatchRow(space.group, space.k, n, tuple(name for name in space.parameters if name in own))
        for space, n in zip(permuted + scaled, moved, strict=True)
    ]
    return MatchReport(tuple(rows), (before, after), drift, count, left)


def _check(model: nn.Module, reference: nn.Module, sweeps: int, starts: int) -> None:
    """Refuse what cannot be matched."""
    for name, value in (("sweeps", sweeps), ("starts", starts)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    own, theirs = _states(model), _states(reference)
    for name in [*own, *theirs]:
        for states, whose in ((own, "the model"), (theirs, "the reference")):
            if name not in states:
                raise ShapeMismatchError(f"the two networks must be of one architecture: {whose} has no {name}")
        if own[name].shape != theirs[name].shape:
            shapes = f"{list(own[name].shape)} in the model and {list(theirs[name].shape)} in the reference"
            raise ShapeMismatchError(f"the two networks must be of one architecture: {name} is {shapes}")
    for module, whose in ((model, "the model"), (reference, "the reference")):
        ranks.refuse_sharded(module.parameters(), "match_")
        for name, p in module.named_parameters():
            if not bool(torch.isfinite(p).all()):
                raise ConfigError(f"{name} of {whose} is not finite")


def _states(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _with_statistics(space: Space) -> Space:
    """A space of permutations in which running statistics of its channels are places like others."""
    return replace(space, places=(*space.places, *space.statistics), statistics=())


def _doubles(model: nn.Module, spaces: Sequence[Space]) -> dict[str, Tensor]:
    """What spaces act on, in double precision, on the CPU."""
    names, states = {name for space in spaces for name in space.parameters}, _states(model)
    return {name: states[name].to("cpu", torch.float64, copy=True).contiguous() for name in states if name in names}


def _came_from(space: Space, sources: Mapping[str, Tensor]) -> Tensor:
    """Which unit of a space is now in the place of each ``[k]``."""
    for place in space.places:
        if place.name in sources:
            at = place.indices()
            unit = torch.full((sources[place.name].numel(),), -1)
            unit[at] = torch.arange(space.k)[:, None].expand_as(at)
            found = unit[sources[place.name].view(-1)[at[:, 0]]]
            if bool((found >= 0).all()):
                return found
    return torch.arange(space.k)


def _written(
    model: nn.Module, tensors: Mapping[str, Tensor], inputs: tuple[Any, ...], named: Mapping[str, Any]
) -> float:
    """Write tensors into a model if a copy shows that its outputs stay; how much they changed."""
    twin = copy.deepcopy(model).eval()
    before = _outputs(twin, inputs, named)
    states = _states(twin)
    for name, t in tensors.items():
        states[name].copy_(t)
    drift = float((_outputs(twin, inputs, named) - before).abs().max() / before.abs().max().clamp_min(1e-30))
    rounding = max((torch.finfo(p.dtype).eps for p in states.values() if p.is_floating_point()), default=0.0)
    if not drift <= min(_ROUNDING * rounding, 0.05):
        raise NotExactError(
            f"the outputs changed by {drift:.1e}, more than rounding explains, so the model was left as it was; "
            "something other than its parameters and the statistics of its norms depends on the order of its units"
        )
    own = _states(model)
    for name in tensors:
        own[name].copy_(states[name])
    return drift


def _outputs(model: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = [t.reshape(-1).double().cpu() for t in tensors_in(model(*inputs, **named)) if t.is_floating_point()]
    if not found:
        raise UnsupportedModelError("the model gives no tensor of floating-point numbers")
    return torch.cat(found)
