"""Loss curves: the loss of a method after every step, with spread over trajectories."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from metatele.tasks import Problems
from metatele.unroll import losses_of

_QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9}


@dataclass(frozen=True)
class Curves:
    """Losses of one method on held-out trajectories.

    Attributes:
        name: As in tables.
        losses: ``[steps + 1, trajectories]``; row i is the loss after i steps.
        seconds_per_step: Wall-clock for one step of one trajectory, of the batch as it ran.
        checkpoint: Where the method came from, if it was trained.
        hyperparameters: The method's settings.
    """

    name: str
    losses: Tensor
    seconds_per_step: float
    checkpoint: str | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Entry of ``curves.json``; a value that is not finite becomes ``null``.

        Example:
            >>> Curves("GD", torch.tensor([[4.0, 8.0], [1.0, 3.0]]), 0.0).to_json()["loss"]["mean"]
            [6.0, 2.0]
        """
        # A NaN loss is a lost trajectory: as infinity it sorts last and spoils the mean, as it should.
        losses = self.losses.double().nan_to_num(nan=torch.inf, posinf=torch.inf)
        rows = {"mean": losses.mean(1), "std": losses.std(1, correction=0)}
        rows |= {name: losses.quantile(q, 1, interpolation="lower") for name, q in _QUANTILES.items()}
        return {
            "name": self.name,
            "checkpoint": self.checkpoint,
            "hyperparameters": self.hyperparameters,
            "diverged": int((~torch.isfinite(losses[-1])).sum()),
            "seconds_per_step": self.seconds_per_step,
            "loss": {
                key: [v if v == v and abs(v) != float("inf") else None for v in row.tolist()]
                for key, row in rows.items()
            },
        }


def learned_curves(optimizer: nn.Module, problems: Problems, num_steps: int) -> tuple[Tensor, float]:
    """Losses of a meta-optimizer of any family along trajectories, and the time they took.

    Args:
        optimizer: Of any family.
        problems: ``[B]`` of them.
        num_steps: Of each trajectory.

    Returns:
        Losses ``[num_steps + 1, B]`` on the CPU, and seconds per trajectory-step.

    Example:
        >>> from metatele.config import TaskConfig
        >>> from metatele.learned import ConstantOptimizer
        >>> from metatele.tasks import Regression
        >>> problems = Regression(TaskConfig(widths=(3, 4, 2), samples=3)).sample(0, "evaluation", range(5))
        >>> losses, seconds = learned_curves(ConstantOptimizer(0.1, 0.01), problems, 2)
        >>> losses.shape
        torch.Size([3, 5])
    """
    begin_s = time.perf_counter()
    losses = losses_of(optimizer, problems, num_steps).cpu()
    return losses, (time.perf_counter() - begin_s) / (num_steps * len(problems))


def held_out_score(mean: Tensor, steps: Sequence[int]) -> float:
    """Mean over some steps of the logarithm of the mean loss; infinite if it is not finite there.

    Args:
        mean: Mean loss ``[steps + 1]`` after each step.
        steps: Those that count.

    Example:
        >>> held_out_score(torch.tensor([9.0, 1.0, 1.0]), (1, 2))
        0.0
    """
    values = [max(float(mean[s]), 1e-300) for s in steps]
    return sum(math.log(v) if math.isfinite(v) else math.inf for v in values) / len(values)


def worst_rise(mean: Tensor) -> float:
    """Largest ratio of a curve to its running minimum; 1 for one that never rises.

    Example:
        >>> worst_rise(torch.tensor([8.0, 2.0, 3.0, 1.0]))
        1.5
    """
    return float((mean / torch.cummin(mean, 0).values).max())
