r"""Which symmetries a module has: found from one real pass, and each verified before it is told of."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metatele.errors import ConfigError, UnsupportedModelError
from metatele.network import ranks
from metatele.network.allowed import partly_used, phases_of, spaces_of
from metatele.network.experts import experts_of
from metatele.network.spaces import Space
from metatele.network.trace import Record, traced
from metatele.network.unwrap import unwrapped
from metatele.symmetry.double import doubled, ordinary, outputs_of, steady, twin_of, wide
from metatele.symmetry.verify import Check, VerifiedPoint, elsewhere, verified

_UNUSED = "the pass does not use it"
_WORDS = {
    "GL": "any change of basis",
    "O": "rotations",
    "scale": "positive scales",
    "phase": "rotations and scales of pairs",
    "perm": "permutations",
    "shift": "shifts",
}


class Pass(NamedTuple):
    """A pass of a module: the module itself, and what it was called with."""

    model: nn.Module
    inputs: tuple[Any, ...]
    named: Mapping[str, Any]


class Certificate(NamedTuple):
    """How complete a search was.

    Attributes:
        nullity: Independent directions of the weights along which no output of the example changes, to first order.
        found: Independent ones among those of the spaces.
        parameters: Of the model.
    """

    nullity: int
    found: int
    parameters: int

    @property
    def complete(self) -> bool:
        """Whether there are no others."""
        return self.nullity == self.found


@dataclass(frozen=True, eq=False)
class Symmetries:
    """The symmetries of a module; prints as a table.

    Attributes:
        spaces: Where groups may act; verified.
        frozen: Why a parameter belongs to none, by name.
        dropped: Spaces that failed their verification, in words; none was kept.
        unknown: Operations of the pass that are not known, and how often: what they touch is left alone.
        of: The pass that they were found from.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> print(find_symmetries(model, torch.ones(5, 3)))
        group  acts by          k  dimension  spaces  parameters
        scale  positive scales  4  4          1       0.weight, 0.bias, 2.weight
        perm   permutations     4  0          1       0.weight, 0.bias, 2.weight
        2 spaces, dimension 4
        in none: 2.bias (what it writes and reads is fixed: inputs, outputs, or a unit that nothing may change)
    """

    spaces: tuple[Space, ...]
    frozen: Mapping[str, str]
    dropped: tuple[str, ...] = ()
    unknown: Mapping[str, int] = field(default_factory=dict)
    of: Pass | None = field(default=None, repr=False)

    def __str__(self) -> str:
        lines = [("group", "acts by", "k", "dimension", "spaces", "parameters")]
        rows: dict[tuple[str, int, str], int] = {}
        for space in self.spaces:
            key = space.group, space.k, _listed(space.parameters)
            rows[key] = rows.get(key, 0) + 1
        each = {(s.group, s.k): s.dimension for s in self.spaces}
        for (group, k, names), count in rows.items():
            lines.append((group, _WORDS[group], str(k), str(count * each[group, k]), str(count), names))
        widths = [max(len(line[column]) for line in lines) for column in range(6)]
        table = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        table.append(f"{len(self.spaces)} spaces, dimension {self.dimension}")
        table += [f"in none: {name} ({reason})" for name, reason in self.frozen.items()]
        table += [f"failed their check and left out: {'; '.join(dict.fromkeys(self.dropped))}"] if self.dropped else []
        left = "what it touches is left alone"
        table += [f"not known: {name}, {count} times; {left}" for name, count in self.unknown.items()]
        return "\n".join(table)

    __repr__ = __str__

    def certificate(self) -> Certificate:
        r"""Whether anything is missing: the nullity of ``∂outputs/∂θ`` beside the dimension of what was found.

        Both are numbers of this point and of the example's inputs: few samples leave more directions along which
        outputs do not change than there are symmetries. For small models: the Jacobian is taken whole.

        Returns:
            The nullity, the rank of the directions found, and the number of parameters.
        """
        from metatele.symmetry.certificate import certified

        return certified(self)

    @property
    def unused(self) -> tuple[str, ...]:
        """Parameters that the pass does not use: what is done to others for them, is not known."""
        return tuple(name for name, reason in self.frozen.items() if reason == _UNUSED)

    @property
    def dimension(self) -> int:
        """Of all groups together: independent small changes that keep the function; permutations count none."""
        return sum(space.dimension for space in self.spaces)


def warn_of_unused(found: Symmetries) -> None:
    """Say that a move looks at one pass alone, where there are parameters that it does not use."""
    if found.unused:
        names = _listed(found.unused)
        warnings.warn(f"the example's pass does not use {names}: one that does may differ after a move", stacklevel=4)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])}, and {len(names) - 3} more"


def refuse_parameters(model: nn.Module) -> None:
    """Models whose parameters cannot be moved."""
    if not any(True for _ in model.parameters()):
        raise ConfigError("the model has no parameters")
    ranks.refuse_sharded(model.parameters(), "find_symmetries")
    for name, p in model.named_parameters():
        if nn.parameter.is_lazy(p):
            raise UnsupportedModelError(f"parameter {name} has no shape yet: run the lazy module once before")
        if p.is_meta:
            raise UnsupportedModelError(f"parameter {name} is on the meta device and has no values")
        if not p.is_floating_point() or p.is_quantized:
            raise UnsupportedModelError(f"parameter {name} is of {p.dtype}: only real floating-point numbers move")
    named = [(name, p.detach()) for name, p in model.named_parameters() if p.numel()]
    largest = torch._foreach_norm([p for _, p in named], math.inf) if named else []
    finite = torch.stack([t.isfinite().to(largest[0].device) for t in largest]).tolist() if named else []
    for (name, _), well in zip(named, finite, strict=True):
        if not well:
            raise ConfigError(f"parameter {name} holds numbers that are not finite")


def _failed(reason: Exception) -> ConfigError:
    lines = str(reason).strip().splitlines() or [""]
    return ConfigError(f"the model's pass on the example failed in float64 ({type(reason).__name__}: {lines[0]})")


@torch.no_grad()
def find_symmetries(model: nn.Module, inputs: Any, **named: Any) -> Symmetries:
    """The parameter symmetries of a module, from one real pass.

    Args:
        model: Any module, on any device; it is not changed.
        inputs: Of a pass: a tensor, or a tuple of all positional arguments. Small ones do.
        **named: Further arguments of the pass.

    Returns:
        The spaces that were verified: a random element of each keeps the outputs in float64, on the example and, with
        weights near by, on other inputs of its shapes. Dropout is taken out for this; the running statistics of norms
        stay. Where the pass depends on numbers (an ``if`` on an activation), what holds is found for its branch.

    Raises:
        ConfigError: The model has no parameters, or numbers in them that are not finite; or its pass fails.
        UnsupportedModelError: Its parameters are split over processes, have no values, or are no real floating-point
            numbers; it cannot be copied; or it gives no floating-point numbers.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        >>> [(space.group, space.k, space.parameters) for space in find_symmetries(model, torch.ones(5, 3)).spaces]
        [('GL', 4, ('0.weight', '0.bias', '1.weight')), ('shift', 4, ('0.bias', '1.bias'))]
    """
    if torch.is_inference_mode_enabled():  # operations come in larger pieces there, of which no rule knows
        with torch.inference_mode(False), torch.no_grad():
            return find_symmetries(model, ordinary(inputs), **ordinary(named))
    bare = unwrapped(model)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    refuse_parameters(bare)
    try:
        twin = twin_of(bare).requires_grad_(False)
    except Exception as reason:
        raise UnsupportedModelError(f"the model cannot be copied ({type(reason).__name__}: {reason})") from reason
    given = inputs, named
    inputs, named = doubled(inputs), doubled(named)
    with steady(twin), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors, original = dict(twin.named_parameters()), dict(bare.named_parameters())
        try:
            before = outputs_of(twin, tensors, inputs, named)
            with wide():
                record = traced(twin, inputs, named)
        except UnsupportedModelError:
            raise
        except Exception as reason:
            raise _failed(reason) from reason
        if not before.isfinite().any():
            raise ConfigError("the model's outputs on the example are not finite")
        dropped: list[str] = []
        wider: list[tuple[Space, Space]] = []
        kept, guesses = spaces_of(record), experts_of(twin)
        # Nearby weights and other inputs come first: ones, zeros and units that sleep allow what does not last.
        here = Check(twin, tensors, VerifiedPoint(original, nearby=False), inputs, named, before)
        checks = [check for check in (elsewhere(twin, tensors, original, inputs, named), here) if check is not None]
        for check in checks:
            for name, p in tensors.items():
                check.point.put_(name, p)
            kept, failed = verified(kept, check.holds)
            dropped += failed
            if check is checks[0]:  # at the first point all that may be wider is tried, at the next what was
                tried = [(space, phases_of(space)) for space in kept]
                wider = [(space, phases) for space, phases in tried if phases is not None]
            wider = [(space, phases) for n, (space, phases) in enumerate(wider) if check.holds([phases], n)]
            guesses = [space for n, space in enumerate(guesses) if check.holds([space], n)]
        known = {(space.k, frozenset(space.parameters)) for space in kept if space.group == "perm"}
        kept += [space for space in guesses if (space.k, frozenset(space.parameters)) not in known]
        kept = [next((phases for old, phases in wider if old is space), space) for space in kept]
    frozen = _frozen(tensors, kept, record, dropped)
    return Symmetries(tuple(kept), frozen, tuple(dropped), dict(record.unknown), Pass(bare, *given))


def _frozen(
    tensors: Mapping[str, Tensor], spaces: Sequence[Space], record: Record, dropped: Sequence[str]
) -> dict[str, str]:
    """Why parameters are in no space."""
    failed = {name for words in dropped for name in words.partition(" of ")[2].split(", ")}
    inside = {name for space in spaces for name in space.parameters}
    odd = {use.name for use in record.uses if use.groups == -1}
    used = {use.name for use in record.uses} | {gain.name for gain in record.gains}
    parts, reasons = partly_used(record), {}
    for name in tensors:
        if name in inside:
            continue
        if name in odd:
            reasons[name] = "it is used by an operation that is not known"
        elif name not in used:
            reasons[name] = _UNUSED
        elif name in parts:
            reasons[name] = "the pass uses only a part of it: take an example of full length"
        elif name in failed:
            reasons[name] = "a symmetry of it failed its check"
        else:
            reasons[name] = "what it writes and reads is fixed: inputs, outputs, or a unit that nothing may change"
    return reasons
