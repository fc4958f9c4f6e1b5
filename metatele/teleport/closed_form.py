"""Teleports that need no search: whitening, rescaling, and a random one as control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from metatele.errors import ConfigError, SingularInputError
from metatele.geometry import Point
from metatele.perceptron.mlp import Weights
from metatele.symmetry import PARAMETRISATIONS, GroupElement
from metatele.teleport.move import Course, Leg, TeleportMove, finite_radius

GOALS = ("balance-weights", "balance-gradients", "raise-gradients")
_SWEEPS = 30  # over the layers; one layer is done after the first


def whitening(second_moment: Tensor, damping: float) -> GroupElement:
    r"""``g = (S + λ‖S‖ I)^{-1/2}`` for symmetric S ``[..., k, k]``, with ‖S‖ its largest eigenvalue.

    Raises:
        SingularInputError: S is not finite.

    Example:
        >>> g = whitening(torch.diag(torch.tensor([4.0, 1.0])), damping=0.0)
        >>> g.matrix.diagonal(), g.inverse.diagonal()
        (tensor([0.5000, 1.0000]), tensor([2., 1.]))
    """
    if not bool(torch.isfinite(second_moment).all()):
        raise SingularInputError("the second moments of the hidden units are not finite, so they cannot be whitened")
    eigenvalues, Q = torch.linalg.eigh(second_moment.double())
    largest = eigenvalues[..., -1:].clamp_min(torch.finfo(second_moment.dtype).tiny)
    root = (eigenvalues.clamp_min(0) + damping * largest).clamp_min(torch.finfo(second_moment.dtype).tiny).sqrt()
    matrix, inverse = (Q / root.unsqueeze(-2)) @ Q.mT, (Q * root.unsqueeze(-2)) @ Q.mT
    return GroupElement(matrix.to(second_moment.dtype), inverse.to(second_moment.dtype))


@dataclass(frozen=True, kw_only=True)
class Whitening(TeleportMove):
    r"""``g = (AAᵀ + λ‖AAᵀ‖ I)^{-1/2}`` with ``A = f(VH)``: hidden units become orthonormal over the batch.

    That holds with the exact action, so with a batch that is all there is. The approximate one (which ``auto``,
    here the default, takes for more samples than inputs) moves ``V`` to ``gV``, and ``f(gVH)`` is only roughly
    ``g f(VH)``: it is then a heuristic that often drifts past the bound. A network whose hidden units are not
    finite stays where it is.

    At the teleported point the loss is as well conditioned in the outgoing weights as it can be, and
    a gradient step on them is a Gauss-Newton step (compare Zhao et al. 2024, Prop. 3.2).

    Args:
        damping: λ.
        mode: ``move``: teleport and stay. ``conjugate``: used by :class:`metatele.TeleportOptimizer` alone;
            every step is made at the teleported point and pulled back, ``U ← (U g⁻¹ + f)·g``, so nothing
            drifts, and with a running average of ``AAᵀ/n`` mini-batches will do.
        averaging: Of the running average, for ``conjugate``.
        inputs: Also whiten the first layer's inputs, for ``conjugate``.
        refresh: Steps between two computations of g, for ``conjugate``.

    Example:
        >>> from metatele.perceptron.activations import LeakyReLU
        >>> from metatele.geometry import Landscape
        >>> from metatele.perceptron.losses import SquaredError
        >>> from metatele.perceptron.mlp import MLP
        >>> _ = torch.manual_seed(0)
        >>> mlp = MLP((8, 4, 2), LeakyReLU(0.1))
        >>> X = torch.randn(8, 4).double()
        >>> landscape = Landscape(mlp, X, torch.randn(2, 4).double(), SquaredError())
        >>> w = Whitening(damping=1e-12)(landscape, torch.randn(mlp.num_parameters).double()).weights
        >>> A = mlp.layer_inputs(mlp.unflatten(w), X)[1]
        >>> torch.allclose(A @ A.mT, torch.eye(4).double(), atol=1e-6)
        True
    """

    damping: float = 1e-4
    mode: str = "move"
    action: str = "auto"
    averaging: float = 0.95
    inputs: bool = False
    refresh: int = 1

    def __post_init__(self) -> None:
        """Check settings."""
        super().__post_init__()
        if not self.damping > 0:
            raise ConfigError(f"damping must be positive, got {self.damping}")
        if self.mode not in ("move", "conjugate"):
            raise ConfigError(f"mode must be move or conjugate, got {self.mode!r}")
        if not 0 <= self.averaging < 1:
            raise ConfigError(f"averaging must be in [0, 1), got {self.averaging}")
        if self.refresh < 1:
            raise ConfigError(f"refresh must be at least 1, got {self.refresh}")

    def legs(self, start: Point, movable: Sequence[bool]) -> Course:
        """See the base class."""
        if self.mode != "move":
            raise ConfigError("mode conjugate is for TeleportOptimizer: a teleport that stays needs mode move")
        hidden = start.forward.hidden[1:]
        elements: list[GroupElement | None] = []
        for A, move in zip(hidden, movable, strict=True):
            moment = A @ A.mT
            finite = torch.isfinite(moment).all(-1).all(-1)
            # Of what cannot be whitened comes what cannot be accepted: that network stays.
            g = whitening(torch.where(finite[..., None, None], moment, 1.0), self.damping)
            lost = torch.where(finite, 1.0, torch.nan).to(moment)[..., None, None]
            elements.append(GroupElement(g.matrix * lost, g.inverse * lost) if move else None)
        return _once(self, start, elements)


@dataclass(frozen=True, kw_only=True)
class Rescaling(TeleportMove):
    r"""A positive diagonal g, exact for every input, for positively homogeneous activations.

    Unit i of a hidden layer has the incoming weights v (with its bias) and the outgoing ones u. Scaling
    it by s turns the squares ``‖v‖², ‖u‖²`` into ``s²‖v‖², ‖u‖²/s²``, and those of the gradients into
    ``‖∇v‖²/s², s²‖∇u‖²``. Each unit's best s is a closed form; with several hidden layers, which share
    weights, the layers are swept until they agree.

    Args:
        goal: ``balance-weights``: ``‖v‖ = ‖u‖``, the least ``‖w‖`` on the orbit. ``balance-gradients``:
            ``‖∇v‖ = ‖∇u‖``, the least gradient norm. ``raise-gradients``: of the two ends of the
            allowed interval the one with the larger gradient norm (it is convex in log s, so has no maximum
            inside).
        radius: Largest ``|log s|``; 5 if not given; 0.5 for ``raise-gradients``, which goes so far with each unit.

    Example:
        >>> from metatele.perceptron.activations import LeakyReLU
        >>> from metatele.geometry import Landscape
        >>> from metatele.perceptron.losses import SquaredError
        >>> from metatele.perceptron.mlp import MLP
        >>> mlp = MLP((1, 1, 1), LeakyReLU(0.1))
        >>> landscape = Landscape(mlp, torch.ones(1, 1), torch.ones(1, 1), SquaredError())
        >>> Rescaling()(landscape, torch.tensor([8.0, 2.0])).weights
        tensor([4., 4.])
    """

    goal: str = "balance-weights"
    radius: float = cast("float", None)
    action: str = "rescaling"

    def __post_init__(self) -> None:
        """Check settings."""
        super().__post_init__()
        if self.goal not in GOALS:
            raise ConfigError(f"goal must be one of {', '.join(GOALS)}, got {self.goal!r}")
        if self.action != "rescaling":
            raise ConfigError(f"Rescaling has the action rescaling, got {self.action!r}")
        if self.radius is None:
            object.__setattr__(self, "radius", 0.5 if self.goal == "raise-gradients" else 5.0)
        finite_radius(self.radius)

    def legs(self, start: Point, movable: Sequence[bool]) -> Course:
        """See the base class."""
        of_weights = self.goal == "balance-weights"
        squares = _squares(start.landscape.mlp.unflatten(start.flat if of_weights else start.gradient))
        logs = [torch.zeros_like(squares[m].sum(-1)) for m in range(len(movable))]
        for _ in range(_SWEEPS if sum(movable) > 1 else 1):
            for m, move in enumerate(movable):
                if not move:
                    continue
                new = self._best(squares[m].sum(-1), squares[m + 1][..., : logs[m].shape[-1]].sum(-2), logs[m])
                factor = (2 * (new - logs[m])).exp()  # of the incoming squares
                logs[m] = new
                squares[m] = squares[m] * factor.unsqueeze(-1)
                squares[m + 1] = torch.cat(
                    [
                        squares[m + 1][..., : factor.shape[-1]] / factor.unsqueeze(-2),
                        squares[m + 1][..., factor.shape[-1] :],
                    ],
                    -1,
                )
        sign = 1.0 if of_weights else -1.0  # a gradient scales inversely
        elements = []
        for log, move in zip(logs, movable, strict=True):
            scale = (sign * log).exp()
            elements.append(GroupElement(torch.diag_embed(scale), torch.diag_embed(1 / scale)) if move else None)
        return _once(self, start, elements)

    def _best(self, incoming: Tensor, outgoing: Tensor, log: Tensor) -> Tensor:
        """The new ``log t`` where squares are now ``incoming · t²`` and ``outgoing / t²`` at the old one."""
        valid = (incoming > 0) & (outgoing > 0)
        balanced = log + 0.25 * torch.where(valid, outgoing / incoming, 1.0).log()
        if self.goal != "raise-gradients":
            return torch.where(valid, balanced, log).clamp(-self.radius, self.radius)
        # Convex in log t with its minimum at ``balanced``: the end farther from it is the larger.
        return torch.where(valid, torch.where(balanced > 0, -self.radius, self.radius).to(log.dtype), log)


def _squares(weights: Weights) -> list[Tensor]:
    """Squared entries of each layer, its bias as a last column."""
    return [
        (W if b is None else torch.cat([W, b.unsqueeze(-1)], -1)).square()
        for W, b in zip(weights.matrices, weights.biases, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class Random(TeleportMove):
    """``T`` normally distributed with a fixed Frobenius norm for each layer: the control arm.

    Args:
        radius: The norm.
        generator: Of random numbers; torch's own if not given.

    Example:
        >>> from metatele.perceptron.activations import Tanh
        >>> from metatele.geometry import Landscape
        >>> from metatele.perceptron.losses import SquaredError
        >>> from metatele.perceptron.mlp import MLP
        >>> _ = torch.manual_seed(0)
        >>> landscape = Landscape(MLP((5, 4, 3), Tanh()), torch.randn(5, 4), torch.randn(3, 4), SquaredError())
        >>> report = Random(radius=0.01, action="auto")(landscape, 0.5 * torch.randn(32)).report
        >>> bool(report.drift < 1e-4)
        True
    """

    radius: float = 0.1
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        """Check settings."""
        super().__post_init__()
        finite_radius(self.radius)

    def legs(self, start: Point, movable: Sequence[bool]) -> Course:
        """See the base class."""
        flat = start.flat
        chosen = self.chosen_action(start.landscape)
        elements: list[GroupElement | None] = []
        for k, move in zip(start.landscape.mlp.hidden_widths, movable, strict=True):
            shape = (*flat.shape[:-1], chosen.algebra_size(k))
            draw = torch.randn(shape, generator=self.generator, dtype=flat.dtype)
            coordinates = draw.to(flat.device) * (self.radius / draw.norm(dim=-1, keepdim=True)).to(flat.device)
            elements.append(PARAMETRISATIONS[self.parametrisation](chosen.algebra(coordinates, k)) if move else None)
        return _once(self, start, elements)


def _once(move: TeleportMove, start: Point, elements: list[GroupElement | None]) -> Course:
    """One leg with the given elements, for all networks."""
    landscape, flat = start.landscape, start.flat
    undone = torch.zeros(flat.shape[:-1], dtype=torch.bool, device=flat.device)
    leg = Leg(move.chosen_action(landscape), landscape.inputs, elements, ~undone)
    return Course(leg.move(start).flat, [leg], undone)
