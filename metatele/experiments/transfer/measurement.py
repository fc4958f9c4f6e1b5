"""The whole measurement: meta-training, every method on every kind of problem, time; what is done is kept."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metatele import checkpoint
from metatele.command_line import make_folder
from metatele.data import ImageSet, load_images
from metatele.errors import DataError
from metatele.experiments.transfer.classification import Classifying
from metatele.experiments.transfer.methods import learned_method, standard_methods
from metatele.experiments.transfer.results import (
    OURS,
    ClassificationTask,
    Losses,
    RegressionTask,
    Results,
    Scores,
    Task,
    method_json,
)
from metatele.experiments.transfer.selection import ablations, digest, kept, selection_scores
from metatele.experiments.transfer.study import Study
from metatele.experiments.transfer.timing import milliseconds
from metatele.tasks.held_out import CLASSIFICATIONS, REGRESSIONS
from metatele.training.run import train_once


class Measurement:
    """Measures kinds of problems one after another, and keeps what it has in the run folders.

    Args:
        learned: Optimizers, one for each meta-seed.
        digests: Of their checkpoints; what was measured of another one is measured anew.
        runs: Where results of an interrupted run are.
        study: How much.
    """

    def __init__(self, learned: Sequence[nn.Module], digests: Sequence[str], runs: Path, study: Study) -> None:
        self.learned, self.digests, self.runs, self.study = list(learned), list(digests), runs, study
        self._tuned = [[b.name, b.grid] for b in study.baselines]

    def regression(self, name: str) -> RegressionTask:
        """All methods on one kind of regression."""
        kind, study = REGRESSIONS[name], self.study

        def standard() -> list[dict[str, Any]]:
            print(f"{name}: standard optimizers", flush=True)
            return [method_json(method) for method in standard_methods(name, study)]

        def ours(seed: int) -> dict[str, Any]:
            print(f"{name}: meta-seed {seed}", flush=True)
            return method_json(learned_method(name, self.learned[seed], study, seed))

        methods = [Losses(**found) for found in self._standard(name, standard)]
        methods += [Losses(**{**self._learned(name, seed, ours), **_ours(seed)}) for seed in range(len(self.learned))]
        shape = list(kind.mlp.widths)
        task = RegressionTask(name, kind.title, shape, kind.samples, kind.suffices, methods, target=study.target)
        return replace(task, milliseconds=self._milliseconds(task))

    def classification(self, name: str, images: ImageSet) -> ClassificationTask:
        """All methods on one image set."""
        classifying = Classifying(name, images, self.study)

        def standard() -> list[dict[str, Any]]:
            print(f"{name}: standard optimizers", flush=True)
            return [method_json(method) for method in classifying.standard_methods()]

        def ours(seed: int) -> dict[str, Any]:
            print(f"{name}: meta-seed {seed}", flush=True)
            seen = classifying.rolled(self.learned[seed], classifying.given)
            return method_json(classifying.method(OURS, {}, seen, seed))

        methods = [Scores(**found) for found in self._standard(name, standard)]
        methods += [Scores(**{**self._learned(name, seed, ours), **_ours(seed)}) for seed in range(len(self.learned))]
        shape, kind = list(classifying.mlp.widths), classifying.kind
        task = ClassificationTask(name, kind.title, shape, kind.batch_size, classifying.given.batches, methods)
        return replace(task, milliseconds=self._milliseconds(task))

    def _standard(self, name: str, measure: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = kept(self.runs / f"standard-{name}.json", self._tuned, measure)
        return found

    def _learned(self, name: str, seed: int, measure: Any) -> dict[str, Any]:
        file = self.runs / f"learned-{name}-{seed}.json"
        found: dict[str, Any] = kept(file, [self.digests[seed]], partial(measure, seed))
        return found

    def _milliseconds(self, task: Task) -> dict[str, float]:
        file, key = self.runs / f"milliseconds-{task.name}.json", [self._tuned, self.digests[0]]
        found: dict[str, float] = kept(file, key, partial(milliseconds, task, self.learned[0], self.study))
        return found


def _ours(seed: int) -> dict[str, Any]:
    """What earlier versions did not keep."""
    return {"name": OURS, "meta_seed": seed}


def run_folders(args: argparse.Namespace) -> list[Path]:
    """Of the meta-trainings."""
    return [Path(args.runs) / f"seed-{seed}" for seed in range(args.seeds)]


def _images(names: Sequence[str], args: argparse.Namespace) -> dict[str, ImageSet]:
    """The image sets of the classifications among the names; those that are not there are left out, if none is asked.

    Raises:
        DataError: One that was asked for is not there.
    """
    sets: dict[str, ImageSet] = {}
    for dataset in dict.fromkeys(CLASSIFICATIONS[name].dataset for name in names if name in CLASSIFICATIONS):
        try:
            sets[dataset] = load_images(dataset, args.data_root)
        except DataError as error:
            if args.tasks:
                raise
            print(f"left out: {error}", flush=True)
    return sets


def measure(args: argparse.Namespace, out: Path, study: Study) -> Results:
    """Everything that ``results.json`` holds."""
    begin_s, runs = time.perf_counter(), Path(args.runs)
    names = args.tasks or [*REGRESSIONS, *CLASSIFICATIONS]
    sets = _images(names, args)
    folders = run_folders(args)
    for seed, folder in enumerate(folders):
        train_once(study.config(seed=seed), folder)
    learned = [checkpoint.load(folder).optimizer for folder in folders]
    make_folder(out)
    measurement = Measurement(learned, [digest(folder) for folder in folders], runs, study)
    tasks: list[Task] = []
    for name in names:
        if name in REGRESSIONS:
            tasks.append(measurement.regression(name))
        elif CLASSIFICATIONS[name].dataset in sets:
            tasks.append(measurement.classification(name, sets[CLASSIFICATIONS[name].dataset]))
    versions = {
        **checkpoint.versions(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
    return Results(
        tasks=tasks,
        meta_seeds=args.seeds,
        training_seconds=[json.loads((folder / "seconds.json").read_text()) for folder in folders],
        selection_scores=selection_scores(folders, study),
        parameters=sum(p.numel() for p in learned[0].parameters()),
        ablations=ablations(tasks, runs, study) if args.ablations else [],
        versions=versions,
        seconds=time.perf_counter() - begin_s,
    )
