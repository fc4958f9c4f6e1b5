"""Any module at a random point of its orbit, or at the one that stands for all of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metatele.errors import ConfigError, NotExactError
from metatele.network import ranks
from metatele.network.graph import tensors_in
from metatele.network.spaces import GROUPS, Space
from metatele.network.unwrap import unwrapped
from metatele.symmetry.canonical import Course, canonical_, folding, gain_place
from metatele.symmetry.double import change_of, doubled, outputs_of, steady, twin_of
from metatele.symmetry.exact import Element, act_, random_element
from metatele.symmetry.find import Symmetries, find_symmetries, warn_of_unused

_EXACT = 1e-6  # relative change of the outputs in double precision, up to which a move is written
_TOLERANCE, _SWEEPS = 1e-10, 500
_ROUNDING = 4.0  # times a dtype's precision, by which eigenvalues and norms are told apart


class SpaceRow(NamedTuple):
    """A space, and how far its parameters moved.

    Attributes:
        group: That acted.
        units: k.
        parameters: That the space holds; others may have moved them as well.
        change: ``‖θ' - θ‖ / ‖θ‖`` of all of them together.
        note: What was left as it was, and why; empty if nothing.
    """

    group: str
    units: int
    parameters: tuple[str, ...]
    change: float
    note: str


@dataclass(frozen=True, eq=False)
class MoveReport:
    """What was done to a module along its symmetries; prints as a table.

    Attributes:
        rows: Of the spaces that were asked for.
        drift: Largest change of an output of the example relative to the largest output, in the model's dtype.
        sweeps: Rounds of a search for the smallest point; 0 where there is none.
        settled: Whether the last of them changed nothing above 1e-10.
        path: Spaces and the elements that acted, in order: what an optimizer's memories follow.

    Example:
        >>> print(MoveReport((SpaceRow("scale", 4, ("0.weight", "2.weight"), 0.52, ""),), 1e-7))
        group  k  change   parameters          left as it was
        scale  4  5.2e-01  0.weight, 2.weight
        outputs changed by 1.0e-07
        >>> print(MoveReport((), 0.0))
        no symmetry was found along which this model can move
    """

    rows: tuple[SpaceRow, ...]
    drift: float
    sweeps: int = 0
    settled: bool = True
    path: tuple[tuple[Space, Element], ...] = field(default=(), repr=False)

    @property
    def unique(self) -> bool:
        """Whether nothing was left as it was, so that every point of the orbit leads here."""
        return self.settled and not any(row.note for row in self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return "no symmetry was found along which this model can move"
        cells = [("group", "k", "change", "parameters", "left as it was")]
        for row in self.rows:
            names = (
                row.parameters if len(row.parameters) <= 4 else (*row.parameters[:3], f"{len(row.parameters) - 3} more")
            )
            cells.append((row.group, str(row.units), f"{row.change:.1e}", ", ".join(names), row.note))
        widths = [max(len(line[column]) for line in cells) for column in range(5)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        if not self.settled:
            lines.append(f"the smallest point was not reached in {self.sweeps} sweeps")
        return "\n".join([*lines, f"outputs changed by {self.drift:.1e}"])

    __repr__ = __str__


def randomize_(
    model: nn.Module,
    inputs: Any,
    condition: float = 100.0,
    seed: int = 0,
    *,
    found: Symmetries | None = None,
    groups: Sequence[str] = GROUPS,
    **named: Any,
) -> MoveReport:
    """Move a module to a random point of its orbit; what it computes stays the same.

    Every space gets a random element: a matrix of a condition number, scales of up to its square root either way, a
    rotation, an order, a shift about as large as what it is added to. All act in double precision on a copy, which is
    written once, so that each parameter is rounded once. Parameters that ask for no gradient stay, and with them every
    space that holds one.

    Args:
        model: Any module; it is not trained, its buffers stay.
        inputs: Of a pass: a tensor, or a tuple of all positional arguments.
        condition: Of the matrices, at least 1.
        seed: Of what is drawn.
        found: Its symmetries, if they are known: :func:`find_symmetries` is asked otherwise.
        groups: Which may act.
        **named: Further arguments of the pass.

    Returns:
        What moved and how much the outputs did; no rows where no symmetry was found that may move. An optimizer's
        memories follow by :func:`metatele.optim.along.carry_along_`.

    Raises:
        ConfigError: A condition below 1, an unknown group, symmetries of another model, no parameter that asks for a
            gradient; or the pass fails, as on inputs of another dtype.
        NotExactError: The outputs would change in double precision; nothing is written then.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> x = torch.randn(5, 3)
        >>> before = model(x)
        >>> report = randomize_(model, x)
        >>> [row.group for row in report.rows], torch.allclose(model(x), before, atol=1e-5)
        (['scale', 'perm'], True)
    """
    if not 1 <= condition < float("inf"):
        raise ConfigError(f"condition must be a finite number of at least 1, not {condition}")
    g = torch.Generator().manual_seed(seed)

    def act(spaces: Sequence[Space], tensors: dict[str, Tensor], rounding: float) -> Course:
        course = Course()
        for space in spaces:
            element = random_element(space, condition, g, tensors)
            act_(space, element, tensors)
            course.path.append((space, element))
        return course

    return _move(model, inputs, named, found, groups, act)


def balance_(
    model: nn.Module,
    inputs: Any,
    *,
    found: Symmetries | None = None,
    groups: Sequence[str] = GROUPS,
    **named: Any,
) -> MoveReport:
    r"""Move a module to the one point that stands for its whole orbit; what it computes stays the same.

    Two models that differ by their symmetries alone come to the same weights, up to rounding times the condition of
    what is undone. In this order:

    - gains γ of a norm behind which a basis may rotate become ±1: readers take ``W diag(|γ|)``;
    - what may be added freely becomes 0: biases that another can take up, those of keys, means that are taken away;
    - all changes of basis, scales and scales of pairs go to where ``‖θ‖²`` is least. Writers and readers then have one
      size, unit by unit, and of ``W → M W, V → V M⁻¹`` one Gram matrix, ``M W Wᵀ Mᵀ = M^{-T} Vᵀ V M⁻¹``. The point is
      unique but for rotations. Each space is solved in closed form, and all are swept until nothing changes by 1e-10.
      Where scales are alone, sweeps follow Newton's method on all of them at once;
    - what rotations are left turn Gram matrices diagonal, largest first, pairs of rotary positions each in their plane;
      rotations that keep a norm's mean, those of the rest of the space, in Helmert's basis;
    - a sign makes each unit's ``Σ w³`` positive, over weights whose other side has its signs already;
    - units that may be permuted are sorted by their norm, largest first.

    Not unique, and told in the report: equal eigenvalues or norms, as of two units that are copies; units that nothing
    reads, or a basis that is read with less than its rank, which have no smallest point. What is left alone there, its
    neighbours depend on. In double precision, points of an orbit at condition 100 agree to 1e-9 or better; in single
    precision to about 1e-5 at width 768, as eigenvectors are known to rounding over the gap of their eigenvalues.

    Args:
        model: Any module; it is not trained, its buffers stay.
        inputs: Of a pass: a tensor, or a tuple of all positional arguments.
        found: Its symmetries, if they are known: :func:`find_symmetries` is asked otherwise.
        groups: Which may act; the point is unique in the orbit of these.
        **named: Further arguments of the pass.

    Returns:
        What moved, what could not be made unique, and how much the outputs changed; no rows where no symmetry was
        found that may move.

    Raises:
        ConfigError: An unknown group, symmetries of another model, no parameter that asks for a gradient; or the pass
            fails, as on inputs of another dtype.
        NotExactError: The outputs would change in double precision; nothing is written then.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
        >>> x = torch.randn(5, 3).double()
        >>> report = balance_(model, x)
        >>> report.unique
        True
        >>> weights = model[0].weight.detach().clone()
        >>> _ = randomize_(model, x, seed=1)
        >>> _ = balance_(model, x)
        >>> torch.allclose(model[0].weight, weights)
        True
    """

    def act(spaces: Sequence[Space], tensors: dict[str, Tensor], rounding: float) -> Course:
        return canonical_(spaces, tensors, _SWEEPS, _TOLERANCE, rounding)

    return _move(model, inputs, named, found, groups, act)


def fold_norms_(model: nn.Module, inputs: Any, *, found: Symmetries | None = None, **named: Any) -> MoveReport:
    """Set the gains γ of norms to 1 by moving them into what reads them; what the module computes stays the same.

    Norms are modules whose class is called so, and those that a change of basis passes. Their biases become ``β / γ``,
    and readers ``W diag(γ)``. Where γ is negative and its sign may not be moved, as in front of a ReLU, it becomes -1.

    Args:
        model: Any module; it is not trained, its buffers stay.
        inputs: Of a pass: a tensor, or a tuple of all positional arguments.
        found: Its symmetries, if they are known: :func:`find_symmetries` is asked otherwise.
        **named: Further arguments of the pass.

    Returns:
        Which gains were folded. Those that nothing can take up, such as a last norm before outputs, are in no row.

    Raises:
        ConfigError: Symmetries of another model, no parameter that asks for a gradient; or the pass fails, as on inputs
            of another dtype.
        NotExactError: The outputs would change in double precision; nothing is written then.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2))
        >>> _ = nn.init.normal_(model[0].weight)
        >>> report = fold_norms_(model, torch.randn(5, 3))
        >>> model[0].weight.tolist(), report.drift < 1e-6
        ([1.0, 1.0, 1.0], True)
    """
    bare = unwrapped(model)
    gains = {
        f"{name}.weight" if name else "weight" for name, m in bare.named_modules() if "norm" in type(m).__name__.lower()
    }

    def act(
        spaces: Sequence[Space], tensors: dict[str, Tensor], rounding: float, holds: Callable[[], bool] = lambda: True
    ) -> Course:
        course = Course()
        for n, space in enumerate(spaces):
            place = gain_place(space, gains)
            if place is None:
                continue
            for signed in (True, False):
                element = folding(place, tensors, signed)
                if element is None:
                    course.notes[n] = "a gain is zero"
                    break
                if signed and not bool((element.value < 0).any()):
                    continue
                kept = {name: tensors[name].clone() for name in space.parameters} if signed else {}
                act_(space, element, tensors)
                if not signed or holds():
                    course.path.append((space, element))
                    break
                tensors.update(kept)
        return course

    def only(space: Space) -> bool:
        gains.update(p.gain[0] for p in space.places if p.gain is not None)
        return space.group == "scale"

    symmetries = found if found is not None else find_symmetries(bare, inputs, **named)
    chosen = [space for space in symmetries.spaces if only(space)]
    chosen = [space for space in chosen if gain_place(space, gains) is not None]
    return _move(bare, inputs, named, symmetries, ("scale",), act, chosen, checked=True)


@torch.no_grad()
def _move(
    model: nn.Module,
    inputs: Any,
    named: Mapping[str, Any],
    found: Symmetries | None,
    groups: Sequence[str],
    act: Callable[..., Course],
    spaces: Sequence[Space] | None = None,
    checked: bool = False,
) -> MoveReport:
    """Act on a copy in double precision, see that no output changes, and write it."""
    bare = unwrapped(model)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    if unknown := [group for group in groups if group not in GROUPS]:
        raise ConfigError(f"there is no group {unknown[0]!r}; there are {', '.join(GROUPS)}")
    own = dict(bare.named_parameters())
    if not any(p.requires_grad for p in own.values()):
        raise ConfigError("no parameter of the model asks for a gradient, so none may move")
    ranks.refuse_sharded(own.values(), "a move along symmetries")
    found = found if found is not None else find_symmetries(bare, inputs, **named)
    warn_of_unused(found)
    if missing := [name for s in found.spaces for name in s.parameters if name not in own]:
        raise ConfigError(f"the symmetries are those of another model: this one has no parameter {missing[0]!r}")
    chosen = [
        space
        for space in (found.spaces if spaces is None else spaces)
        if space.group in groups and all(own[name].requires_grad for name in space.parameters)
    ]
    if not chosen:
        return MoveReport((), 0.0)
    touched = {name for space in chosen for name in space.parameters}
    first = _first(bare, inputs, named)
    twin = twin_of(bare).requires_grad_(False)
    tensors = dict(twin.named_parameters())
    data = {name: t.data for name, t in tensors.items()} | {name: b.clone() for name, b in twin.named_buffers()}
    rounding = _ROUNDING * max(torch.finfo(own[name].dtype).eps for name in touched)
    given, its = doubled(inputs), doubled(dict(named))
    with steady(twin), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = outputs_of(twin, tensors, given, its)

        def drift() -> float:
            return change_of(outputs_of(twin, data, given, its), before)

        course = act(chosen, data, rounding, lambda: drift() <= _EXACT) if checked else act(chosen, data, rounding)
        change = drift()
    if not change <= _EXACT or not all(bool(data[name].isfinite().all()) for name in touched):
        raise NotExactError(f"the outputs would change by {change:.1e}, so nothing was moved")
    with steady(bare), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        far = {name: (float((data[name] - own[name]).norm()), float(own[name].double().norm())) for name in touched}
        for name in touched:
            own[name].copy_(data[name])
        move_statistics_(bare, course.path)
        last = _given(bare, inputs, named)
    rows = []
    for n, space in enumerate(chosen):
        new, old = (sum(far[name][side] ** 2 for name in space.parameters) ** 0.5 for side in (0, 1))
        rows.append(
            SpaceRow(space.group, space.k, space.parameters, new / old if old else 0.0, course.notes.get(n, ""))
        )
    settled = not course.change > _TOLERANCE
    return MoveReport(tuple(rows), change_of(last, first), course.sweeps, settled, tuple(course.path))


@torch.no_grad()
def move_statistics_(model: nn.Module, path: Sequence[tuple[Space, Element]]) -> None:
    """Let running statistics of norms go along with their units.

    Args:
        model: Whose buffers are moved.
        path: Spaces and elements that acted on its parameters.
    """
    buffers = dict(model.named_buffers())
    for space, element in path:
        if space.statistics:
            act_(Space(space.group, space.k, (), statistics=space.statistics), element, buffers)


def _first(model: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """The first pass in the model's own precision, which tells inputs that it does not take."""
    try:
        with steady(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _given(model, inputs, named)
    except Exception as reason:
        kinds = ", ".join(sorted({str(t.dtype) for t in tensors_in((inputs, dict(named)))}))
        own = ", ".join(sorted({str(p.dtype) for p in model.parameters()}))
        told = (str(reason).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"the model's pass on the inputs failed, so nothing was moved: inputs are {kinds or 'no tensors'}, "
            f"parameters {own} ({type(reason).__name__}: {told})"
        ) from reason


def _given(model: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """All outputs of a pass in the model's own precision, flat; buffers stay."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with torch.random.fork_rng(devices=[]), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.manual_seed(0)
        out = torch.func.functional_call(model, buffers, inputs, dict(named))
    return torch.cat([t.reshape(-1).double() for t in tensors_in(out) if t.is_floating_point()])
