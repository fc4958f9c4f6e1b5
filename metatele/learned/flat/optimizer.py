"""Meta-optimizers: a local move, then a teleport, ``w ← g·(w + f)`` (Zhao et al. 2024, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from metatele.config import MethodConfig, TaskConfig
from metatele.errors import NotExactError, ShapeMismatchError
from metatele.learned.flat.moves import LearnedRate, LearnedTeleport, LearnedUpdate, LocalMove, capped, direction
from metatele.learned.flat.preprocessing import preprocessing
from metatele.learned.lstm import LSTMState, StackedLSTM
from metatele.perceptron.mlp import MLP
from metatele.random import generator
from metatele.tasks import Regression


class MoveStates(NamedTuple):
    """What a trajectory remembers of its steps.

    Attributes:
        local: Memory of the local move.
        teleport: Memory of the teleport move; ``None`` where there is none.
        age: Steps done, ``[B]``, as floating numbers.
        smallest: Least norm so far of each part of the gradient that has a rate, ``[B, parts]``.
    """

    local: LSTMState
    teleport: LSTMState | None
    age: Tensor
    smallest: Tensor

    def tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order: hidden and cell states of each layer, age, smallest norms."""
        states = [s for s in (self.local, self.teleport) if s is not None]
        return [*(t for s in states for t in (*s.hidden, *s.cell)), self.age, self.smallest]

    def map(self, function) -> MoveStates:  # type: ignore[no-untyped-def]
        """The same structure with a function applied to every tensor, in the order of :meth:`tensors`."""

        def apply(state: LSTMState) -> LSTMState:
            return LSTMState(tuple(map(function, state.hidden)), tuple(map(function, state.cell)))

        local = apply(self.local)
        teleport = None if self.teleport is None else apply(self.teleport)
        return MoveStates(local, teleport, function(self.age), function(self.smallest))


class Stepped(NamedTuple):
    """One step of a trajectory.

    Attributes:
        weights: ``g·(w + f)``, flat, ``[B, P]``.
        states: Next memories.
        local: ``w + f``, before the teleport.
        algebra: Coordinates of T ``[B, A]``; ``None`` without a teleport move.
    """

    weights: Tensor
    states: MoveStates
    local: Tensor
    algebra: Tensor | None


