"""Which meta-seed is published, and what is lost without one thing or another."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metatele import checkpoint
from metatele.experiments.transfer.results import Ablation, RegressionTask, Results, Task, shortened
from metatele.experiments.transfer.study import Study
from metatele.files import write_atomically
from metatele.perceptron.activations import ReLU
from metatele.perceptron.losses import CrossEntropy
from metatele.perceptron.mlp import MLP
from metatele.random import generator
from metatele.tasks import Fitting, Mixture
from metatele.tasks.fitting import image_like, usual_weights
from metatele.tasks.held_out import REGRESSIONS
from metatele.training.groups import validation_score
from metatele.training.run import train_once
from metatele.unroll import losses_of


def kept(file: Path, key: list[Any], make: Callable[[], Any]) -> Any:
    """What an interrupted run had measured under the same circumstances, or what is measured now.

    Args:
        file: Where it is kept.
        key: The circumstances, in JSON values.
        make: Measures, in JSON values.
    """
    key = json.loads(json.dumps(key))
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored["key"] == key:
            return stored["found"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = make()
    write_atomically(file, json.dumps({"key": key, "found": found}).encode())
    return found


def digest(folder: Path) -> str:
    """Of a run's checkpoint."""
    found: str = checkpoint.read_config(folder)["model_sha256"]
    return found


def ablation(optimizer: nn.Module, tasks: Sequence[Task], study: Study) -> dict[str, float | None]:
    """Loss at the target step relative to tuned Adam's, for each kind of regression."""
    ratios = {}
    for task in tasks:
        if isinstance(task, RegressionTask):
            problems = REGRESSIONS[task.name].sample(1, "evaluation", study.problems)
            loss = float(losses_of(optimizer, problems, study.target)[-1].double().mean())
            ratios[task.name] = shortened(loss / task.adam, 4)
    return ratios


def ablations(tasks: Sequence[Task], runs: Path, study: Study) -> list[Ablation]:
    """Meta-training without one thing or another, in a few seeds."""
    found = []
    for name, changes in study.ablations.items():
        ratios = []
        for seed in range(study.ablation_seeds):
            folder = runs / f"ablation-{name.replace(' ', '-').replace(':', '')}-{seed}"
            train_once(study.config(trajectories=study.ablation_trajectories, seed=seed, **changes), folder)
            measure = partial(ablation, checkpoint.load(folder).optimizer, tasks, study)
            key = [digest(folder), [[task.name, task.adam] for task in tasks]]
            ratios.append(kept(folder / "ratios.json", key, measure))
        found.append(Ablation(name, ratios))
    return found


def _on_large_data(optimizer: nn.Module, study: Study) -> float:
    """Mean log of the loss relative to the initial one, half way and at the end of runs on data like images."""
    d, classes, logs = 600, 10, []
    for number, hidden in enumerate(study.selection_hidden):
        draws, mlp = generator(study.selection["seed"], "validation", number), MLP((d, *hidden, classes), ReLU(), True)
        X, labels = image_like(draws, (d, 40, classes, 30_000))
        problem = Fitting(mlp, X, labels, usual_weights(mlp, 1, draws), CrossEntropy(), 200, number)
        losses = losses_of(optimizer, problem, study.selection_steps).double()
        for step in (study.selection_steps // 2, study.selection_steps):
            ratio = losses[step - 19 : step + 1].mean() / losses[0].mean()
            logs.append(float(torch.nan_to_num(ratio, nan=1e6).clamp(1e-12, 1e6).log()))
    return sum(logs) / len(logs)


def selection_scores(folders: Sequence[Path], study: Study) -> list[float]:
    """Of each run's checkpoint on the same problems, none of them held out: the least is the best.

    The sum of the validation score on training's kinds of problems, and of its like on larger data and networks.
    """
    config = study.config(**study.selection)

    def measure(folder: Path) -> tuple[float, float]:
        optimizer = checkpoint.load(folder).optimizer
        return validation_score(optimizer, Mixture(config.task), config)[0], _on_large_data(optimizer, study)

    scores = []
    for folder in folders:
        key = [digest(folder), study.selection, study.selection_hidden, study.selection_steps]
        scores.append(sum(kept(folder / "selection.json", key, partial(measure, folder))))
    return scores


def publish(results: Results, folders: Sequence[Path], out: Path, study: Study) -> None:
    """The checkpoint of the meta-seed with the best selection score, on which no held-out problem had a say."""
    scores = results.selection_scores
    seed = scores.index(min(scores))
    found = checkpoint.load(folders[seed])
    checkpoint.save(
        out / "transfer",
        found.optimizer,
        run=study.config(seed=seed),
        progress={**found.training, "seconds": results.training_seconds[seed]},
        scores={**found.scores, "selection_score": scores[seed]},
    )
    print(f"published meta-seed {seed} in {out / 'transfer'}")
