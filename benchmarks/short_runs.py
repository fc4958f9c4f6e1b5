"""A few hundred steps of an ordinary optimizer, tuned: what the studies of symmetries train networks with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from breadth_runs import stepped
from breadth_tasks import Split, Task
from jobs import Row
from peers import METHODS, schedule
from torch import Tensor, nn

from metatele.intervals import half_width

Make = Callable[[nn.Module, float], torch.optim.Optimizer]


def _peer(name: str) -> Make:
    def make(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return METHODS[name].make(model, 0, {"lr": lr, "weight_decay": 0.0, "rest_lr": 3e-3})

    return make


# How each is made, and the rates that tuning begins with.
OPTIMIZERS: dict[str, tuple[Make, tuple[float, ...]]] = {
    "SGD": (lambda m, lr: torch.optim.SGD(m.parameters(), lr), (0.1, 0.3, 1.0)),
    "momentum": (lambda m, lr: torch.optim.SGD(m.parameters(), lr, momentum=0.9), (0.01, 0.03, 0.1)),
    "Adam": (lambda m, lr: torch.optim.Adam(m.parameters(), lr), (1e-3, 3e-3, 1e-2)),
    "AdamW": (lambda m, lr: torch.optim.AdamW(m.parameters(), lr, weight_decay=0.1), (1e-3, 3e-3, 1e-2)),
    "Muon": (_peer("muon"), (1e-2, 3e-2, 1e-1)),
    "SOAP": (_peer("soap"), (1e-3, 3e-3, 1e-2)),
}


class Ended(NamedTuple):
    """A run's end.

    Attributes:
        finite: Whether the loss always was.
        steps_s: Seconds of the steps.
        moves_s: Seconds of what was done in between.
    """

    finite: bool
    steps_s: float
    moves_s: float


def run_steps(
    task: Task,
    split: Split,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    random: torch.Generator,
    before: Callable[[int, Tensor, Tensor], Any] | None = None,
) -> Ended:
    """Train with warm-up and decay.

    Args:
        task: For its loss.
        split: For its batches.
        model: What is trained.
        optimizer: By what.
        steps: How many.
        random: Of the batches.
        before: Called before each step with its number and its batch.
    """
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: schedule(min(t, steps - 1), steps))
    steps_s = moves_s = 0.0
    for step in range(steps):
        x, y = split.draw(random)
        if before is not None:
            begin_s = time.perf_counter()
            before(step, x, y)
            moves_s += time.perf_counter() - begin_s
        try:
            loss, time_s = stepped(task, model, optimizer, (x, y))
        except RuntimeError:  # torch's decompositions fail on what is not finite
            return Ended(False, steps_s, moves_s)
        steps_s += time_s
        if not math.isfinite(loss):
            return Ended(False, steps_s, moves_s)
        scheduler.step()
    return Ended(True, steps_s, moves_s)


def finite(value: float) -> float | None:
    """Itself, or ``None``."""
    return value if math.isfinite(value) else None


def number(value: float | None) -> float:
    """Itself, or infinite where a run did not get there."""
    return math.inf if value is None else float(value)


def interval(values: Sequence[float]) -> Row | None:
    """Mean and its 95 % interval by Student's t; ``None`` of less than two values or where one is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    mean, half = sum(values) / len(values), half_width(values)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": len(values)}


def shown(known: Row | None, digits: int = 3) -> str:
    """A difference and its interval, in a cell."""
    if known is None:
        return "diverges"
    mean, low, high = (f"{known[k]:+.{digits}f}" for k in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"
