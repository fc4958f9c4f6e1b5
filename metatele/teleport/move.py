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
from metatele.teleport.report import Reason, Report


class Leg(NamedTuple):
    """One action of group elements, of which a teleport is a sequence.

    Attributes:
        action: How they act.
        inputs: On which data ``[..., d, n]``.
        elements: One for each hidden layer; ``None`` where a layer is left alone.
        active: Which networks of the batch it moved, ``[...]``.

    Example:
        >>> from metatele.perceptron.activations import LeakyReLU
        >>> from metatele.perceptron.losses import SquaredError
        >>> mlp = MLP((1, 1, 1), LeakyReLU(0.1))
        >>> scene = Landscape(mlp, torch.ones(1, 1), torch.ones(1, 1), SquaredError())
        >>> from metatele.symmetry import Rescaling, exponential
        >>> half = exponential(torch.tensor([[0.5]]).log())
        >>> leg = Leg(Rescaling(), scene.inputs, [half], torch.tensor([True, False]))
        >>> leg.apply(mlp, torch.tensor([[8.0, 2.0], [8.0, 2.0]]))
        tensor([[4., 4.],
                [8., 2.]])
    """

    action: Action
    inputs: Tensor
    elements: list[GroupElement | None]
    active: Tensor

    def apply(self, mlp: MLP, flat: Tensor) -> Tensor:
        """The weights ``[..., P]`` moved; differentiable in them."""
        moved = mlp.flatten(sweep(self.action, mlp, mlp.unflatten(flat), self.inputs, self.elements))
        return torch.where(self.active.to(flat.device).unsqueeze(-1), moved, flat)

    def move(self, point: Point) -> Point:
        """The same of a point, whose passes are made use of."""
        moved = point.teleported(self.action, self.elements)
        if bool(self.active.all()):
            return moved
        mask = self.active.to(point.flat.device).unsqueeze(-1)
        return point.landscape.at(torch.where(mask, moved.flat, point.flat))


class Course(NamedTuple):
    """The way a move went.

    Attributes:
        weights: Where it led ``[..., P]``.
        path: The group elements, in the order they acted.
        undone: Which networks had a step taken back, ``[...]``.
        reasons: Why a network stayed, as numbers of :class:`Reason` ``[...]``, where the move knows.

    Example:
        >>> from metatele.perceptron.activations import LeakyReLU
        >>> from metatele.perceptron.losses import SquaredError
        >>> mlp = MLP((1, 1, 1), LeakyReLU(0.1))
        >>> scene = Landscape(mlp, torch.ones(1, 1), torch.ones(1, 1), SquaredError())
        >>> from metatele.teleport import Rescaling
        >>> course = Rescaling().legs(scene.at(torch.tensor([8.0, 2.0])), [True])
        >>> course.weights, len(course.path), course.undone
        (tensor([4., 4.]), 1, tensor(False))
    """

    weights: Tensor
    path: list[Leg]
    undone: Tensor
    reasons: Tensor | None = None


class Teleport(NamedTuple):
    """Result of a teleport.

    Attributes:
        weights: Flat weights ``[..., P]``.
        report: What happened.
        path: The group elements, in the order they acted; for :func:`~metatele.teleport.transport`.

    Example:
        >>> from metatele.perceptron.activations import LeakyReLU
        >>> from metatele.perceptron.losses import SquaredError
        >>> mlp = MLP((1, 1, 1), LeakyReLU(0.1))
        >>> scene = Landscape(mlp, torch.ones(1, 1), torch.ones(1, 1), SquaredError())
        >>> from metatele.teleport import Rescaling
        >>> moved = Rescaling()(scene, torch.tensor([8.0, 2.0]))
        >>> moved.weights, moved.report.steps, len(moved.path)
        (tensor([4., 4.]), 1, 1)
    """

    weights: Tensor
    report: Report
    path: tuple[Leg, ...]


