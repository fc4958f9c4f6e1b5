r"""Which symmetries a module has: found from one real pass, and each verified before it is told of."""

from __future__ import annotations

import copy
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from metatele.errors import ConfigError, UnsupportedModelError
from metatele.network import ranks
from metatele.network.graph import tensors_in
from metatele.network.spaces import Space, phases_of, spaces_of
from metatele.network.trace import Record, traced
from metatele.network.unwrap import unwrapped
from metatele.symmetry.exact import Element, act_, random_element

_TOLERANCE = 1e-9  # of a verified space: relative change of the outputs in float64
_CONDITION = 4.0  # of the elements by which spaces are verified
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
    def dimension(self) -> int:
        """Of all groups together: independent small changes that keep the function; permutations count none."""
        return sum(space.dimension for space in self.spaces)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])}, and {len(names) - 3} more"


@contextmanager
def steady(model: nn.Module) -> Iterator[None]:
    """Without what is random in a pass."""
    rates: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        name = "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "dropout"
        if isinstance(getattr(module, name, None), float):
            rates.append((module, name, getattr(module, name)))
    try:
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)


def _twin(model: nn.Module) -> nn.Module:
    """A copy in float64, made parameter by parameter: the float32 copy would only be made to be thrown away."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(
            p.detach().to(torch.float64, copy=True, memory_format=torch.contiguous_format), requires_grad=False
        )
    for module in model.modules():
        for value in vars(module).values():  # weights that are computed before each pass, as of pruned layers
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().double()
    return copy.deepcopy(model, memo).double()


def _doubled(tree: Any) -> Any:
    return tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, tree)


_NARROW = (torch.float32, torch.float16, torch.bfloat16)


class _Wide(TorchDispatchMode):
    """Casts to float32, as of norms and softmax, are to float64: else no change is seen below 1e-7."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in _NARROW:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def _outputs(
    model: nn.Module, tensors: Mapping[str, Tensor], inputs: tuple[Any, ...], named: Mapping[str, Any]
) -> Tensor:
    """All outputs of a pass, flat; buffers are those of the model, and stay."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    wide = _Wide() if any(t.dtype == torch.float64 for t in tensors.values()) else nullcontext()
    with torch.random.fork_rng(devices=[]), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), wide:
        torch.manual_seed(0)
        out = torch.func.functional_call(model, {**buffers, **tensors}, inputs, dict(named))
    found = [t.reshape(-1).double() for t in tensors_in(out) if t.is_floating_point()]
    if not found:
        raise UnsupportedModelError("the model gives no tensor of floating-point numbers")
    return torch.cat(found)


def _change(a: Tensor, b: Tensor) -> float:
    """Relative to the largest of what is compared with; infinite numbers, as of masks, have to stay."""
    gap = torch.where(a == b, 0.0, (a - b).abs())
    value = float(gap.max() / b[b.isfinite()].abs().max().clamp_min(1e-30)) if b.isfinite().any() else float("inf")
    return value if value == value else float("inf")


def _refuse(model: nn.Module) -> None:
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
        if not bool(p.detach().isfinite().all()):
            raise ConfigError(f"parameter {name} holds numbers that are not finite")


_PERIOD = 1048573  # a prime: no two rows of a matrix have the same numbers, whatever its width


class _Point:
    """Where spaces are verified: parameters in float64 as they are, or near by.

    Near by none is 0 or 1, where symmetries may hold that go with training. The noise is one list of numbers again and
    again, from a place of each name's own: a second copy of all parameters would take as much memory as the first.

    Args:
        original: Parameters by name.
        nearby: Whether near by.
    """

    def __init__(self, original: Mapping[str, Tensor], nearby: bool) -> None:
        self.original = original
        g = torch.Generator().manual_seed(2)
        self.noise = torch.randn(_PERIOD, generator=g, dtype=torch.float64).repeat(2) if nearby else None

    def put_(self, name: str, parameter: Tensor) -> None:
        """Write one into a contiguous tensor."""
        parameter.copy_(self.original[name])
        if self.noise is None:
            return
        size = 0.1 * (float(torch.linalg.vector_norm(parameter)) / max(1, parameter.numel()) ** 0.5 + 0.1)
        noise = self.noise[zlib.crc32(name.encode()) % _PERIOD :].to(parameter.device)
        for part in parameter.view(-1).split(_PERIOD):
            part.add_(noise[: len(part)], alpha=size)


def _others(tree: Any, g: torch.Generator) -> Any:
    """Other inputs of the same shapes: floating-point numbers of the same mean and spread."""

    def other(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.numel() < 2 or not bool(t.isfinite().all()):
            return t
        spread = t.std().clamp_min(0.1)
        return t.mean() + spread * torch.randn(t.shape, generator=g, dtype=t.dtype).to(t.device)

    return tree_map(other, tree)


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
    bare = unwrapped(model)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    _refuse(bare)
    try:
        twin = _twin(bare).requires_grad_(False)
    except Exception as reason:
        raise UnsupportedModelError(f"the model cannot be copied ({type(reason).__name__}: {reason})") from reason
    given = inputs, named
    inputs, named = _doubled(inputs), _doubled(named)
    with steady(twin), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors, original = dict(twin.named_parameters()), dict(bare.named_parameters())
        try:
            before = _outputs(twin, tensors, inputs, named)
            record = traced(twin, inputs, named)
        except UnsupportedModelError:
            raise
        except Exception as reason:
            raise _failed(reason) from reason
        if not before.isfinite().any():
            raise ConfigError("the model's outputs on the example are not finite")
        dropped: list[str] = []
        wider: list[tuple[Space, Space]] = []
        kept = spaces_of(record)
        # Nearby weights and other inputs come first: ones, zeros and units that sleep allow what does not last.
        here = Check(twin, tensors, _Point(original, nearby=False), inputs, named, before)
        checks = [check for check in (_elsewhere(twin, tensors, original, inputs, named), here) if check is not None]
        for check in checks:
            for name, p in tensors.items():
                check.point.put_(name, p)
            kept, failed = _verified(kept, check.holds)
            dropped += failed
            if check is checks[0]:  # at the first point all that may be wider is tried, at the next what was
                tried = [(space, phases_of(space)) for space in kept]
                wider = [(space, phases) for space, phases in tried if phases is not None]
            wider = [(space, phases) for n, (space, phases) in enumerate(wider) if check.holds([phases], n)]
        kept = [next((phases for old, phases in wider if old is space), space) for space in kept]
    frozen = _frozen(tensors, kept, record, dropped)
    return Symmetries(tuple(kept), frozen, tuple(dropped), dict(record.unknown), Pass(bare, *given))


class Check(NamedTuple):
    """A point at which spaces are verified.

    Attributes:
        model: In float64.
        tensors: Its parameters, which are moved and put back.
        point: What they are put back to.
        inputs: Of the pass.
        named: The same.
        before: Outputs at the point.
    """

    model: nn.Module
    tensors: Mapping[str, Tensor]
    point: _Point
    inputs: tuple[Any, ...]
    named: Mapping[str, Any]
    before: Tensor

    def holds(self, chosen: Sequence[Space], seed: int) -> bool:
        """Whether elements of spaces, one after another, keep the outputs."""
        permuted = any(space.group == "perm" for space in chosen)
        return all(self.change(chosen, seed, swap) <= _TOLERANCE for swap in ((False, True) if permuted else (False,)))

    def change(self, chosen: Sequence[Space], seed: int, swap: bool) -> float:
        """How much they change them, relatively."""
        g = torch.Generator().manual_seed(seed)
        for space in chosen:
            act_(space, _tried(space, g, swap), self.tensors)
        change = _change(_outputs(self.model, self.tensors, self.inputs, self.named), self.before)
        for name in {name for space in chosen for name in space.parameters}:
            self.point.put_(name, self.tensors[name])
        return change


def _elsewhere(
    twin: nn.Module,
    tensors: Mapping[str, Tensor],
    original: Mapping[str, Tensor],
    inputs: tuple[Any, ...],
    named: Mapping[str, Any],
) -> Check | None:
    """A check of nearby weights on other inputs; ``None`` where the model does not work on them."""
    g, point = torch.Generator().manual_seed(1), _Point(original, nearby=True)
    for other in (_others((inputs, dict(named)), g), (inputs, named)):
        try:
            for name, p in tensors.items():
                point.put_(name, p)
            before = _outputs(twin, tensors, *other)
        except Exception:  # whatever the model says to inputs that were made up
            continue
        if before.isfinite().any() and not before.isnan().any():
            return Check(twin, tensors, point, other[0], other[1], before)
    return None


def _tried(space: Space, g: torch.Generator, swap: bool) -> Element:
    """An element by which a space is verified; of permutations a cycle and a swap, which make all others."""
    if space.group != "perm":
        return random_element(space, _CONDITION, g)
    order = torch.arange(space.k)
    order = torch.cat([order[:2].flip(0), order[2:]]) if swap else order.roll(1)
    return Element(order, order.argsort())


def _verified(spaces: list[Space], holds: Any) -> tuple[list[Space], list[str]]:
    """Those that keep the outputs, by halves: one pass where all do."""
    kept: list[Space] = []
    dropped: list[str] = []
    stack = [spaces]
    while stack:
        part = stack.pop()
        if not part:
            continue
        if holds(part, len(kept)):
            kept += part
        elif len(part) == 1:
            dropped.append(f"{part[0].group} of {', '.join(part[0].parameters)}")
        else:
            half = len(part) // 2
            stack += [part[half:], part[:half]]
    return kept, dropped


def _frozen(
    tensors: Mapping[str, Tensor], spaces: Sequence[Space], record: Record, dropped: Sequence[str]
) -> dict[str, str]:
    """Why parameters are in no space."""
    failed = {name for words in dropped for name in words.partition(" of ")[2].split(", ")}
    inside = {name for space in spaces for name in space.parameters}
    odd = {use.name for use in record.uses if use.groups == -1}
    used = {use.name for use in record.uses} | {gain.name for gain in record.gains}
    reasons = {}
    for name in tensors:
        if name in inside:
            continue
        if name in odd:
            reasons[name] = "it is used by an operation that is not known"
        elif name not in used:
            reasons[name] = "the pass does not use it"
        elif name in failed:
            reasons[name] = "a symmetry of it failed its check"
        else:
            reasons[name] = "what it writes and reads is fixed: inputs, outputs, or a unit that nothing may change"
    return reasons