class MetaOptimizer(nn.Module):
    """``w ← g_t·(w + f_t)`` with learned f_t and g_t, for one shape of network.

    Args:
        config: Which moves, and their sizes.
        task: The problems it is made for; fixes the size of its input.
        seed: For the initial meta-parameters.

    Example:
        >>> optimizer = MetaOptimizer(MethodConfig(hidden=8), TaskConfig(widths=(3, 4, 2), samples=3))
        >>> [name for name, _ in optimizer.named_children()]
        ['local', 'teleport']
    """

    def __init__(self, config: MethodConfig, task: TaskConfig, seed: int = 0) -> None:
        super().__init__()
        self.config, self.task = config, task
        self.mlp: MLP = Regression(task).mlp
        self._features = preprocessing(config.preprocessing)[0]
        local = LearnedRate if config.method == "lr-tele" else LearnedUpdate
        self.local: LocalMove = local(config, self.mlp, generator(seed, "initialisation", 0))
        self.teleport: LearnedTeleport | None = None
        if config.method != "update":
            self.teleport = LearnedTeleport(config, self.mlp, generator(seed, "initialisation", 1))
            narrowest = min(task.widths[:-2]) + task.bias
            if config.action == "exact" and task.samples > narrowest:
                raise NotExactError(
                    f"the exact action needs at most as many samples as inputs of every hidden layer (n <= {narrowest} "
                    f"for widths {task.widths}), got {task.samples} samples; use the approximate action"
                )

    @property
    def lstms(self) -> list[StackedLSTM]:
        """The networks inside."""
        return [self.local.lstm] + ([] if self.teleport is None else [self.teleport.lstm])

    def initial_states(self, batch: int) -> MoveStates:
        """Memories of ``batch`` trajectories before their first step: zero, with no smallest norm yet.

        Example:
            >>> optimizer = MetaOptimizer(MethodConfig(hidden=8), TaskConfig(widths=(3, 4, 2), samples=3))
            >>> states = optimizer.initial_states(5)
            >>> states.age, states.local.hidden[0].shape
            (tensor([0., 0., 0., 0., 0.]), torch.Size([5, 8]))
        """
        teleport = None if self.teleport is None else self.teleport.lstm.initial_state(batch)
        local = self.local.lstm.initial_state(batch)
        like = local.cell[0]
        smallest = like.new_full((batch, len(self.local.parts)), math.inf)
        return MoveStates(local, teleport, like.new_zeros(batch), smallest)

    def prepare(self, inputs: Tensor) -> Tensor | None:
        """What the teleport needs of data ``[B, d, n]`` that do not change; see :meth:`step`."""
        return None if self.teleport is None else self.teleport.prepare(inputs)

    def step(
        self,
        weights: Tensor,
        gradient: Tensor,
        states: MoveStates,
        inputs: Tensor | None,
        prepared: Tensor | None = None,
        local_scale: Tensor | float = 1.0,
    ) -> Stepped:
        """One local move, then one teleport move.

        Args:
            weights: Flat ``[B, P]``.
            gradient: Flat ``[B, P]``; a constant, no derivative passes through it.
            states: Memories.
            inputs: Data ``[B, d, n]`` on which the teleport keeps the network's output; ``None``
                leaves the teleport out, and its memory as it was.
            prepared: ``prepare(inputs)``, if the data were seen before.
            local_scale: Factor on the local update, broadcast to ``[B, P]``.

        Raises:
            ShapeMismatchError: Weights or gradient are of another network.

        Example:
            >>> optimizer = MetaOptimizer(MethodConfig(hidden=8), TaskConfig(widths=(3, 4, 2), samples=3))
            >>> import torch
            >>> random = torch.Generator().manual_seed(0)
            >>> w, x = torch.rand(5, 20, generator=random), torch.rand(5, 3, 3, generator=random)
            >>> done = optimizer.step(w, torch.ones(5, 20), optimizer.initial_states(5), x)
            >>> done.weights.shape, done.algebra.shape, done.states.age[0]
            (torch.Size([5, 20]), torch.Size([5, 16]), tensor(1.))
        """
        if gradient.shape != weights.shape or weights.shape[-1] != self.mlp.num_parameters:
            raise ShapeMismatchError(
                f"expected weights and gradient of shape [batch, {self.mlp.num_parameters}], "
                f"got {tuple(weights.shape)} and {tuple(gradient.shape)}"
            )
        gradient = gradient.detach()
        features = self._features(gradient)
        smallest = states.smallest
        if self.config.gradient_cap:
            gradient, smallest = capped(gradient, smallest, self.local.parts, self.config.gradient_cap)
        if self.config.rate_of == "direction":
            gradient = direction(gradient, self.local.parts)
        update, local_state = self.local(gradient, features, states.local)
        local = weights + local_scale * update
        new = MoveStates(local_state, states.teleport, states.age + 1, smallest)
        if self.teleport is None or states.teleport is None or inputs is None:
            return Stepped(local, new, local, None)
        moved = self.teleport(local, inputs, prepared, features, states.teleport, states.age)
        return Stepped(moved.weights, new._replace(teleport=moved.state), local, moved.algebra)

    def set_precision(self, precision: str) -> None:
        """Precision of the LSTMs' matrix products, ``"float32"`` or ``"bf16"``."""
        for lstm in self.lstms:
            lstm.precision = precision

    @contextmanager
    def window(self) -> Iterator[None]:
        """Form the weights' gradients once for a whole window; see :meth:`StackedLSTM.window`."""
        with ExitStack() as stack:
            for lstm in self.lstms:
                stack.enter_context(lstm.window())
            yield

    def parameter_groups(self, local_lr: float, teleport_lr: float) -> list[dict[str, object]]:
        """Groups for ``torch.optim``: the local move's meta-parameters, then the teleport's, each with its rate."""
        groups: list[dict[str, object]] = [{"params": list(self.local.parameters()), "lr": local_lr}]
        if self.teleport is not None:
            groups.append({"params": list(self.teleport.parameters()), "lr": teleport_lr})
        return groups
