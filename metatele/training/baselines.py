"""Hand-made optimizers on the same problems: plain gradient descent and tuned standard ones.

All trajectories and all candidates of a grid advance as one batch; torch.optim works on them
unchanged because its rules are elementwise. L-BFGS is not, and runs one trajectory after another.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metatele.tasks import Fitting, Problems, Regression
from metatele.training.curves import Curves

PAPER_RATE = 3e-4  # the largest that does not diverge (Zhao et al. 2024, section 5.2)


def _decades(low: int, high: int, per_decade: int = 4) -> list[float]:
    return [10 ** (e / per_decade) for e in range(low * per_decade, high * per_decade + 1)]


@dataclass(frozen=True)
class Baseline:
    """A standard optimizer and the grid it is tuned on.

    Attributes:
        name: As in tables.
        optimizer: Class of torch.optim, or a function like one.
        grid: Candidate settings; a single one needs no tuning.
        batched: Whether the update rule is elementwise.
    """

    name: str
    optimizer: Any
    grid: tuple[dict[str, Any], ...]
    batched: bool = True


class Muon:
    """torch's Muon for matrices, with Adam for biases, as it is meant to be used; rates mean what Adam's mean.

    Args:
        params: Parameters.
        lr: Of both.
    """

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        known = list(params)
        matrices, rest = [p for p in known if p.dim() == 2], [p for p in known if p.dim() != 2]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        ]
        if rest:
            self.parts.append(torch.optim.Adam(rest, lr=lr))

    def zero_grad(self) -> None:
        """Of both."""
        for part in self.parts:
            part.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Of both."""
        if closure is not None:
            closure()
        for part in self.parts:
            part.step()


BASELINES: tuple[Baseline, ...] = (
    Baseline("GD", torch.optim.SGD, ({"lr": PAPER_RATE},)),
    Baseline("SGD", torch.optim.SGD, tuple({"lr": lr} for lr in _decades(-5, -2, 8))),
    Baseline(
        "Momentum",
        torch.optim.SGD,
        tuple({"lr": lr, "momentum": m} for lr, m in itertools.product(_decades(-6, -2), (0.5, 0.8, 0.9, 0.95))),
    ),
    Baseline(
        "Adam",
        torch.optim.Adam,
        tuple({"lr": lr, "betas": (b, 0.999)} for lr, b in itertools.product(_decades(-3, 0), (0.8, 0.9, 0.95))),
    ),
    Baseline(
        "L-BFGS",
        torch.optim.LBFGS,
        tuple(
            {"lr": lr, "max_iter": 1, "history_size": 10, "line_search_fn": search}
            for lr, search in itertools.product((0.1, 0.3, 1.0), (None, "strong_wolfe"))
        ),
        batched=False,
    ),
)

# For problems of any kind, tuned on each.
EVERYWHERE: tuple[Baseline, ...] = (
    Baseline("SGD", torch.optim.SGD, tuple({"lr": lr} for lr in _decades(-6, 1, 3))),
    Baseline("Momentum", torch.optim.SGD, tuple({"lr": lr, "momentum": 0.9} for lr in _decades(-6, 1, 3))),
    Baseline("Adam", torch.optim.Adam, tuple({"lr": lr} for lr in _decades(-4, 0))),
    Baseline(
        "AdamW",
        torch.optim.AdamW,
        tuple({"lr": lr, "weight_decay": d} for lr, d in itertools.product(_decades(-4, 0), (1e-3, 1e-1))),
    ),
    *(
        (Baseline("Muon", Muon, tuple({"lr": lr} for lr in _decades(-3, 0, 2)), batched=False),)
        if hasattr(torch.optim, "Muon")  # since torch 2.9
        else ()
    ),
    BASELINES[-1],  # L-BFGS
)


