r"""The two moves a trajectory alternates, ``w ← g·(w + f)``, learned and plain.

The paper's learned optimizers (Zhao et al. 2024, Algorithm 1): two LSTMs read the gradient, one gives f, the other the
coordinates of g. A move is a module with a memory: it reads the gradient, and either returns the local update f or
carries out the teleport g. :class:`~metatele.learned.flat.optimizer.MetaOptimizer` composes one of each.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metatele.config import MethodConfig
from metatele.errors import ConfigError
from metatele.learned.flat.preprocessing import preprocessing
from metatele.learned.lstm import LSTMState, StackedLSTM
from metatele.perceptron.mlp import MLP
from metatele.symmetry import PARAMETRISATIONS, Exact, GroupElement, action, exponential, sweep

_SINGULAR = 1e-12  # diagonal ratio of a QR factor; inputs are factorised in double precision
_SMALL = 2**15  # numbers: 80 trajectories' data of the paper's task


def _lstm(config: MethodConfig, mlp: MLP, hidden: int, outputs: int, generator: torch.Generator) -> StackedLSTM:
    channels = preprocessing(config.preprocessing)[1]
    lstm = StackedLSTM(mlp.num_parameters * channels, hidden, outputs, config.layers, generator)
    with torch.no_grad():
        lstm.weights[0][:, : lstm.inputs].mul_(config.input_scale)
    return lstm


class LocalMove(nn.Module, ABC):
    """The update f_t as a function of the gradient and a memory.

    Attributes:
        lstm: The network that reads the gradient.
        parts: Sizes of the stretches of the gradient that share a learned rate; they sum to P.

    Example:
        >>> from metatele.config import TaskConfig
        >>> from metatele.learned import MetaOptimizer
        >>> optimizer = MetaOptimizer(MethodConfig(method="lr-tele", hidden=8), TaskConfig(widths=(3, 4, 2), samples=3))
        >>> isinstance(optimizer.local, LocalMove), optimizer.local.parts
        (True, [20])
    """

    lstm: StackedLSTM
    parts: list[int]

    @abstractmethod
    def forward(self, gradient: Tensor, features: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
        """The local update, and the next memory.

        Args:
            gradient: ``∂L/∂w``, flat, ``[B, P]``.
            features: What the LSTM reads of it, ``[B, channels · P]``.
            state: Memory.

        Returns:
            f ``[B, P]``, which is added to the weights, and the memory after it.

        Raises:
            ShapeMismatchError: The features do not have the size that the LSTM reads.
        """


class Rate:
    """A learning rate from an unbounded output, elementwise.

    The output clamped to [low, high] (the paper's reference), or ``low^{1-s} high^s`` with
    ``s = sigmoid(output)``, whose derivative never vanishes.

    Example:
        >>> Rate("log", low=1e-4, high=1e-2)(torch.zeros(1))
        tensor([0.0010])
    """

    def __init__(self, output: str, low: float, high: float) -> None:
        self.output, self.low, self.high = output, low, high

    def __call__(self, output: Tensor) -> Tensor:
        """The rate, of the output's shape, in units of the weights over those of the gradient."""
        if self.output == "clamp":
            return output.clamp(self.low, self.high)
        low, high = math.log(self.low), math.log(self.high)
        return (low + (high - low) * torch.sigmoid(output)).exp()


def direction(gradient: Tensor, parts: Sequence[int]) -> Tensor:
    """Each part of the gradient ``[B, P]`` divided by its norm; zero stays zero.

    A learned rate is then the length of the step: it needs to span one or two orders of magnitude on a
    trajectory whose gradients span five, and a gradient that bursts does not lengthen the step.

    Example:
        >>> direction(torch.tensor([[3.0, 4.0, 0.0]]), [2, 1])
        tensor([[0.6000, 0.8000, 0.0000]])
    """
    pieces = gradient.split(list(parts), -1)
    return torch.cat([p / p.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny) for p in pieces], -1)


def capped(gradient: Tensor, smallest: Tensor, parts: Sequence[int], cap: float) -> tuple[Tensor, Tensor]:
    r"""The gradient, no longer than ``cap`` times the shortest it has been on this trajectory.

    .. math:: m_t = \min(m_{t-1}, ‖∇_t‖), \qquad ∇_t · \min(1, \text{cap} · m_t / ‖∇_t‖)

    A learned rate drives a trajectory to the edge of stability, where the gradient along one direction
    multiplies from step to step; so far and no further. Gradients of zero leave m as it is.

    Args:
        gradient: ``[B, P]``.
        smallest: ``m_{t-1}`` of each part, ``[B, len(parts)]``; infinity before the first step.
        parts: Sizes of the stretches of the gradient with a norm of their own.
        cap: The factor.

    Returns:
        The capped gradient and ``m_t``.

    Example:
        >>> capped(torch.tensor([[6.0, 8.0]]), torch.tensor([[2.0]]), [2], cap=3.0)
        (tensor([[3.6000, 4.8000]]), tensor([[2.]]))
    """
    norms = torch.stack([part.norm(dim=-1) for part in gradient.split(parts, -1)], -1)
    smallest = torch.where(norms > 0, torch.minimum(norms, smallest), smallest)
    scale = (cap * smallest / norms).nan_to_num(nan=1.0).clamp(max=1.0)
    pieces = zip(gradient.split(parts, -1), scale.split(1, -1), strict=True)
    return torch.cat([piece * factor for piece, factor in pieces], -1), smallest


