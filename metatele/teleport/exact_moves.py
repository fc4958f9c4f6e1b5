r"""Moves along the exact symmetries of any module that need no data: balanced, rescaled, at random."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metatele.errors import ConfigError, NotExactError
from metatele.geometry import ModulePoint, Point
from metatele.geometry.module_point import kept
from metatele.network import ranks
from metatele.network.spaces import GROUPS, Space
from metatele.symmetry.canonical import Course, _shrink, canonical_
from metatele.symmetry.double import steady
from metatele.symmetry.exact import Element, act_, element_of
from metatele.symmetry.find import Symmetries
from metatele.teleport.balance import _SWEEPS, _TOLERANCE, MoveReport, _move, move_statistics_
from metatele.teleport.closed_form import Random, Rescaling
from metatele.teleport.module_move import ModuleMove, some_groups
from metatele.teleport.move import Course as Legs
from metatele.teleport.move import TeleportMove
from metatele.teleport.report import Reason, TeleportReport
from metatele.teleport.slopes import GradientNormSlope

Act = Callable[[Sequence[Space], dict[str, Tensor], float], Course]
_ROUNDING = 4.0  # units of the last place of half precision, by which a largest output may change
_MEAN_THE_SAME = ("radius", "goal", "max_drift", "generator", "groups")  # settings, on perceptrons and on any module


@dataclass(frozen=True, kw_only=True)
class Balance(TeleportMove):
    r"""To the canonical point of the orbit, as :func:`metatele.balance_` does: the least ``‖θ‖²``, in a fixed basis.

    For :class:`metatele.TeleportOptimizer` and :func:`metatele.teleport_`, on any module with a continuous symmetry;
    perceptrons need activations that are positively homogeneous, as ReLU, LeakyReLU and Identity are. It looks at no
    data.

    Args:
        groups: Which may act, of ``GL``, ``O``, ``scale``, ``phase``, ``perm``, ``shift``.

    Example:
        >>> import metatele
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> x, y = torch.randn(5, 3), torch.randn(5, 2)
        >>> report = metatele.teleport_(model, x, y, nn.functional.mse_loss, move=Balance(groups=("scale",)))
        >>> written = model[0].weight.square().sum(1) + model[0].bias.square()
        >>> report.drift < 1e-5, torch.allclose(written, model[2].weight.square().sum(0))
        (True, True)
    """

    groups: Sequence[str] = GROUPS

    def __post_init__(self) -> None:
        """Check settings."""
        super().__post_init__()
        object.__setattr__(self, "groups", some_groups(self.groups))
        refuse_settings(self)

    def legs(self, start: Point, movable: Sequence[bool]) -> Legs:
        """It is no move of flat weights.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("Balance moves a model, not flat weights: give it to teleport_ or TeleportOptimizer")


def refuse_settings(move: TeleportMove) -> None:
    """Refuse settings of a move that have no meaning along exact symmetries.

    Raises:
        ConfigError: One of them is not what it is where nothing is said; or a goal that needs gradients.

    Example:
        >>> refuse_settings(Random(parametrisation="cayley"))
        Traceback (most recent call last):
        metatele.errors.ConfigError: parametrisation is a setting of moves of perceptrons: Random of a module ...
    """
    of_perceptrons = TeleportMove if isinstance(move, ModuleMove) else type(move)  # the others are the move's own
    for f in dataclasses.fields(of_perceptrons):
        if f.name not in _MEAN_THE_SAME and getattr(move, f.name) != f.default:
            raise ConfigError(
                f"{f.name} is a setting of moves of perceptrons: {type(move).__name__} of a module has none"
            )
    if isinstance(move, Rescaling) and move.goal != "balance-weights":
        raise ConfigError(
            f"on a module that is no perceptron Rescaling has the goal balance-weights, got {move.goal}: "
            "GradientNormAscent moves the norm of gradients"
        )


