"""An inner run as a worker's job, and a meta-optimizer's evolved parameters as one vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from metatele.config import ModulesConfig
from metatele.learned.general.optimizer import GeneralOptimizer
from metatele.tasks.modules import Modules
from metatele.training.inner import REFERENCE_RATES, MakeOptimizer, adam, better, plain, run


class Job(NamedTuple):
    """An inner run for a worker.

    Attributes:
        problem: Seed, stream and index.
        parameters: The meta-optimizer's, as plain numbers; without them Adam runs at its rates.
        notes: Whether the mean of what the controller saw is told behind the outcome.
    """

    problem: tuple[int, str, int]
    parameters: Sequence[float] | None
    notes: bool = False


def worker(task: ModulesConfig, build: Callable[[], nn.Module], make: MakeOptimizer) -> Callable[[Job], list[Any]]:
    """What works off a :class:`Job`; made in the process where it is called."""
    modules, meta = Modules(task), build().requires_grad_(False)

    def work(job: Job) -> list[Any]:
        problem = modules.sample(*job.problem)
        if job.parameters is None:
            runs = [run(problem, adam(rate)) for rate in REFERENCE_RATES]
            found = better(runs)
            return plain(found._replace(seconds=sum(one.seconds for one in runs)))
        set_flat(meta, torch.tensor(job.parameters, dtype=torch.float64))
        empty: list[Tensor] = []
        with cast("GeneralOptimizer", meta).noting() if job.notes else nullcontext(empty) as noted:
            found = run(problem, lambda model, total_steps: make(meta, model, total_steps))
        return plain(found._replace(seen=tuple(torch.stack(noted).mean(0).tolist())) if noted else found)

    return work


def flat(meta: nn.Module) -> Tensor:
    """The evolved parameters as one vector of doubles."""
    return torch.cat([p.detach().flatten().double() for p in evolved_of(meta)])


def evolved_of(meta: nn.Module) -> list[nn.Parameter]:
    """What is changed of a meta-optimizer: what it says, else all parameters."""
    evolved: Callable[[], list[nn.Parameter]] = getattr(meta, "evolved", lambda: list(meta.parameters()))
    return evolved()


@torch.no_grad()
def set_flat(meta: nn.Module, values: Tensor) -> None:
    """The inverse of :func:`flat`."""
    parameters = evolved_of(meta)
    for p, part in zip(parameters, values.split([p.numel() for p in parameters]), strict=True):
        p.copy_(part.view_as(p))
