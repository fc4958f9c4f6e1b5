"""A random teleport that changes the loss as much as another one did: what does the change of the loss do alone?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metatele.errors import ConfigError
from metatele.geometry import GradientNorm, Objective, Point
from metatele.symmetry import PARAMETRISATIONS, Action, GroupElement
from metatele.teleport.move import Course, Leg, TeleportMove
from metatele.teleport.report import Report

_LEAST_NORM = 1e-4  # the least norm of T that is tried
_DOUBLINGS = 24  # to a norm of 1.7e3, where the direction of g is that of T alone
_BISECTIONS = 14  # leave 1/16000 of the bracket, far less than the tolerance needs
_TOLERANCE = 0.01  # relative, of the change


@dataclass(frozen=True, kw_only=True)
class MatchedRandom(TeleportMove):
    """T in a random direction, of the norm (one for all layers) that gives the loss a wanted relative change.

    The norm is found for each network by itself: T or -T, whichever changes the loss in the wanted sense at the
    smallest norm, is doubled until the change is passed and bisected from there. A random T lowers the loss but
    little: where a change cannot be matched, its opposite is (the same drift), and where that cannot be either
    (with the first-order g a refit bounds how far the loss can rise), the norm that came nearest is taken.

    Args:
        change: The wanted ``(L(g·w) - L(w)) / L(w)`` on the batch, one for all networks or one for each ``[...]``.
        objective: What the report speaks of.
        generator: Of random numbers; torch's own if not given.
        max_drift: As everywhere, but infinite if not given: the change is chosen.

    Example:
        >>> from metatele.perceptron.activations import LeakyReLU
        >>> from metatele.geometry import Landscape
        >>> from metatele.perceptron.losses import SquaredError
        >>> from metatele.perceptron.mlp import MLP
        >>> _ = torch.manual_seed(0)
        >>> mlp, X, Y = MLP((5, 4, 3), LeakyReLU(0.1)), torch.randn(5, 40), torch.randn(3, 40)
        >>> landscape = Landscape(mlp, X, Y, SquaredError())
        >>> report = MatchedRandom(change=0.002)(landscape, 0.5 * torch.randn(2, 32)).report
        >>> report.drift.mul(1e4).round()
        tensor([20., 20.])
    """

    change: Tensor | float = 0.0
    objective: Objective = field(default_factory=GradientNorm)
    generator: torch.Generator | None = None
    max_drift: float = math.inf

    def __post_init__(self) -> None:
        """Check settings."""
        super().__post_init__()
        if not bool(torch.isfinite(torch.as_tensor(self.change)).all()):
            raise ConfigError("change must be finite")

    @property
    def measured(self) -> Objective:
        """What the report speaks of."""
        return self.objective

    def matching(self, report: Report) -> MatchedRandom:
        """The same move with the change that another teleport, on the same batch, has made.

        A network whose loss is not finite is left where it is.
        """
        change = report.loss_after / report.loss_before - 1
        return dataclasses.replace(self, change=change.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))

    def legs(self, start: Point, movable: Sequence[bool]) -> Course:
        """See the base class."""
        landscape, shape = start.landscape, start.flat.shape[:-1]
        chosen = self.chosen_action(landscape)
        wanted = torch.as_tensor(self.change).to(start.flat).expand(shape)
        sense, goal = torch.where(wanted < 0, -1.0, 1.0).to(wanted), wanted.abs()
        directions = self._directions(start, chosen, movable)
        everyone = torch.ones(shape, dtype=torch.bool, device=goal.device)

        def leg(norm: Tensor) -> Leg:
            elements: list[GroupElement | None] = [
                None if d is None else PARAMETRISATIONS[self.parametrisation](chosen.algebra(norm[..., None] * d, k))
                for d, k in zip(directions, landscape.mlp.hidden_widths, strict=True)
            ]
            return Leg(chosen, landscape.inputs, elements, everyone)

        def search(sense: Tensor) -> tuple[Tensor, Tensor]:
            """Signed norm whose change of the loss, counted in a sense, is nearest to the goal; how far it is off."""

            def made(norm: Tensor) -> Tensor:
                ratio = leg(norm).move(start).value / start.value
                return (sense * (ratio - 1)).nan_to_num(nan=-math.inf, posinf=math.inf)

            first = torch.full_like(goal, _LEAST_NORM)
            sign = torch.where(made(first) >= made(-first), 1.0, -1.0).to(goal)
            best, off = torch.zeros_like(goal), goal  # T = 0 changes nothing
            low, high, passed = torch.zeros_like(goal), first, torch.zeros_like(everyone)
            for _ in range(_DOUBLINGS):
                reached = made(sign * high)
                best, off = _nearer((best, off), (sign * high, (reached - goal).abs()))
                passed = passed | (reached >= goal)
                if bool(passed.all()):
                    break
                low, high = torch.where(passed, low, high), torch.where(passed, high, 2 * high)
            for _ in range(_BISECTIONS):
                middle = (low + high) / 2
                reached = made(sign * middle)
                best, off = _nearer((best, off), (sign * middle, (reached - goal).abs()))
                low, high = torch.where(reached < goal, middle, low), torch.where(reached < goal, high, middle)
            return best, off

        best, off = search(sense)
        missed = off > _TOLERANCE * goal
        if bool(missed.any()):
            other, other_off = search(-sense)
            best = torch.where(missed & (other_off < off), other, best)
        last = leg(best)
        return Course(last.move(start).flat, [last], ~everyone)

    def _directions(self, start: Point, chosen: Action, movable: Sequence[bool]) -> list[Tensor | None]:
        """Coordinates of a T of norm 1 over all layers together."""
        shape, like = start.flat.shape[:-1], start.flat
        sizes = [chosen.algebra_size(k) for k in start.landscape.mlp.hidden_widths]
        drawn = [torch.randn((*shape, size), generator=self.generator, dtype=like.dtype).to(like) for size in sizes]
        used = [d if move else None for d, move in zip(drawn, movable, strict=True)]
        norm = torch.cat([d for d in used if d is not None], -1).norm(dim=-1, keepdim=True)
        return [None if d is None else d / norm for d in used]


def _nearer(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Of two norms with their distances from the goal, for each network the one that is closer."""
    closer = new[1] < old[1]
    return torch.where(closer, new[0], old[0]), torch.where(closer, new[1], old[1])
