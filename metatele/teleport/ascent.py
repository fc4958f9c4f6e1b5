r"""Gradient ascent of an objective along the orbit of the weights (Zhao et al. 2024, Section 5.1 and Algorithm 2).

At each step T = 0 and the objective's gradient with respect to T is the pullback of its gradient with
respect to the weights, ``∂/∂T F(exp(T)·w) = pullback(∇F(w))``: one Hessian-vector product and a few
small products, no graph through the action. All parametrisations agree to first order in T, so they
differ only in where the step ``T = rate · ∂F/∂T`` leads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from metatele.errors import ConfigError
from metatele.geometry import GradientNorm, Landscape, Objective, Point
from metatele.perceptron.mlp import MLP, Weights
from metatele.symmetry import PARAMETRISATIONS, Action, GroupElement, Pair, exponential
from metatele.teleport.move import Course, Leg, TeleportMove, finite_radius
from metatele.teleport.report import Reason

RATES = ("fixed", "normalised", "line-search")


USUAL_CHANGE = 0.15  # of the weights by one step of a line search, where nothing else is said


@dataclass(frozen=True, kw_only=True)
class Ascent(TeleportMove):
    """Ascent (or descent) of any objective on T, all hidden layers at once.

    Args:
        objective: What to raise.
        rate: How far to go along the gradient G: ``fixed``: ``T = lr·G`` (the paper); ``normalised``:
            ``‖T‖ = radius`` over all layers together; ``line-search``: ‖T‖ begins at radius, is halved until
            the objective improves within the drift bound, and doubles again, up to radius, after a success.
        lr: The fixed rate.
        radius: Norm of T for the other two.
        steps: At most so many.
        tries: At most so many lengths are tried for one step of a line search, each half the one before.
        max_change: A step of a line search that would change the weights by more than this multiple of their norm is
            halved too: a batch of fewer samples than a hidden layer has units can be fitted with weights of any size,
            which spoil the outputs for all other samples. Usual steps change them by a few hundredths;
            :data:`USUAL_CHANGE` is the bound of the moves that are made where nothing is said.
        max_imbalance: With action ``rescaling``: a hidden unit whose incoming and outgoing weights v and u differ by
            more, ``|log ‖v‖/‖u‖|``, is scaled toward balance only. The gradient norm has no largest value over
            rescalings, so without a bound ascents that are repeated make a network useless.
        cap: A network whose objective reaches it stops (``descend``: falls to it).
        descend: Lower the objective instead.

    Example:
        With one hidden unit and rescaling ``‖∇L‖²`` is convex along the orbit, and least where layers are balanced.

        >>> from metatele.perceptron.activations import LeakyReLU
        >>> from metatele.perceptron.losses import SquaredError
        >>> scene = Landscape(MLP((1, 1, 1), LeakyReLU(0.1)), torch.ones(1, 1), torch.ones(1, 1), SquaredError())
        >>> Ascent(action="rescaling", descend=True, steps=50)(scene, torch.tensor([8.0, 2.0])).weights.round()
        tensor([4., 4.])
    """

    objective: Objective = field(default_factory=GradientNorm)
    rate: str = "line-search"
    lr: float = 0.0
    radius: float = 0.1
    steps: int = 10
    tries: int = 8
    max_change: float = math.inf
    max_imbalance: float = math.inf
    cap: float = math.inf
    descend: bool = False

    def __post_init__(self) -> None:
        """Check settings."""
        super().__post_init__()
        if not isinstance(self.objective, Objective):
            raise ConfigError(f"objective must be an Objective such as Curvature(), got {self.objective!r}")
        for name in ("max_change", "max_imbalance"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if math.isnan(self.cap):
            raise ConfigError("cap must be a number, got nan")
        if self.rate not in RATES:
            raise ConfigError(f"rate must be one of {', '.join(RATES)}, got {self.rate!r}")
        if self.rate == "fixed" and not 0 < self.lr < math.inf:
            raise ConfigError(f"lr must be positive, got {self.lr}")
        finite_radius(self.radius)
        for name in ("steps", "tries"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        if self.rate != "fixed" and self.lr:
            raise ConfigError(f"lr is that of rate fixed, and rate is {self.rate!r}: give radius")

    @property
    def measured(self) -> Objective:
        """The objective that is raised."""
        return self.objective

    def legs(self, start: Point, movable: Sequence[bool]) -> Course:
        """See the base class."""
        landscape, point = start.landscape, start
        chosen = self.chosen_action(landscape)
        # What is decided is decided on the CPU, from numbers that are read once a try: each read waits for the device.
        undone = np.zeros(start.flat.shape[:-1], dtype=np.bool_)
        active = np.ones_like(undone)
        radius = np.full(undone.shape, self.radius)
        path: list[Leg] = []
        bounded = math.isfinite(self.max_drift)
        why = np.full(undone.shape, int(Reason.MOVED))
        device = start.flat.device
        searches = self.rate == "line-search"
        for _ in range(self.steps):
            value, derivative = self.objective.value_and_derivative(point)
            if math.isfinite(self.cap):
                reached = value.cpu().numpy()
                reached_cap = np.logical_not((reached > self.cap) if self.descend else (reached < self.cap))
                why = np.where(active & reached_cap, int(Reason.CAP), why)
                active = active & ~reached_cap
                if not active.any():
                    break
            direction = self.direction(chosen, point, derivative, movable)
            square = allowed = _square(direction)
            if chosen.name == "rescaling" and math.isfinite(self.max_imbalance):
                direction = self._bounded(direction, point)
                allowed = _square(direction)
            size = torch.linalg.vector_norm(point.flat, dim=-1) if searches else square
            waiting = active
            for _ in range(self.tries if searches else 1):
                length = torch.as_tensor(radius, dtype=allowed.dtype)
                length = length.to(device) if length.ndim else length  # a number goes along with its kernel
                leg = self.step(chosen, landscape, direction, allowed, length, torch.as_tensor(waiting))
                moved = leg.move(point)
                if bounded:  # judged as the whole move will be, from the weights alone and as they are stored
                    moved = moved.again()
                known = [square, allowed, moved.outputs.sum((-2, -1))]  # the weights are looked at in the end
                known.append(moved.drift(start) if bounded else square)
                if searches:
                    change = torch.linalg.vector_norm(moved.flat - point.flat, dim=-1)
                    known += [value, self.objective.value(moved), change, size]
                numbers = torch.stack(torch.broadcast_tensors(*known)).double().cpu().numpy()
                lost = np.where(numbers[1] == 0, int(Reason.IMBALANCE), int(Reason.MOVED))
                lost = np.where(numbers[0] > 0, lost, int(Reason.NO_DIRECTION))
                finite = np.isfinite(numbers[2])
                good = waiting & finite
                failed = np.where(finite, int(Reason.MOVED), int(Reason.NOT_FINITE))
                if bounded:
                    near = numbers[3] <= self.max_drift
                    failed = np.where(good & ~near, int(Reason.DRIFT), failed)
                    good = good & near
                if searches:
                    old, reached, far, whole = numbers[4:]
                    better = (reached < old) if self.descend else (reached > old)
                    failed = np.where(good & ~better, int(Reason.NO_GAIN), failed)
                    good = good & better
                    small = far <= self.max_change * whole
                    failed = np.where(good & ~small, int(Reason.TOO_FAR), failed)
                    good = good & small
                why = np.where(waiting, np.where(lost > 0, lost, failed), why)
                # Where every network moved, its passes serve the next step; where none did, they serve another try.
                if good.any():
                    mask = torch.as_tensor(good).to(device)
                    path.append(leg._replace(active=mask))
                    every = bool(good.all())
                    there = moved if every else landscape.at(torch.where(mask[..., None], moved.flat, point.flat))
                    point = there
                waiting = waiting & ~good
                if searches:
                    longer, shorter = np.minimum(2 * radius, self.radius), radius / 2
                    radius = np.where(good, longer, np.where(waiting, shorter, radius))
                if not waiting.any():
                    break
            # A fixed step that cannot be made is taken back; a line search has then merely arrived.
            if not searches:
                undone = undone | waiting
            active = active & ~waiting
            if not active.any():
                break
        return Course(point.flat, path, torch.as_tensor(undone).to(device), torch.as_tensor(why).to(device))

    def direction(
        self, chosen: Action, point: Point, covector: Weights, movable: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradient of the objective with respect to each layer's coordinates at T = 0, from that by the weights."""
        pairs = zip(covector.matrices, covector.matrices[1:], covector.biases, strict=False)
        return [
            chosen.pullback(site, Pair(*pair)) if move else None
            for site, pair, move in zip(point.sites(chosen), pairs, movable, strict=True)
        ]

    def _bounded(self, direction: list[Tensor | None], point: Point) -> list[Tensor | None]:
        """The direction without what brings units further out of balance than they may be."""
        sense = -1.0 if self.descend else 1.0
        bounded: list[Tensor | None] = []
        for logs, V, U in zip(direction, point.weights.matrices, point.weights.matrices[1:], strict=False):
            if logs is None:
                bounded.append(None)
                continue
            incoming, outgoing = V.norm(dim=-1), U.norm(dim=-2)
            imbalance = torch.where((incoming > 0) & (outgoing > 0), incoming / outgoing, 1.0).log()
            worse = (imbalance.abs() >= self.max_imbalance) & (sense * logs * imbalance > 0)
            bounded.append(torch.where(worse, 0.0, logs))
        return bounded

    def step(
        self,
        chosen: Action,
        landscape: Landscape,
        direction: list[Tensor | None],
        square: Tensor,
        radius: Tensor,
        active: Tensor,
    ) -> Leg:
        """The group elements of one step along ``direction``, of squared norm ``square``."""
        sign = -1.0 if self.descend else 1.0
        if self.rate == "fixed":
            factor = torch.full_like(square, sign * self.lr)
        else:
            factor = sign * radius * torch.where(square > 0, square, 1.0).rsqrt()
        widths = landscape.mlp.hidden_widths
        elements: list[GroupElement | None] = [None] * len(widths)
        for k in dict.fromkeys(widths):  # layers of one width at a time
            members = [n for n, d in enumerate(direction) if d is not None and widths[n] == k]
            alike = [d for d, width in zip(direction, widths, strict=True) if d is not None and width == k]
            if alike:
                g = self._element(chosen, factor.unsqueeze(-1) * torch.stack(alike), k)
                for n, matrix, inverse in zip(members, g.matrix.unbind(0), g.inverse.unbind(0), strict=True):
                    elements[n] = GroupElement(matrix, inverse)
        return Leg(chosen, landscape.inputs, elements, active)

    def _element(self, chosen: Action, coordinates: Tensor, k: int) -> GroupElement:
        """From coordinates of the algebra; steps are short, so that a Taylor series will do for exponentials."""
        if self.parametrisation == "exp" and chosen.name == "rescaling":
            return GroupElement(chosen.algebra(coordinates.exp(), k), chosen.algebra((-coordinates).exp(), k))
        T = chosen.algebra(coordinates, k)
        if self.parametrisation == "exp" and self.rate != "fixed" and self.radius <= 0.5:
            return exponential(T, self.radius)
        return PARAMETRISATIONS[self.parametrisation](T)