class LearnedUpdate(LocalMove):
    r"""``f = scale · head(LSTM(∇))``: every entry of the update is learned.

    With ``gradient_rates`` the head has one more output for each parameter tensor, a :class:`Rate` η,
    and one for a gate s in (0, 1), and ``f = s · scale · head(LSTM(∇)) - η ∇``: what the narrow LSTM
    cannot carry from 800 gradient entries to 800 updates passes beside it, and late in a trajectory
    the gate can close on what is left of the update's noise.

    Example:
        >>> from metatele.perceptron.activations import LeakyReLU
        >>> mlp, draws = MLP((3, 4, 2), LeakyReLU(0.1)), torch.Generator().manual_seed(0)
        >>> move = LearnedUpdate(MethodConfig(hidden=8), mlp, draws)
        >>> update, state = move(g := torch.ones(5, 20), g, move.lstm.initial_state(5))
        >>> update.shape
        torch.Size([5, 20])
    """

    def __init__(self, config: MethodConfig, mlp: MLP, generator: torch.Generator) -> None:
        super().__init__()
        self.parts = [math.prod(shape) for shape in mlp.shapes]
        self.gradient_rates = config.gradient_rates
        extra = 1 + len(self.parts) if config.gradient_rates else 0
        self.lstm = _lstm(config, mlp, config.hidden, mlp.num_parameters + extra, generator)
        self.scale = config.update_scale
        self.rate = Rate(config.rate_output, config.rate_low, config.rate_high)

    def forward(self, gradient: Tensor, features: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
        """See :class:`LocalMove`."""
        output, state = self.lstm(features, state)
        if not self.gradient_rates:
            return self.scale * output, state
        update, gate, rates = output.split([gradient.shape[-1], 1, len(self.parts)], -1)
        parts = zip(gradient.split(self.parts, -1), self.rate(rates).unbind(-1), strict=True)
        return self.scale * gate.sigmoid() * update - torch.cat([eta.unsqueeze(-1) * g for g, eta in parts], -1), state


class LearnedRate(LocalMove):
    """``f = -η_t ∇`` with one learned rate η for each trajectory and step.

    Example:
        >>> from metatele.perceptron.activations import LeakyReLU
        >>> mlp, draws = MLP((3, 4, 2), LeakyReLU(0.1)), torch.Generator().manual_seed(0)
        >>> move = LearnedRate(MethodConfig(hidden=8, method="lr-tele"), mlp, draws)
        >>> update, _ = move(g := torch.ones(5, 20), g, move.lstm.initial_state(5))
        >>> bool((update < 0).all()), bool((update == update[:, :1]).all())
        (True, True)
    """

    def __init__(self, config: MethodConfig, mlp: MLP, generator: torch.Generator) -> None:
        super().__init__()
        self.parts = [mlp.num_parameters]
        self.lstm = _lstm(config, mlp, config.hidden, 1, generator)
        self.rate = Rate(config.rate_output, config.rate_low, config.rate_high)

    def forward(self, gradient: Tensor, features: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
        """See :class:`LocalMove`."""
        output, state = self.lstm(features, state)
        return -self.rate(output) * gradient, state


class Teleported(NamedTuple):
    """Result of a teleport move.

    Attributes:
        weights: Flat weights ``[B, P]``.
        state: Next memory.
        algebra: Flat coordinates of T over all hidden layers ``[B, A]``, as they acted.
    """

    weights: Tensor
    state: LSTMState
    algebra: Tensor


class LearnedTeleport(nn.Module):
    """``g = exp(T)`` with T from an LSTM, swept over all hidden layers.

    The norm of each layer's T is fixed at ``radius`` (the paper's reference), or bounded by it:
    ``T = radius · M / √(1 + ‖M‖²)`` for the head's output M, or learned: ``T = ρ M / ‖M‖`` with a
    :class:`Rate` ρ between a thousandth of the radius and the radius. With ``radius_decay`` τ the radius after
    t steps is ``radius / (1 + t/τ)``: large where teleports pay most, and the whole way in the group
    grows only with the logarithm of the number of steps.

    ``teleport_mean`` m begins with ``M + m 11ᵀ/k`` for the head's random M. A negative m contracts what the
    hidden units have in common, the direction that makes a gradient step on the outgoing weights ill
    conditioned; left to chance, that sign decides which of two policies meta-training finds.

    Source: the group action of Zhao et al. 2024, Eq. 46 or 54, as the configuration says.

    Raises:
        ConfigError: The network has no hidden layer.
        NotExactError: The exact action does not take one of its activations.

    Example:
        >>> from metatele.config import TaskConfig
        >>> from metatele.learned import MetaOptimizer
        >>> optimizer = MetaOptimizer(MethodConfig(hidden=8, radius=0.1), TaskConfig(widths=(3, 4, 2), samples=3))
        >>> T = optimizer.teleport.scaled(torch.ones(1, 16))
        >>> round(float(T.norm()), 6)
        0.1
    """

    def __init__(self, config: MethodConfig, mlp: MLP, generator: torch.Generator) -> None:
        super().__init__()
        if not mlp.hidden_widths:
            raise ConfigError(f"a teleport needs a hidden layer, got widths {mlp.widths}")
        self.mlp = mlp
        # In a batch, one network that cannot be moved must not stop the others.
        self.action = dataclasses.replace(action(config.action), strict=False)  # type: ignore[type-var]
        for activation in mlp.activations:
            self.action.check(activation)
        self.sizes = [self.action.algebra_size(k) for k in mlp.hidden_widths]
        self.radius, self.norm, self.parametrisation = config.radius, config.norm, config.parametrisation
        self.radius_decay = config.radius_decay
        self.rate = Rate("log", config.radius / 1000, config.radius)
        norms = len(self.sizes) if self.norm == "learned" else 0
        self.lstm = _lstm(config, mlp, config.teleport_hidden or config.hidden, sum(self.sizes) + norms, generator)
        with torch.no_grad():
            self.lstm.head_weight.mul_(config.teleport_head)
            self.lstm.head_bias.mul_(config.teleport_head)
            for part in self.lstm.head_bias[: sum(self.sizes)].split(self.sizes):
                part.add_(config.teleport_mean / math.sqrt(part.numel()))

    def prepare(self, inputs: Tensor) -> Tensor | None:
        """What depends on the data ``[B, d, n]`` alone, computed once for each trajectory.

        Returns:
            The inputs' pseudo-inverse ``[B, n, d]`` for the exact action; ``None`` where nothing can be prepared.

        Raises:
            NotExactError: More samples than the exact action takes.
            SingularInputError: Truly singular data; random data are merely ill conditioned.
        """
        if isinstance(self.action, Exact):
            # A GPU takes longer to factor a few small matrices than a CPU does.
            where = "cpu" if inputs.is_cuda and inputs.numel() <= _SMALL else inputs.device
            prepared = Exact(rank_tolerance=_SINGULAR).prepare(inputs.to(where), self.mlp.biases[0])
            return None if prepared is None else prepared.to(inputs.device)
        return self.action.prepare(inputs, self.mlp.biases[0])

    def forward(
        self,
        weights: Tensor,
        inputs: Tensor,
        prepared: Tensor | None,
        features: Tensor,
        state: LSTMState,
        age: Tensor,
    ) -> Teleported:
        """Teleport networks.

        Args:
            weights: Flat ``[B, P]``.
            inputs: Data ``[B, d, n]`` on which the outputs are kept.
            prepared: ``prepare(inputs)``, or ``None`` to compute it here.
            features: What the LSTM reads of the gradient, ``[B, channels · P]``.
            state: Memory.
            age: Steps since the start, ``[B]``.

        Raises:
            NotExactError: More samples than the exact action takes.
            SingularInputError: Singular data.
        """
        if prepared is None:
            prepared = self.prepare(inputs)
        output, state = self.lstm(features, state)
        shrink = 1 / (1 + age.unsqueeze(-1) / self.radius_decay) if self.radius_decay else 1.0
        size = sum(self.sizes)
        coordinates, norms = output[..., :size].split(self.sizes, -1), output[..., size:].split(1, -1)
        parts = [shrink * self.scaled(part) for part in coordinates]
        if self.norm == "learned":
            parts = [part * (self.rate(norm) / self.radius) for part, norm in zip(parts, norms, strict=True)]
        elements = [
            self.element(self.action.algebra(part, k)) for part, k in zip(parts, self.mlp.hidden_widths, strict=True)
        ]
        moved = sweep(self.action, self.mlp, self.mlp.unflatten(weights), inputs, elements, prepared)
        return Teleported(self.mlp.flatten(moved), state, torch.cat(parts, -1))

    def scaled(self, coordinates: Tensor) -> Tensor:
        """Coordinates of one layer's T ``[B, k²]`` with the norm set or bounded."""
        square = coordinates.square().sum(-1, keepdim=True)
        if self.norm == "bounded":
            return coordinates * (self.radius * torch.rsqrt(1 + square))
        # T = 0 has no direction: it stays 0, with a zero derivative instead of NaN.
        nonzero = square > 0
        inverse = torch.where(nonzero, torch.where(nonzero, square, 1.0).rsqrt(), 0.0)
        return coordinates * (self.radius * inverse)

    def element(self, T: Tensor) -> GroupElement:
        """Group element ``g [B, k, k]`` of T by the configured parametrisation, ``exp(T)`` by default."""
        if self.parametrisation == "exp":
            return exponential(T, max_norm=self.radius)
        return PARAMETRISATIONS[self.parametrisation](T)
