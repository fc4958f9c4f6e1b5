"""What every teleport move has in common: it reports what it did, and takes back what it should not have."""

from __future__ import annotations

import dataclasses
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metatele.errors import ConfigError
from metatele.geometry import GradientNorm, Landscape, Objective, Point
from metatele.perceptron.mlp import MLP
from metatele.symmetry import ACTIONS, PARAMETRISATIONS, Action, Exact, GroupElement, action, sweep


class Leg(NamedTuple):
    """One action of group elements, of which a teleport is a sequence.

    Attributes:
        action: How they act.
        inputs: On which data ``[..., d, n]``.
        elements: One for each hidden layer; ``None`` where a layer is left alone.
        active: Which networks of the batch it moved, ``[...]``.
    """

    action: Action
    inputs: Tensor
    elements: list[GroupElement | None]
    active: Tensor

    def apply(self, mlp: MLP, flat: Tensor) -> Tensor:
        """The weights ``[..., P]`` moved; differentiable in them."""
        moved = mlp.flatten(sweep(self.action, mlp, mlp.unflatten(flat), self.inputs, self.elements))
        return torch.where(self.active.unsqueeze(-1), moved, flat)

    def move(self, point: Point) -> Point:
        """The same of a point, whose passes are made use of."""
        moved = point.teleported(self.action, self.elements)
        if bool(self.active.all()):
            return moved
        return point.landscape.at(torch.where(self.active.unsqueeze(-1), moved.flat, point.flat))


class Report(NamedTuple):
    """What a teleport did, a value for each network of the batch ``[...]``.

    Attributes:
        loss_before: Loss on the batch it was made on.
        loss_after: The same, after.
        objective_before: The objective on that batch.
        objective_after: The same, after.
        drift: ``|loss_after - loss_before| / |loss_before|``; with a loss that is known by its gradient
            alone, the relative change of the network's outputs.
        rolled_back: Whether a move, or a step of one, was taken back for its drift or for not being finite.
        steps: Steps made, at most.
        seconds: Wall-clock time.
    """

    loss_before: Tensor
    loss_after: Tensor
    objective_before: Tensor
    objective_after: Tensor
    drift: Tensor
    rolled_back: Tensor
    steps: int
    seconds: float


class Teleport(NamedTuple):
    """Result of a teleport.

    Attributes:
        weights: Flat weights ``[..., P]``.
        report: What happened.
        path: The group elements, in the order they acted; for :func:`~metatele.teleport.transport`.
    """

    weights: Tensor
    report: Report
    path: tuple[Leg, ...]


@dataclass(frozen=True, kw_only=True)
class TeleportMove(ABC):
    """A choice of group elements for given weights and data.

    Args:
        action: ``approximate`` (any batch and activation; the least change of the outgoing weights that fits the
            batch), ``rescaling``, ``exact``, or ``auto``: exact where it exists for the activations and the samples
            (linearly independent, no more than a layer has inputs), else approximate. The exact action keeps
            the outputs on its batch and **changes them at will elsewhere**: for problems whose data are one
            batch, as in the paper's regression, not for mini-batches.
        parametrisation: From T to g: ``exp``, ``cayley``, ``first-order`` or ``direct``.
        max_drift: Largest accepted relative change of the loss on the batch; past it, the move (of an
            ascent, the step) is taken back. Infinity accepts everything that is finite.
    """

    action: str = "approximate"
    parametrisation: str = "exp"
    max_drift: float = 0.01

    def __post_init__(self) -> None:
        """Check settings."""
        if self.action != "auto":
            action(self.action)
        if self.parametrisation not in PARAMETRISATIONS:
            raise ConfigError(f"parametrisation must be one of {', '.join(PARAMETRISATIONS)}")
        if not self.max_drift > 0:
            raise ConfigError(f"max_drift must be positive, got {self.max_drift}")

    @property
    def measured(self) -> Objective:
        """The objective that the report speaks of."""
        return GradientNorm()

    @abstractmethod
    def legs(self, start: Point, movable: Sequence[bool]) -> tuple[Tensor, list[Leg], Tensor]:
        """Weights, path and which networks had a step taken back."""

    @torch.no_grad()
    def __call__(self, landscape: Landscape, flat: Tensor, movable: Sequence[bool] | None = None) -> Teleport:
        """Teleport flat weights ``[..., P]`` on a batch; nothing is mutated.

        Args:
            landscape: Data and loss.
            flat: The weights.
            movable: Which hidden layers may be moved; all, if not given.
        """
        begin_s = time.perf_counter()
        hidden = len(landscape.mlp.hidden_widths)
        chosen = [True] * hidden if movable is None else list(movable)
        if len(chosen) != hidden:
            raise ConfigError(f"movable must say yes or no for each of {hidden} hidden layers, got {len(chosen)}")
        if not any(chosen):
            raise ConfigError("a teleport needs a hidden layer that may be moved")
        start = landscape.at(flat)
        before = self.measured.value(start)
        moved, path, undone = self.legs(start, chosen)
        end = landscape.at(moved)
        moved = end.flat
        drift = landscape.loss.drift(start.outputs, end.outputs, landscape.targets)
        accepted = torch.isfinite(moved).all(-1) & (drift <= self.max_drift)
        if not bool(accepted.all()):
            moved = torch.where(accepted.unsqueeze(-1), moved, flat)
            path = [leg._replace(active=leg.active & accepted) for leg in path]
            end = landscape.at(moved)
            drift = landscape.loss.drift(start.outputs, end.outputs, landscape.targets)
        report = Report(
            start.value,
            end.value,
            before,
            self.measured.value(end),
            drift,
            undone | ~accepted,
            len(path),
            time.perf_counter() - begin_s,
        )
        return Teleport(moved, report, tuple(path))

    def chosen_action(self, landscape: Landscape) -> Action:
        """The action by the configured name; see the class."""
        mlp = landscape.mlp
        name = self.action
        if name == "auto":
            inputs = zip(mlp.widths[:-2], mlp.biases, strict=False)
            fits = all(landscape.inputs.shape[-1] <= width + bias for width, bias in inputs)
            fits = fits and all(a.invertible for a in mlp.activations) and landscape.independent
            name = Exact.name if fits else "approximate"
        chosen = ACTIONS[name]
        for activation in mlp.activations:
            chosen.check(activation)
        # A network that cannot be moved comes out as not finite: it stays, and the others go on.
        return dataclasses.replace(chosen, strict=False)  # type: ignore[type-var]


def in_sequence(
    move: TeleportMove, landscapes: Sequence[Landscape], flat: Tensor, movable: Sequence[bool] | None = None
) -> tuple[Tensor, list[Report]]:
    """The same move on several batches in a row, as in the paper's experiments.

    Returns:
        The last weights, and the report of each batch.
    """
    reports = []
    for landscape in landscapes:
        flat, report, _ = move(landscape, flat, movable)
        reports.append(report)
    return flat, reports


def finite_radius(radius: float) -> None:
    """Refuse radii that are not positive numbers."""
    if not 0 < radius < math.inf:
        raise ConfigError(f"radius must be positive, got {radius}")
