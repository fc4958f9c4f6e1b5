"""Methods on an image set: networks of one shape, by mini-batches, evaluated on all of it after each epoch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metatele.data import ImageSet
from metatele.experiments.transfer.results import WHITENING, Scores, mean_of, shortened
from metatele.experiments.transfer.study import Study
from metatele.learned import ConstantOptimizer
from metatele.perceptron.activations import ReLU
from metatele.perceptron.losses import CrossEntropy
from metatele.perceptron.mlp import MLP
from metatele.random import generator
from metatele.tasks import Fitting
from metatele.tasks.fitting import usual_weights
from metatele.tasks.held_out import CLASSIFICATIONS
from metatele.training.baselines import run_candidates
from metatele.unroll import start

# Training loss, test loss and test accuracy of each network, by epoch.
Seen = dict[int, list[list[float]]]


class Classifying:
    """One held-out classification.

    Args:
        name: Among the held-out classifications.
        images: The set.
        study: How much of it.
    """

    def __init__(self, name: str, images: ImageSet, study: Study) -> None:
        self.name, self.images, self.kind, self.study = name, images, CLASSIFICATIONS[name], study
        self.mlp = MLP((images.features, *self.kind.hidden, images.classes), ReLU(), True)
        self.given, self.tuning = self._problems("evaluation", study.networks, 1), self._problems("tuning", 2, 2)
        self.steps = self.kind.epochs * self.given.batches

    def _problems(self, stream: str, count: int, seed: int) -> Fitting:
        w, images = usual_weights(self.mlp, count, generator(1, stream)), self.images
        x, y = images.train_images.T, images.train_labels
        return Fitting(self.mlp, x, y, w, CrossEntropy(), self.kind.batch_size, seed)

    def scores(self, flat: Tensor) -> list[list[float]]:
        """Training loss, test loss and test accuracy of each network, from flat weights ``[networks, P]``."""
        images = self.images
        parts = ((images.train_images, images.train_labels), (images.test_images, images.test_labels))
        found = []
        for row in flat:
            w, values = self.mlp.unflatten(row), []
            for x, y in parts:
                outputs = self.mlp.forward(w, x.T)
                values.append(float(CrossEntropy().value(outputs, y)))
            values.append(float((outputs.argmax(0) == y).double().mean()))
            found.append([v if math.isfinite(v) else math.inf for v in values])
        return found

    def watched(self) -> tuple[Callable[[int, Tensor], None], Seen]:
        """What is called after every step, and the scores by epoch that it fills in."""
        seen: Seen = {}

        def watch(step: int, flat: Tensor) -> None:
            if step % self.given.batches == 0:
                seen.setdefault(step // self.given.batches, []).extend(self.scores(flat))

        return watch, seen

    def rolled(self, optimizer: nn.Module, fitting: Fitting) -> Seen:
        """Scores by epoch along trajectories of a learned optimizer."""
        watch, seen = self.watched()
        with torch.no_grad():
            at = start(optimizer, fitting)
            for step in range(self.steps + 1):
                watch(step, at.weights)
                if step < self.steps:
                    at = at.advanced(optimizer)
        return seen

    def method(self, name: str, settings: dict[str, Any], seen: Seen, meta_seed: int | None = None) -> Scores:
        """What is stored of a method."""
        rows = [seen[epoch] for epoch in sorted(seen)]
        train_loss, test_loss, accuracy = (
            [[shortened(net[i], 5) for net in epoch] for epoch in rows] for i in range(3)
        )
        print(f"  {self.name}: {name} {settings or ''} {mean_of(train_loss[-1]):.4g}", flush=True)
        return Scores(name, settings, train_loss, test_loss, accuracy, meta_seed)

    def standard_methods(self) -> list[Scores]:
        """All methods but ours."""
        methods, last = [], self.kind.epochs
        for baseline in self.study.baselines:
            if baseline.name == "L-BFGS":  # its line search is for one and the same batch
                continue
            watch, seen = self.watched()
            coarse = baseline.grid[:: 2 if baseline.name != "Muon" else 1]
            run_candidates(baseline, coarse, self.tuning, self.steps, watch)
            ends = [sum(net[0] for net in seen[last][2 * c : 2 * c + 2]) for c in range(len(coarse))]
            chosen = coarse[ends.index(min(ends))]
            watch, seen = self.watched()
            run_candidates(baseline, [chosen], self.given, self.steps, watch)
            methods.append(self.method(baseline.name, chosen, seen))
        candidates = [c for c in self.study.whitening if c["damping"] >= 1e-2 and c["rate"] <= 0.2][::2]
        first = self.tuning.part(slice(1))
        ends = [sum(net[0] for net in self.rolled(ConstantOptimizer(**c), first)[last]) for c in candidates]
        best = candidates[ends.index(min(ends))]
        methods.append(self.method(WHITENING, dict(best), self.rolled(ConstantOptimizer(**best), self.given)))
        return methods
