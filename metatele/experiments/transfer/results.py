"""What the study measures, by type. Imports no torch.

A loss that is not finite is stored as null; here it is ``None``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

OURS, FLAT, WHITENING = "metatele transfer", "LSTM(update,tele)", "Whitening + GD"
PATIENT = "Adam for step 1000"  # tuned for that
TARGET = 100  # step whose losses are compared

Row = list[float | None]


def mean_of(values: Sequence[float | None]) -> float:
    """Mean; infinite if one is missing.

    Example:
        >>> mean_of([1.0, 3.0]), mean_of([1.0, None])
        (2.0, inf)
    """
    return math.inf if None in values else sum(v for v in values if v is not None) / len(values)


def shortened(value: float, digits: int) -> float | None:
    """A number as it is stored: so many digits, and ``None`` if it is not finite.

    Example:
        >>> shortened(3.14159, 3), shortened(math.inf, 3)
        (3.14, None)
    """
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


@dataclass(frozen=True)
class Losses:
    """One method on one kind of regression: losses of its trajectories at some steps.

    Attributes:
        name: Of the method.
        settings: Those chosen by tuning.
        trajectories: How many.
        steps: Which are stored.
        mean: Mean loss over the trajectories at each of them.
        median: Median.
        p90: 90 % quantile.
        largest: The largest.
        highest_over_first: The largest ratio of any trajectory's highest loss to its first one.
        diverged: Trajectories whose last loss is not finite.
        meta_seed: Of a learned method's training.
    """

    name: str
    settings: dict[str, Any]
    trajectories: int
    steps: list[int]
    mean: Row
    median: Row
    p90: Row
    largest: Row
    highest_over_first: float | None
    diverged: int
    meta_seed: int | None = None

    def at(self, step: int) -> float:
        """Mean loss at a step; infinite where it diverged, not a number where it was not run so far."""
        if step not in self.steps:
            return math.nan
        value = self.mean[self.steps.index(step)]
        return math.inf if value is None else value

    def reached(self, target: float) -> int | None:
        """First stored step at which the mean loss is no larger."""
        pairs = zip(self.steps, self.mean, strict=True)
        return next((step for step, value in pairs if value is not None and value <= target), None)


@dataclass(frozen=True)
class Scores:
    """One method on one image set, after each epoch: ``[epochs + 1][networks]``.

    Attributes:
        name: Of the method.
        settings: Those chosen by tuning.
        train_loss: On all training samples.
        test_loss: On all test samples.
        test_accuracy: The same.
        meta_seed: Of a learned method's training.
    """

    name: str
    settings: dict[str, Any]
    train_loss: list[Row]
    test_loss: list[Row]
    test_accuracy: list[Row]
    meta_seed: int | None = None


Method = TypeVar("Method", Losses, Scores)


class Compared(ABC, Generic[Method]):
    """Methods on one kind of problems, and how they are compared."""

    methods: list[Method]

    def of(self, name: str) -> list[Method]:
        """Every result of one method, one for each meta-seed."""
        return [method for method in self.methods if method.name == name]

    @property
    def adam(self) -> float:
        """Tuned Adam's score, to which others are compared."""
        return self.score(self.of("Adam")[0])

    @abstractmethod
    def score(self, method: Method) -> float:
        """What is compared; the less the better."""

    @abstractmethod
    def curve(self, method: Method) -> tuple[list[float], list[float]]:
        """Steps and losses, as they are drawn."""

    def scores(self, name: str) -> list[float]:
        """Those of every result of one method."""
        return [self.score(method) for method in self.of(name)]

    def curves(self, name: str) -> list[tuple[list[float], list[float]]]:
        """Those of every result of one method."""
        return [self.curve(method) for method in self.of(name)]


@dataclass(frozen=True)
class RegressionTask(Compared[Losses]):
    """All methods on one kind of regression.

    Attributes:
        name: Among the held-out ones.
        title: In tables.
        widths: Of its networks.
        samples: Of each problem.
        suffices: Whether every hidden layer is at least as wide as there are samples.
        methods: What they reached.
        milliseconds: Of one training step of one torch model, by method.
        target: Step whose losses are compared.
    """

    kind: ClassVar[str] = "regression"

    name: str
    title: str
    widths: list[int]
    samples: int
    suffices: bool
    methods: list[Losses]
    milliseconds: dict[str, float] = field(default_factory=dict)
    target: int = TARGET

    def score(self, method: Losses) -> float:
        """What is compared: the mean loss at the target step."""
        return method.at(self.target)

    def curve(self, method: Losses) -> tuple[list[float], list[float]]:
        """Steps, the first one moved to where a logarithmic axis has it, and mean losses."""
        xs = [max(step, 0.7) for step in method.steps]
        return xs, [math.nan if value is None else value for value in method.mean]


@dataclass(frozen=True)
class ClassificationTask(Compared[Scores]):
    """All methods on one image set, by mini-batches.

    Attributes:
        name: Among the held-out ones.
        title: In tables.
        widths: Of its networks.
        batch_size: Samples of a step.
        batches: Steps of an epoch.
        methods: What they reached.
        milliseconds: Of one training step of one torch model, by method.
    """

    kind: ClassVar[str] = "classification"

    name: str
    title: str
    widths: list[int]
    batch_size: int
    batches: int
    methods: list[Scores]
    milliseconds: dict[str, float] = field(default_factory=dict)

    def score(self, method: Scores) -> float:
        """What is compared: the training loss at the end."""
        return mean_of(method.train_loss[-1])

    def curve(self, method: Scores) -> tuple[list[float], list[float]]:
        """Steps at the ends of epochs, and mean training losses."""
        xs = [1.0 * epoch * self.batches for epoch in range(len(method.train_loss))]
        return xs, [mean_of(epoch) for epoch in method.train_loss]


Task = RegressionTask | ClassificationTask


@dataclass(frozen=True)
class Ablation:
    """Meta-training without something.

    Attributes:
        name: Without what.
        ratios: For each seed, loss at the target step over tuned Adam's, by kind of regression.
    """

    name: str
    ratios: list[dict[str, float | None]]


@dataclass(frozen=True)
class Results:
    """All that was measured.

    Attributes:
        tasks: Kinds of problems.
        meta_seeds: Meta-trainings.
        training_seconds: Of each; ``None`` where one was resumed.
        selection_scores: Of each; the least is published.
        parameters: Of the learned optimizer.
        ablations: Meta-trainings without something.
        versions: That results depend on.
        seconds: The whole took.
    """

    tasks: list[Task]
    meta_seeds: int
    training_seconds: list[float | None]
    selection_scores: list[float]
    parameters: int
    ablations: list[Ablation]
    versions: dict[str, str]
    seconds: float

    @property
    def names(self) -> list[str]:
        """Of all methods, in the order of the table."""
        names = dict.fromkeys(method.name for task in self.tasks for method in task.methods)
        return [*(name for name in names if name != OURS), OURS]
