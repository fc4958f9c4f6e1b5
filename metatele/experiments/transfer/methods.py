"""Methods on one kind of regression: standard optimizers tuned on it, learned ones as they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from metatele import checkpoint
from metatele.experiments.transfer.results import FLAT, OURS, PATIENT, WHITENING, Losses, Row, shortened
from metatele.experiments.transfer.study import Study
from metatele.learned import ConstantOptimizer
from metatele.named import named_checkpoint
from metatele.tasks import Fitting, Problems
from metatele.tasks.held_out import REGRESSIONS
from metatele.training.baselines import run_candidates, tune
from metatele.unroll import losses_of


def recorded(last: int) -> list[int]:
    """Steps whose losses are stored.

    Example:
        >>> recorded(40)
        [0, 1, ..., 29, 30, 40]
    """
    return [*range(min(30, last)), *range(30, min(300, last), 10), *range(300, last, 50), last]


def summary(name: str, settings: dict[str, Any], losses: Tensor, meta_seed: int | None = None) -> Losses:
    """What is stored of losses ``[steps + 1, B]``.

    Example:
        >>> summary("SGD", {"lr": 0.1}, torch.tensor([[1.0, 2.0], [4.0, 1.0]])).mean
        [1.5, 2.5]
    """
    losses = losses.double().nan_to_num(nan=math.inf, posinf=math.inf)
    steps = recorded(len(losses) - 1)
    rows = losses[steps]

    def plain(values: Tensor) -> Row:
        return [shortened(v, 4) for v in values.tolist()]

    return Losses(
        name,
        settings,
        losses.shape[1],
        steps,
        mean=plain(rows.mean(1)),
        median=plain(rows.median(1).values),
        p90=plain(rows.quantile(0.9, 1, interpolation="lower")),
        largest=plain(rows.max(1).values),
        highest_over_first=shortened(float((losses.max(0).values / losses[0]).max()), 4),
        diverged=int((~torch.isfinite(losses[-1])).sum()),
        meta_seed=meta_seed,
    )


def standard(problems: Fitting, tuning: Fitting, study: Study) -> Iterator[tuple[str, dict[str, Any], Tensor]]:
    """Name, chosen settings and losses of every optimizer that is not learned."""
    few = tuning.part(slice(study.alone))
    for baseline in study.baselines:
        chosen = tune(baseline, tuning if baseline.batched else few, study.target)
        steps = study.steps if baseline.batched else study.alone_steps
        given = problems if baseline.batched else problems.part(slice(2 * study.alone))
        yield baseline.name, chosen, run_candidates(baseline, [chosen], given, steps)[:, 0]
        if baseline.name == "Adam":  # what it can do with more time
            chosen = tune(baseline, few, study.steps)
            yield PATIENT, chosen, run_candidates(baseline, [chosen], given, steps)[:, 0]
    grid = study.whitening
    ends = [losses_of(ConstantOptimizer(**c), few, study.target)[-1].double().mean() for c in grid]
    best = grid[int(torch.stack(ends).nan_to_num(nan=math.inf).argmin())]
    yield WHITENING, dict(best), losses_of(ConstantOptimizer(**best), problems, study.steps)


def standard_methods(name: str, study: Study) -> list[Losses]:
    """All methods but ours on one kind of regression."""
    kind = REGRESSIONS[name]
    problems = kind.sample(1, "evaluation", study.problems)
    tuning = kind.sample(1, "tuning", study.tuning)
    methods = [summary(*found) for found in standard(problems, tuning, study)]
    if name == "paper":
        # The paper's own method with this package's settings, on the one shape it fits.
        given = Problems(problems.mlp, problems.inputs, problems.targets, problems.initial)
        flat = checkpoint.load(named_checkpoint("update-tele")).optimizer
        methods.append(summary(FLAT, {}, losses_of(flat, given, study.steps)))
    return methods


def learned_method(name: str, optimizer: nn.Module, study: Study, meta_seed: int) -> Losses:
    """A learned optimizer on one kind of regression."""
    problems = REGRESSIONS[name].sample(1, "evaluation", study.problems)
    return summary(OURS, {}, losses_of(optimizer, problems, study.steps), meta_seed)
