"""Evaluation on held-out trajectories: checkpoints beside every baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from metatele import checkpoint
from metatele.config import TaskConfig, to_dict
from metatele.errors import CheckpointError
from metatele.tasks import Regression
from metatele.training.baselines import baseline_curves
from metatele.training.curves import Curves, learned_curves


def evaluate(
    checkpoints: Sequence[str | Path], num_trajectories: int, num_steps: int, seed: int, device: torch.device | str
) -> tuple[list[Curves], TaskConfig]:
    """Curves of checkpoints and of every baseline on the same held-out trajectories.

    Args:
        checkpoints: Run or checkpoint folders; those of the flat family all trained for one task.
        num_trajectories: Held-out problems.
        num_steps: Steps of each.
        seed: Of the problems; the evaluation stream never meets the training stream.
        device: Where.

    Returns:
        A curve for each checkpoint and each baseline, and the task they were evaluated on.

    Raises:
        CheckpointError: A checkpoint cannot be used, or they are for different tasks.
    """
    loaded = [checkpoint.load(path, device) for path in checkpoints]
    # One that takes every shape is evaluated on the task of the others, or on the paper's.
    tasks = [
        (path, one.task) for path, one in zip(checkpoints, loaded, strict=True) if isinstance(one.task, TaskConfig)
    ]
    first, task = tasks[0] if tasks else (checkpoints[0], TaskConfig())
    for path, other in tasks:
        if other != task:
            raise CheckpointError(
                f"checkpoints must be trained for one task: {first} has {to_dict(task)}, {path} has {to_dict(other)}"
            )
    problems = Regression(task).sample(seed, "evaluation", range(num_trajectories)).to(device)
    curves = []
    for path, one in zip(checkpoints, loaded, strict=True):
        losses, seconds = learned_curves(one.optimizer, problems, num_steps)
        curves.append(Curves(one.method.title, losses, seconds, str(path), to_dict(one.method)))
    return curves + baseline_curves(Regression(task), problems, num_steps, seed), task