def _square(direction: Sequence[Tensor | None]) -> Tensor:
    """Squared norm over all layers together, ``[...]``."""
    return torch.stack([d.square().sum(-1) for d in direction if d is not None]).sum(0)


def GradientNormAscent(
    lr: float | None = None,
    steps: int = 10,
    *,
    metric: Tensor | None = None,
    rate: str | None = None,
    radius: float = 0.1,
    tries: int = 8,
    cap: float = math.inf,
    descend: bool = False,
    action: str = "approximate",
    parametrisation: str = "exp",
    max_drift: float = 0.01,
) -> Ascent:
    """Ascent of ``‖∇L‖²`` or, with a metric, of ``‖∇L‖²_A``: an :class:`Ascent` of :class:`GradientNorm`.

    Args:
        lr: Fixed rate, as in the paper; without it the rate is found by line search.
        steps: Ascent steps.
        metric: Diagonal of A; see :class:`GradientNorm`.
        rate: See :class:`Ascent`.
        radius: See :class:`Ascent`.
        tries: See :class:`Ascent`.
        cap: Stop at this squared norm.
        descend: Lower the norm instead.
        action: See :class:`TeleportMove`.
        parametrisation: See :class:`TeleportMove`.
        max_drift: See :class:`TeleportMove`.

    Example:
        >>> from metatele.perceptron.activations import LeakyReLU
        >>> from metatele.perceptron.losses import SquaredError
        >>> from metatele.perceptron.mlp import MLP
        >>> _ = torch.manual_seed(0)
        >>> mlp = MLP((5, 4, 3), LeakyReLU(0.1))
        >>> landscape = Landscape(mlp, torch.randn(5, 4), torch.randn(3, 4), SquaredError())
        >>> w, report, _ = GradientNormAscent(lr=0.001, action="auto")(landscape, 0.5 * torch.randn(mlp.num_parameters))
        >>> bool(report.objective_after > 2 * report.objective_before), bool(report.drift < 1e-5)
        (True, True)
    """
    return Ascent(
        objective=GradientNorm(metric),
        rate=rate or ("line-search" if lr is None else "fixed"),
        lr=0.0 if lr is None else lr,
        radius=radius,
        steps=steps,
        tries=tries,
        cap=cap,
        descend=descend,
        action=action,
        parametrisation=parametrisation,
        max_drift=max_drift,
    )


def default_move(mlp: MLP) -> Ascent:
    """What :class:`~metatele.TeleportOptimizer` does if no move is given: raise ``‖∇L‖²`` without leaving the function.

    Where every activation is positively homogeneous (ReLU, LeakyReLU, Identity) it rescales hidden units, which keeps
    the outputs for every input, to rounding. No unit is brought further out of balance than ``|log ‖v‖/‖u‖| = 1``:
    without that bound Adam on digits stands still after some hundred teleports. Elsewhere it is the approximate action,
    which changes the outputs on the batch by up to 1 %, and others about as much.

    Args:
        mlp: Shape of the network.

    Example:
        >>> from metatele.perceptron.activations import ReLU, Tanh
        >>> default_move(MLP((4, 3, 2), ReLU())).action, default_move(MLP((4, 3, 2), Tanh())).action
        ('rescaling', 'approximate')
    """
    if all(a.positively_homogeneous for a in mlp.activations):
        return Ascent(action="rescaling", max_imbalance=1.0, max_change=USUAL_CHANGE)
    return Ascent(tries=16, max_change=USUAL_CHANGE)
