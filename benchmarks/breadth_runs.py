"""One run of breadth.py: a task, an optimizer, a seed; its curves and its times."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from breadth_tasks import TASKS, Arrays, Pair, Split, Task
from peers import METHODS, schedule
from torch import Tensor, nn

POINTS = 30
BLOCK = 10  # steps; optimizers that work more at every tenth step do so once in each
TWIN_BLOCKS = 5  # blocks of AdamW's steps in the course of a run
CHUNK = 50  # held-out samples in one forward pass


@dataclass(frozen=True)
class Job:
    """One run: what identifies it in the file of raw results."""

    task: str
    method: str
    seed: int
    lr: float = 0.0
    weight_decay: float = 0.0
    rest_lr: float = 0.0

    @property
    def settings(self) -> dict[str, float]:
        """What the optimizer is built with; empty where nothing is to be set."""
        found = {"lr": self.lr, "weight_decay": self.weight_decay, "rest_lr": self.rest_lr}
        return {k: v for k, v in found.items() if self.lr and (v or k != "rest_lr")}


def loss_on(task: Task, model: nn.Module, samples: Pair) -> float:
    """Mean loss of fixed samples, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        parts = [
            (len(x), float(task.loss(model(x), y))) for x, y in zip(*(s.split(CHUNK) for s in samples), strict=True)
        ]
    model.train()
    return sum(n * loss for n, loss in parts) / sum(n for n, _ in parts)


def norm_statistics_(model: nn.Module, x: Tensor) -> None:
    """BatchNorm's statistics at the weights of now: an average of weights has none of its own."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    kept = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # a plain mean over the chunks
    with torch.no_grad():
        for chunk in x.split(CHUNK):
            model(chunk)
    for m, momentum in zip(norms, kept, strict=True):
        m.momentum = momentum


def stepped(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Pair) -> tuple[float, float]:
    """Loss and seconds of one training step: forward, backward, update."""
    x, y = batch
    begin = time.perf_counter()
    optimizer.zero_grad()
    loss = task.loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item(), time.perf_counter() - begin


def block_ms(seconds: Sequence[float]) -> float:
    """Median over blocks of ten steps of their mean, in ms; the first block, which warms up, is left out."""
    blocks = [seconds[i : i + BLOCK] for i in range(0, len(seconds) - BLOCK + 1, BLOCK)]
    return 1e3 * statistics.median(statistics.fmean(b) for b in (blocks[1:] or [seconds]))


class Twin:
    """AdamW on a copy of the task, timed in the same process at several times of the same run."""

    def __init__(self, task: Task, split: Split, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = task.model()
        self.task, self.split, self.random = task, split, torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.seconds: list[float] = []

    def advance(self) -> None:
        """One block of steps."""
        for _ in range(BLOCK):
            batch = self.split.draw(self.random)
            self.seconds.append(stepped(self.task, self.model, self.optimizer, batch)[1])


def trained(job: Job, arrays: Arrays, steps: int | None = None, beside: bool = False) -> dict[str, Any]:
    """Curves and times of one run.

    Args:
        job: The run.
        arrays: All data.
        steps: In place of the task's own number.
        beside: Whether AdamW is timed in the course of the run.

    Returns:
        A row: ``train[0]`` is the loss of the fixed training samples at the beginning, each later entry the mean of
        the batches' losses since the point before; ``held_out`` is taken at each point.

    Raises:
        UnavailableError: If the method can't be built here.
    """
    task, method = TASKS[job.task], METHODS[job.method]
    steps = steps or task.steps
    split = task.split(arrays)
    torch.manual_seed(job.seed)
    model, random = task.model(), torch.Generator().manual_seed(job.seed)
    optimizer = method.make(model, steps, job.settings)
    scheduler = None
    if method.scheduled:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: schedule(min(t, steps - 1), steps))

    def judged(samples: Pair) -> float:
        if method.averaged:
            optimizer.eval()
            norm_statistics_(model, split.subset[0])
        loss = loss_on(task, model, samples)
        if method.averaged:
            optimizer.train()
        return loss

    at = sorted({round(i * steps / POINTS) for i in range(POINTS + 1)})
    train, held_out = [judged(split.subset)], [judged(split.held_out)]
    losses: list[float] = []
    seconds: list[float] = []
    twin = Twin(task, split, job.seed) if beside else None
    failed, begin = "", time.perf_counter()
    for step in range(1, steps + 1):
        try:
            loss, time_s = stepped(task, model, optimizer, split.draw(random))
        except RuntimeError as error:  # torch's decompositions fail on what is not finite
            failed = f"step {step}: {error}".splitlines()[0]
            break
        if scheduler is not None:
            scheduler.step()
        losses.append(loss)
        seconds.append(time_s)
        if not math.isfinite(loss):
            failed = f"step {step}: the loss is {loss}"
            break
        if step in at:
            train.append(statistics.fmean(losses))
            held_out.append(judged(split.held_out))
            losses.clear()
        if twin is not None and step % max(1, steps // TWIN_BLOCKS) == 0:
            twin.advance()
    missing = [math.nan] * (len(at) - len(held_out))
    row = {
        **asdict(job),
        "settings": job.settings,
        "steps": steps,
        "at": at,
        "train": [*train, *missing],
        "held_out": [*held_out, *missing],
        "train_end": math.nan if failed else judged(split.subset),
        "ms_per_step": block_ms(seconds) if seconds else math.nan,
        "mean_ms_per_step": 1e3 * statistics.fmean(seconds) if seconds else math.nan,
        "seconds": time.perf_counter() - begin,
        "failed": failed,
        "where": {"torch": torch.__version__, "machine": platform.machine(), "cores": os.cpu_count()},
    }
    if twin is not None and twin.seconds:
        row["adamw_ms_per_step"] = block_ms(twin.seconds)
    return plain(row)


def plain(value: Any) -> Any:
    """Floats of six digits; null for what is not finite."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list) else value
