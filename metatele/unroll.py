"""Truncated unrolling of a batch of trajectories (Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from metatele.errors import ConfigError
from metatele.learned import MetaOptimizer, MoveStates, Stepped
from metatele.perceptron.mlp import attach_gradient
from metatele.tasks import Problems


@dataclass(frozen=True)
class Trajectories:
    """Everything that crosses from one window to the next, for a batch of trajectories.

    Attributes:
        problems: Their inner problems.
        prepared: What the teleport needs of the problems' data.
        weights: ``w_t``, flat, ``[B, P]``.
        loss: ``L(w_t)``, ``[B]``.
        gradient: ``∇L(w_t)``, ``[B, P]``; kept so that each point is visited once.
        states: Memories of the meta-optimizer.
    """

    problems: Problems
    prepared: Tensor | None
    weights: Tensor
    loss: Tensor
    gradient: Tensor
    states: MoveStates

    def detach(self) -> Trajectories:
        """The same point without history; what a window leaves to the next."""
        return replace(
            self,
            weights=self.weights.detach(),
            loss=self.loss.detach(),
            gradient=self.gradient.detach(),
            states=self.states.map(torch.Tensor.detach),
        )

    def restarted(self, where: Sequence[int], fresh: Trajectories) -> Trajectories:
        """A copy in which the trajectories at some positions begin anew."""
        if not len(where):
            return self
        index = torch.tensor(list(where), device=self.weights.device)

        def merge(old: Tensor, new: Tensor) -> Tensor:
            return old.index_copy(0, index, new)

        pairs = iter(zip(self.states.tensors(), fresh.states.tensors(), strict=True))
        return Trajectories(
            self.problems.replaced(where, fresh.problems),
            None if self.prepared is None or fresh.prepared is None else merge(self.prepared, fresh.prepared),
            merge(self.weights, fresh.weights),
            merge(self.loss, fresh.loss),
            merge(self.gradient, fresh.gradient),
            self.states.map(lambda _: merge(*next(pairs))),
        )


def start(optimizer: MetaOptimizer, problems: Problems) -> Trajectories:
    """Trajectories at their initial weights, with empty memories."""
    loss, gradient = problems.loss_and_gradient(problems.initial)
    return Trajectories(
        problems,
        optimizer.prepare(problems.inputs),
        problems.initial,
        loss,
        gradient,
        optimizer.initial_states(len(problems)),
    )


Observer = Callable[[int, Trajectories, Stepped], None]


def unroll(
    optimizer: MetaOptimizer,
    trajectories: Trajectories,
    num_steps: int,
    observe: Observer | None = None,
    lost_loss: float = math.inf,
    remat: bool = False,
) -> tuple[Trajectories, Tensor]:
    r"""Advance every trajectory by ``num_steps``, differentiably in the meta-parameters.

    .. math:: w_{t+1} = g_t · (w_t + f_t), \qquad f_t, g_t \text{ functions of } ∇L(w_t)

    The gradient is a constant input, as in the paper; one forward and backward pass of the inner
    network per step serves both as the next input and as the derivative of the meta-loss.

    Args:
        optimizer: Gives f and g.
        trajectories: Where to begin; call :meth:`Trajectories.detach` to cut history there.
        num_steps: Length of the window.
        observe: Called after each step with its number in the window, where it began and what it did.
        lost_loss: A trajectory whose loss reaches this, or is not a number, stops where it was and
            reports this loss, as a constant, from then on; so one that explodes does not drown the
            meta-gradient of the others. (One whose very weights are not finite still spoils it, and
            the trainer skips that update.) Infinity switches this off.
        remat: Keep of each step where it began alone, and compute the rest anew in the backward pass; the same
            derivatives for less memory. Not inside ``optimizer.window()``, which keeps operands itself.

    Returns:
        The trajectories after the window, and the losses ``[num_steps, B]`` after each step.

    Example:
        >>> from metatele.config import MethodConfig, TaskConfig
        >>> from metatele.tasks import Regression
        >>> task = TaskConfig(widths=(3, 4, 2), samples=3)
        >>> optimizer = MetaOptimizer(MethodConfig(hidden=8), task)
        >>> begin = start(optimizer, Regression(task).sample(0, "train", range(5)))
        >>> end, losses = unroll(optimizer, begin, num_steps=2)
        >>> losses.shape, losses.requires_grad
        (torch.Size([2, 5]), True)
    """
    losses = []
    current = trajectories
    for step in range(num_steps):
        at = (current.weights, current.gradient, current.states, current.problems.inputs, current.prepared)
        done = (
            checkpoint(optimizer.step, *at, use_reentrant=False, preserve_rng_state=False)
            if remat
            else optimizer.step(*at)
        )
        if observe is not None:
            observe(step, current, done)
        weights = done.weights
        value, gradient = current.problems.loss_and_gradient(weights)
        if math.isfinite(lost_loss):
            # A sum is finite if all of its parts are, and one that overflows is no gradient to learn from.
            alive = (value < lost_loss) & torch.isfinite(gradient.sum(-1)) & (current.loss.detach() < lost_loss)
            if gradient.is_cuda or not bool(alive.all()):  # to ask a GPU would stop it
                weights = torch.where(alive[:, None], weights, current.weights.detach())
                value = torch.where(alive, value, lost_loss)
                gradient = torch.where(alive[:, None], gradient, 0.0)
        loss = attach_gradient(weights, value, gradient)
        losses.append(loss)
        current = replace(current, weights=weights, loss=loss, gradient=gradient, states=done.states)
    return current, torch.stack(losses)


def window_loss(losses: Tensor, objective: str) -> Tensor:
    """Meta-loss of a window from its losses ``[K, B]``; the mean over trajectories.

    ``"sum"``: sum over the window (the paper). ``"mean-log"``: mean of the logarithm, which gives a
    trajectory at loss 10 the same say as one at 10⁵.

    Example:
        >>> window_loss(torch.tensor([[1.0, 3.0], [1.0, 3.0]]), "sum")
        tensor(4.)
    """
    if objective == "sum":
        return losses.sum(0).mean()
    if objective == "mean-log":
        # A loss of exactly zero has no logarithm; its derivative is zero there anyway.
        return losses.clamp_min(torch.finfo(losses.dtype).tiny).log().mean()
    raise ConfigError(f"objective must be sum or mean-log, got {objective!r}")
