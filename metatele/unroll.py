"""Truncated unrolling of a batch of problems, of whatever family (Zhao et al. 2024, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metatele.errors import ConfigError
from metatele.learned.families import family_of
from metatele.learned.unrolled import U, Unrolled

__all__ = ["Unrolled", "losses_of", "start", "unroll", "window_loss"]


def start(optimizer: nn.Module, problems: Any) -> Any:
    """Trajectories of a meta-optimizer's family at their initial weights, with empty memories.

    Args:
        optimizer: Of any family.
        problems: What its family fits; ``[B]`` of them.

    Returns:
        An :class:`Unrolled`, of its family's class.

    Raises:
        TypeError: The optimizer is of no family.

    Example:
        >>> from metatele.learned import ConstantOptimizer
        >>> from metatele.tasks.held_out import REGRESSIONS
        >>> start(ConstantOptimizer(0.1, 0.01), REGRESSIONS["narrow"].sample(0, "train", 5)).age
        0
    """
    return family_of(optimizer).begin(optimizer, problems)


def unroll(
    optimizer: nn.Module,
    trajectories: U,
    num_steps: int,
    observe: Callable[[int, Any, Any], None] | None = None,
    **settings: Any,
) -> tuple[U, Tensor]:
    r"""Advance every trajectory by ``num_steps``, differentiably in the meta-parameters.

    .. math:: w_{t+1} = g_t · (w_t + f_t), \qquad f_t, g_t \text{ functions of } ∇L(w_t)

    The gradient is a constant input, as in the paper.

    Args:
        optimizer: Gives f and g.
        trajectories: Where to begin; call :meth:`Unrolled.detach` to cut history there.
        num_steps: Length of the window.
        observe: Called after each step with its number in the window, where it began and what the optimizer did.
        settings: Of each step; see ``advanced`` of the family's class, such as
            :meth:`metatele.learned.flat.trajectories.Trajectories.advanced`.

    Returns:
        The trajectories after the window, and the losses ``[num_steps, B]`` after each step.

    Example:
        >>> from metatele.config import MethodConfig, TaskConfig
        >>> from metatele.learned import MetaOptimizer
        >>> from metatele.tasks import Regression
        >>> task = TaskConfig(widths=(3, 4, 2), samples=3)
        >>> optimizer = MetaOptimizer(MethodConfig(hidden=8), task)
        >>> begin = start(optimizer, Regression(task).sample(0, "train", range(5)))
        >>> end, losses = unroll(optimizer, begin, num_steps=2)
        >>> losses.shape, losses.requires_grad
        (torch.Size([2, 5]), True)
    """
    losses = []
    for step in range(num_steps):
        watch = None if observe is None else partial(observe, step)
        trajectories = trajectories.advanced(optimizer, observe=watch, **settings)
        losses.append(trajectories.loss)
    return trajectories, torch.stack(losses)


@torch.no_grad()
def losses_of(optimizer: nn.Module, problems: Any, steps: int) -> Tensor:
    """Losses ``[steps + 1, B]`` of a meta-optimizer of any family, each on the batch of its step.

    Args:
        optimizer: Of any family.
        problems: What its family fits; ``[B]`` of them.
        steps: How far; row i is the loss after i steps.

    Raises:
        TypeError: The optimizer is of no family.

    Example:
        >>> from metatele.learned import ConstantOptimizer
        >>> from metatele.tasks.held_out import REGRESSIONS
        >>> losses_of(ConstantOptimizer(0.1, 0.01), REGRESSIONS["narrow"].sample(0, "train", 5), 3).shape
        torch.Size([4, 5])
    """
    current = start(optimizer, problems)
    losses = [current.loss]
    for _ in range(steps):
        current = current.advanced(optimizer)
        losses.append(current.loss)
    return torch.stack(losses)


def window_loss(losses: Tensor, objective: str) -> Tensor:
    """Meta-loss of a window from its losses ``[K, B]``; the mean over trajectories.

    ``"sum"``: ``Σ_t L(w_t)`` over the window (Zhao et al. 2024, Algorithm 1). ``"mean-log"``: mean of ``log L(w_t)``,
    which gives a trajectory at loss 10 the same say as one at 10⁵.

    Args:
        losses: After each step, ``[K, B]``.
        objective: ``"sum"`` or ``"mean-log"``.

    Raises:
        ConfigError: There is no such objective.

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