@dataclass(frozen=True, kw_only=True)
class TeleportMove(ABC):
    """A choice of group elements for given weights and data.

    Args:
        action: ``approximate`` (Zhao et al. 2024, Eq. 46; any batch and activation; the least change of the outgoing
            weights that fits the batch), ``rescaling``, ``exact`` (Zhao et al. 2024, Eq. 54, 56), or ``auto``: exact
            where it exists for the activations and the samples (linearly independent, no more than a layer has inputs)
            *and the batch is all the data*, else approximate. The exact action keeps the outputs on its batch and
            **changes them at will elsewhere**: for problems whose data are one batch, as in the paper's regression,
            not for mini-batches. A move that is called on a landscape takes that as all the data;
            :func:`~metatele.teleport_` and :class:`~metatele.TeleportOptimizer` say what they take as such.
        parametrisation: From T to g: ``exp``, ``cayley``, ``first-order`` or ``direct``.
        max_drift: Largest accepted relative change of the loss on the batch; past it, the move (of an
            ascent, the step) is taken back. Infinity accepts everything that is finite.

    Example:
        A move of one's own is one method: where it leads from a point.

        >>> from metatele.symmetry import exponential
        >>> from metatele.perceptron.activations import LeakyReLU
        >>> from metatele.perceptron.losses import SquaredError
        >>> mlp = MLP((1, 1, 1), LeakyReLU(0.1))
        >>> scene = Landscape(mlp, torch.ones(1, 1), torch.ones(1, 1), SquaredError())
        >>> class Double(TeleportMove):
        ...     def legs(self, start, movable):
        ...         everyone = torch.ones(start.flat.shape[:-1], dtype=torch.bool)
        ...         twice = exponential(torch.tensor([[2.0]]).log())
        ...         leg = Leg(self.chosen_action(start.landscape), start.landscape.inputs, [twice], everyone)
        ...         return Course(leg.move(start).flat, [leg], ~everyone)
        >>> Double(action="rescaling")(scene, torch.tensor([2.0, 8.0])).weights
        tensor([4., 4.])
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
    def legs(self, start: Point, movable: Sequence[bool]) -> Course:
        """Where the move leads from a point, before it is judged."""

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
        moved, path, undone, reasons = self.legs(start, chosen)
        end = landscape.at(moved)
        moved = end.flat
        finite = torch.isfinite(moved).all(-1)
        drift = end.drift(start)
        accepted = finite & (drift <= self.max_drift)
        if not bool(accepted.all()):
            moved = torch.where(accepted.unsqueeze(-1), moved, flat)
            end = landscape.at(moved)
        changed = (moved != start.flat).any(-1)
        if not bool(changed.all()):  # what stayed has no path: nothing is to be carried along it
            path = [leg._replace(active=leg.active & changed) for leg in path]
            path = [leg for leg in path if bool(leg.active.any())]
            drift = torch.where(changed, drift, 0.0)
        known = torch.zeros_like(accepted, dtype=torch.int64) if reasons is None else reasons
        known = torch.where(known == Reason.MOVED, Reason.ARRIVED, known)
        why = torch.where(accepted, known, torch.where(finite, Reason.DRIFT, Reason.NOT_FINITE))
        why = torch.where(torch.isfinite(start.outputs.sum((-2, -1))), why, Reason.INPUTS)
        report = Report(
            start.value,
            end.value,
            before,
            self.measured.value(end),
            drift,
            undone | ~accepted,
            len(path),
            time.perf_counter() - begin_s,
            torch.where(changed, Reason.MOVED, why),
        )
        return Teleport(moved, report, tuple(path))

    def settled(self, whole: bool) -> TeleportMove:
        """The move with ``auto`` decided where the batch may not be all the data: it is then the approximate one.

        Args:
            whole: Whether the batch is known to be all the data.
        """
        return self if whole or self.action != "auto" else dataclasses.replace(self, action="approximate")

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

    With more than one batch none is all the data, so action ``auto`` is the approximate one.

    Args:
        move: The move.
        landscapes: The batches, in their order.
        flat: The weights ``[..., P]``.
        movable: Which hidden layers may be moved; all, if not given.

    Returns:
        The last weights, and the report of each batch.

    Example:
        >>> from metatele.perceptron.activations import LeakyReLU
        >>> from metatele.perceptron.losses import SquaredError
        >>> mlp = MLP((1, 1, 1), LeakyReLU(0.1))
        >>> scene = Landscape(mlp, torch.ones(1, 1), torch.ones(1, 1), SquaredError())
        >>> from metatele.teleport import Rescaling
        >>> weights, reports = in_sequence(Rescaling(), [scene, scene], torch.tensor([8.0, 2.0]))
        >>> weights, [report.steps for report in reports]
        (tensor([4., 4.]), [1, 0])
    """
    reports = []
    move = move.settled(whole=len(landscapes) == 1)
    for landscape in landscapes:
        flat, report, _ = move(landscape, flat, movable)
        reports.append(report)
    return flat, reports


def finite_radius(radius: float) -> None:
    """Refuse radii that are not positive numbers."""
    if not 0 < radius < math.inf:
        raise ConfigError(f"radius must be positive, got {radius}")