def exact_(
    model: nn.Module,
    spaces: Sequence[Space],
    move: TeleportMove,
    loss: Callable[[], Tensor],
    inputs: tuple[Any, ...],
    named: Mapping[str, Any],
    *,
    known: bool,
    group: ranks.Group | None = None,
    path: list[tuple[Space, Element]] | None = None,
) -> TeleportReport:
    r"""Make a move of any module in place: :class:`Balance`, ``Rescaling``, ``Random`` or a :class:`ModuleMove`.

    Everything is computed in double precision on a copy, verified there and written once. ``Rescaling`` gives every
    hidden unit that may be scaled, a norm's gain among them, the s with ``s‖x‖ = ‖y‖/s``, x what writes it and y what
    reads it, cut to ``|log s| ≤ radius``; units of a space whose basis may change, in the basis it is in. ``Random``
    draws ``T`` of the algebra of every continuous group, normally distributed with ``‖T‖ = radius`` for each space.

    Args:
        model: Whose parameters are moved.
        spaces: Where.
        move: Which.
        loss: Makes a pass of the model and gives a scalar, for the report: a gradient before and one after.
        inputs: Of the example on which the outputs are compared.
        named: Further arguments of its pass.
        known: Whether ``loss`` is the loss: drift is then its relative change, else that of the example's outputs,
            relative to the largest.
        group: Of ranks that hold the same weights: the loss is then the mean of theirs, the drift the largest, and
            random numbers those of the first.
        path: Gets the spaces and elements that acted, for :func:`metatele.carry_along_`.

    Returns:
        What happened; past ``max_drift`` it is taken back. Of outputs in half precision, a change by four units of the
        last place is rounding, whatever ``max_drift`` is.
    """
    begin_s = time.perf_counter()
    chosen, act = _plan(model, spaces, move, group)
    device = next(model.parameters()).device
    slope = GradientNormSlope(ModulePoint(model, loss, group=group))
    narrow = [torch.finfo(p.dtype).eps for p in model.parameters() if p.element_size() < 4]
    rounding = _ROUNDING * max(narrow, default=0.0)

    def report(reason: Reason, after: tuple[float, float], drift: float = 0.0, taken_back: bool = False) -> Any:
        moved = reason is Reason.MOVED
        values = before[0], after[0], before[1], after[1], drift if moved else 0.0
        seconds = time.perf_counter() - begin_s
        return TeleportReport("grad-norm", *values, moved, taken_back, int(moved), seconds, reason.sentence)

    with torch.no_grad(), steady(model), kept(model):
        before = slope.value()
        if not (math.isfinite(before[0]) and math.isfinite(before[1])):
            return report(Reason.INPUTS, before)
        if not chosen:
            return report(Reason.NO_SPACE, before)
        old = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        drift, done = math.inf, MoveReport((), 0.0)
        try:
            done = _move(model, inputs, named, Symmetries(tuple(chosen), {}), GROUPS, act, chosen)
            drift = done.drift
        except NotExactError:  # in double precision; nothing was written then
            pass
        # All ranks have to agree, also on what a rank's own example tells.
        drift = max(ranks.told(drift if drift == drift else math.inf, group, device))
        if not any(row.change > 0 for row in done.rows) and drift < math.inf:
            return report(Reason.ARRIVED, before)
        after = slope.value()
        if known and drift < math.inf:
            drift = abs(after[0] - before[0]) / max(abs(before[0]), 1e-30)
        if not drift <= max(move.max_drift, 0.0 if known else rounding):
            for name, p in model.named_parameters():
                if name in old:
                    p.copy_(old[name])
            return report(Reason.DRIFT, before, taken_back=True)
    move_statistics_(model, done.path)  # buffers are again what they were before
    if path is not None:
        path += done.path
    return report(Reason.MOVED, after, drift)


def _plan(
    model: nn.Module, spaces: Sequence[Space], move: TeleportMove, group: ranks.Group | None
) -> tuple[list[Space], Act]:
    """The spaces in which a move acts, and how."""
    if isinstance(move, Balance):
        chosen = [space for space in spaces if space.group in move.groups]
        return chosen, lambda some, tensors, rounding: canonical_(some, tensors, _SWEEPS, _TOLERANCE, rounding)
    if isinstance(move, ModuleMove):
        own_move = move
        chosen = [space for space in spaces if space.group in move.groups]
        return chosen, lambda some, tensors, _: _acted(own_move, some, tensors)
    if isinstance(move, Rescaling):
        radius = move.radius
        return scales_of(spaces), lambda some, tensors, _: _rescaled(some, tensors, radius)
    assert isinstance(move, Random)
    g, device = move.generator, next(model.parameters()).device
    drawn = torch.randint(1 << 48, (), generator=g, device="cpu" if g is None else g.device)
    seed = int(ranks.told(int(drawn), group, device)[0])
    own, radius = torch.Generator().manual_seed(seed), move.radius
    return [s for s in spaces if s.dimension], lambda some, tensors, _: _wandered(some, tensors, radius, own)


def _acted(move: ModuleMove, spaces: Sequence[Space], tensors: dict[str, Tensor]) -> Course:
    course = Course()
    for space, element in move.elements(spaces, tensors):
        act_(space, element, tensors)
        course.path.append((space, element))
    return course


def scales_of(spaces: Sequence[Space]) -> list[Space]:
    """Positive scales of units, one by one, that the groups of spaces hold.

    Args:
        spaces: Of any groups; those of rotations, orders and shifts hold none.

    Example:
        >>> from metatele.symmetry.find import find_symmetries
        >>> found = find_symmetries(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.ones(5, 3))
        >>> [(space.group, space.k) for space in scales_of(found.spaces)]
        [('scale', 4)]
    """
    kept = [space for space in spaces if space.group in ("GL", "scale", "phase")]
    return [Space("scale", s.k, tuple(p._replace(gain=None) for p in s.places)) for s in kept]


def _rescaled(spaces: Sequence[Space], tensors: dict[str, Tensor], radius: float) -> Course:
    """Both sides of every unit of one size; scales of all spaces commute, so each acts once."""
    start = {name: tensors[name].clone() for space in spaces for name in space.parameters}
    total = {id(space): torch.ones(space.k, dtype=torch.float64) for space in spaces}

    def do(space: Space, element: Element) -> None:
        act_(space, element, tensors)
        total[id(space)] *= element.value

    course = Course()
    _shrink(course, list(enumerate(spaces)), tensors, do, _SWEEPS, _TOLERANCE)
    for name, t in start.items():
        tensors[name].copy_(t)
    for space in spaces:
        log = total[id(space)].log().clamp(-radius, radius)
        if bool((log.abs() > _TOLERANCE).any()):
            element = Element(log.exp(), (-log).exp())
            act_(space, element, tensors)
            course.path.append((space, element))
    return course


def _wandered(spaces: Sequence[Space], tensors: dict[str, Tensor], radius: float, g: torch.Generator) -> Course:
    course = Course()
    for space in spaces:
        shape = {"GL": (space.k, space.k), "O": (space.k, space.k), "phase": (space.k, 2)}.get(space.group, (space.k,))
        T = torch.randn(shape, generator=g, dtype=torch.float64)
        if space.group == "O":
            T = T - T.mT
            if space.centred:
                centre = torch.eye(space.k, dtype=T.dtype) - 1 / space.k
                T = centre @ T @ centre
        element = element_of(space, T * (radius / T.norm()))
        act_(space, element, tensors)
        course.path.append((space, element))
    return course