def run_candidates(
    baseline: Baseline,
    candidates: Sequence[dict[str, Any]],
    problems: Problems | Fitting,
    num_steps: int,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Losses ``[num_steps + 1, candidates, B]`` of each candidate on each problem.

    Args:
        baseline: The optimizer.
        candidates: Its settings.
        problems: What to minimise; on mini-batches a loss is that of the step's batch.
        num_steps: How far.
        watch: Called with the number of steps done and the weights ``[candidates · B, P]`` there; where an optimizer
            is not batched, of one candidate and problem after another.

    Example:
        >>> from metatele.config import TaskConfig
        >>> problems = Regression(TaskConfig(widths=(3, 4, 2), samples=3)).sample(0, "evaluation", range(5))
        >>> run_candidates(BASELINES[1], [{"lr": 1e-3}, {"lr": 1e-2}], problems, num_steps=3).shape
        torch.Size([4, 2, 5])
    """
    if isinstance(problems, Problems):
        problems = problems.fitting()
    if not baseline.batched:
        runs = [
            [
                _run_alone(baseline.optimizer, c, problems.part(slice(i, i + 1)), num_steps, watch)
                for i in range(len(problems))
            ]
            for c in candidates
        ]
        return torch.stack([torch.stack(run, -1) for run in runs], 1)
    repeated = problems.repeat(len(candidates))
    points = [problems.initial.clone() for _ in candidates]
    optimizer = baseline.optimizer([{"params": [p], **c} for p, c in zip(points, candidates, strict=True)])
    losses = []
    for step in range(num_steps + 1):
        where = torch.cat(points)
        if watch is not None:
            watch(step, where)
        loss, gradient = repeated.loss_and_gradient(where, step)
        losses.append(loss.unflatten(0, (len(candidates), -1)))
        for point, part in zip(points, gradient.chunk(len(candidates)), strict=True):
            point.grad = part
        optimizer.step()
    return torch.stack(losses).cpu()


def _run_alone(
    optimizer_class: Any,
    candidate: dict[str, Any],
    problem: Fitting,
    num_steps: int,
    watch: Callable[[int, Tensor], None] | None,
) -> Tensor:
    """Loss after each step of one trajectory, for optimizers that need a closure or see whole matrices."""
    mlp = problem.mlp
    sizes = [math.prod(shape) for shape in mlp.shapes]
    points = [
        part.reshape(shape).clone() for part, shape in zip(problem.initial[0].split(sizes), mlp.shapes, strict=True)
    ]
    optimizer = optimizer_class(points, **candidate)

    def where() -> Tensor:
        return torch.cat([p.flatten() for p in points])[None]

    def loss_and_gradient() -> Tensor:
        loss, gradient = problem.loss_and_gradient(where(), step)
        for point, part in zip(points, gradient[0].split(sizes), strict=True):
            point.grad = part.view_as(point)
        return loss[0]

    losses = []
    for step in range(num_steps):
        if watch is not None:
            watch(step, where())
        losses.append(loss_and_gradient())
        optimizer.step(loss_and_gradient)
    if watch is not None:
        watch(num_steps, where())
    step = num_steps
    losses.append(loss_and_gradient())
    return torch.stack(losses).cpu()


def tune(baseline: Baseline, problems: Problems | Fitting, num_steps: int) -> dict[str, Any]:
    """The candidate with the least mean loss after ``num_steps`` on the given problems.

    Args:
        baseline: The optimizer and its grid; one with a single candidate is not run.
        problems: To tune on; not those it is evaluated on.
        num_steps: Step whose mean loss counts; one that is not finite is the worst.

    Example:
        >>> from metatele.config import TaskConfig
        >>> problems = Regression(TaskConfig(widths=(3, 4, 2), samples=3)).sample(0, "tuning", range(5))
        >>> sorted(tune(BASELINES[2], problems, num_steps=3))
        ['lr', 'momentum']
    """
    if len(baseline.grid) == 1:
        return baseline.grid[0]
    final = run_candidates(baseline, baseline.grid, problems, num_steps)[-1].double().mean(-1)
    return baseline.grid[int(final.nan_to_num(nan=torch.inf).argmin())]


def baseline_curves(
    task: Regression, problems: Problems, num_steps: int, seed: int, tuning_trajectories: int = 32
) -> list[Curves]:
    """Curves of all baselines, each tuned on trajectories of a stream of its own.

    Args:
        task: The distribution of problems, to draw those for tuning from.
        problems: Those that all are evaluated on, ``[B]``.
        num_steps: Of each trajectory; they are tuned for its end.
        seed: Of the tuning stream.
        tuning_trajectories: How many; those that run one trajectory at a time are tuned on 8 of them.
    """
    device = problems.inputs.device
    tuning = task.sample(seed, "tuning", range(tuning_trajectories)).to(device)
    few = task.sample(seed, "tuning", range(min(8, tuning_trajectories))).to(device)
    result = []
    for baseline in BASELINES:
        chosen = tune(baseline, tuning if baseline.batched else few, num_steps)
        run_candidates(baseline, [chosen], problems, 1)  # what is slow once only, the first optimizer's imports say
        begin_s = time.perf_counter()
        losses = run_candidates(baseline, [chosen], problems, num_steps)[:, 0]
        seconds = (time.perf_counter() - begin_s) / (num_steps * len(problems))
        settings = {"optimizer": baseline.optimizer.__name__, **chosen, "tuned_for_step": num_steps}
        if len(baseline.grid) == 1:
            settings.pop("tuned_for_step")
        result.append(Curves(baseline.name, losses, seconds, hyperparameters=settings))
    return result
