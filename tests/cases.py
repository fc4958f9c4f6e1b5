"""Small problems and meta-optimizers that several tests use."""

import torch

from metatele.config import MethodConfig, TaskConfig, preset
from metatele.learned import MetaOptimizer
from metatele.tasks import Regression

TASK = TaskConfig(widths=(4, 5, 3), samples=4)
METHODS = ("update-tele", "update", "lr-tele")


def small_method(method="update-tele", **changes):
    settings = {"hidden": 6, "preprocessing": "asinh", "radius": 0.1, **changes}
    return MethodConfig(method=method, **settings)


def small_optimizer(method="update-tele", task=TASK, dtype=torch.float64, seed=0, **changes):
    return MetaOptimizer(small_method(method, **changes), task, seed).to(dtype)


def small_problems(count=3, task=TASK, dtype=torch.float64, stream="train"):
    return Regression(task).sample(0, stream, range(count)).to("cpu", dtype)


def small_run(**changes):
    """A run of a second or less."""
    settings = {
        "hidden": 6,
        "widths": (4, 5, 3),
        "samples": 4,
        "preprocessing": "asinh",
        "objective": "mean-log",
        "batch": 4,
        "horizon": 6,
        "unroll": 2,
        "trajectories": 16,
        "clip": 1.0,
        "validation_trajectories": 4,
        "validation_steps": 6,
        "validation_score_at": (6,),
        "validation_every": 3,
        "save_every": 3,
        "log_every": 2,
        "precision": "float32",
        "staggered": True,
    }
    return preset("quick", **{**settings, **changes})
