"""Inner problems on which an optimizer that takes any shape is judged: some like those of its training, most not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metatele.perceptron.activations import LeakyReLU, ReLU, SiLU, Tanh
from metatele.perceptron.losses import Loss, MeanSquaredError, SquaredError
from metatele.perceptron.mlp import MLP
from metatele.random import generator
from metatele.tasks.fitting import Fitting, usual_weights


@dataclass(frozen=True)
class Regressions:
    """Full-batch problems of one kind.

    Attributes:
        title: What is new in it.
        mlp: Shape.
        samples: Of each problem.
        loss: Of the outputs.
        draw: ``(draws, (count, d, n)) -> (X, Y)``.
        uniform: Whether weights begin uniform on [0, 1], as the paper's, rather than as ``nn.Linear``'s.

    Example:
        >>> problems = REGRESSIONS["deep"].sample(seed=0, stream="evaluation", count=3)
        >>> problems.inputs.shape, problems.targets.shape
        (torch.Size([3, 10, 30]), torch.Size([3, 5, 30]))
    """

    title: str
    mlp: MLP
    samples: int
    loss: Loss
    draw: Callable[[torch.Generator, MLP, tuple[int, int, int]], tuple[Tensor, Tensor]]
    uniform: bool = False

    @property
    def suffices(self) -> bool:
        """Whether every hidden layer has at least as many units as there are samples."""
        return self.samples <= min(self.mlp.hidden_widths)

    def sample(self, seed: int, stream: str, count: int) -> Fitting:
        """``count`` problems of a stream; see :mod:`metatele.random`."""
        draws = generator(seed, stream)
        X, Y = self.draw(draws, self.mlp, (count, self.mlp.widths[0], self.samples))
        w = torch.rand(count, self.mlp.num_parameters, generator=draws)
        return Fitting(self.mlp, X, Y, w if self.uniform else self.mlp.flatten(self.mlp.usual_weights(w)), self.loss)


@dataclass(frozen=True)
class Classification:
    """Networks of one shape on an image set, by mini-batches.

    Attributes:
        title: As in tables.
        dataset: Image set.
        hidden: Widths.
        epochs: How long.
        batch_size: Samples of a step.

    Example:
        >>> CLASSIFICATIONS["digits"].hidden
        (48, 32)
    """

    title: str
    dataset: str
    hidden: tuple[int, ...]
    epochs: int
    batch_size: int = 200


def _uniform(draws: torch.Generator, mlp: MLP, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    count, _, n = shape
    return torch.rand(shape, generator=draws), torch.rand(count, mlp.widths[-1], n, generator=draws)


def _normal(draws: torch.Generator, mlp: MLP, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    count, _, n = shape
    return torch.randn(shape, generator=draws), torch.randn(count, mlp.widths[-1], n, generator=draws)


def _teacher(draws: torch.Generator, mlp: MLP, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    count, d, _ = shape
    X = torch.randn(shape, generator=draws)
    teacher = MLP((d, 20, mlp.widths[-1]), Tanh(), True)
    return X, teacher.forward(teacher.unflatten(2 * usual_weights(teacher, count, draws)), X)


def _waves(draws: torch.Generator, mlp: MLP, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Sums of sines of a few random directions, on a cube."""
    count, d, _ = shape
    X = 2 * torch.rand(shape, generator=draws) - 1
    directions = torch.randn(count, mlp.widths[-1], 3, d, generator=draws)
    phases = 6.3 * torch.rand(count, mlp.widths[-1], 3, 1, generator=draws)
    return X, torch.sin(2 * directions @ X[:, None] + phases).sum(2)


def _heavy(draws: torch.Generator, mlp: MLP, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Inputs by Student's t with 3 degrees of freedom; targets that depend on their sizes."""
    count, d, _ = shape
    chi = torch.randn(3, *shape, generator=draws).square().mean(0)
    X = torch.randn(shape, generator=draws) / chi.sqrt()
    mix = torch.randn(count, mlp.widths[-1], d, generator=draws) / d**0.5
    return X, mix @ X.abs().log1p()


REGRESSIONS: dict[str, Regressions] = {
    "paper": Regressions(
        "the paper's task", MLP((20, 20, 20), LeakyReLU(0.1)), 20, SquaredError(), _uniform, uniform=True
    ),
    "narrow": Regressions("width 10", MLP((10, 10, 10), LeakyReLU(0.1)), 10, SquaredError(), _normal),
    "wide": Regressions("width 128", MLP((20, 128, 20), LeakyReLU(0.1)), 96, SquaredError(), _normal),
    "deep": Regressions("4 layers, ReLU", MLP((10, 32, 32, 32, 5), ReLU(), True), 30, MeanSquaredError(), _teacher),
    "activation": Regressions("SiLU", MLP((10, 48, 48, 5), SiLU(), True), 40, MeanSquaredError(), _normal),
    "data": Regressions("heavy tails", MLP((10, 48, 5), Tanh(), True), 40, SquaredError(), _heavy),
    "paper-over": Regressions(
        "uniform, 36 samples", MLP((16, 16, 16), LeakyReLU(0.1)), 36, SquaredError(), _uniform, uniform=True
    ),
    "wide-over": Regressions("width 128", MLP((20, 128, 20), LeakyReLU(0.1)), 200, SquaredError(), _normal),
    "deep-over": Regressions(
        "4 layers, ReLU", MLP((10, 32, 32, 32, 5), ReLU(), True), 200, MeanSquaredError(), _teacher
    ),
    "deeper-over": Regressions(
        "5 layers, tanh", MLP((10, 24, 24, 24, 24, 5), Tanh(), True), 100, MeanSquaredError(), _teacher
    ),
    "activation-over": Regressions("SiLU", MLP((10, 24, 24, 5), SiLU(), True), 200, MeanSquaredError(), _teacher),
    "data-over": Regressions("waves", MLP((2, 64, 64, 1), Tanh(), True), 256, MeanSquaredError(), _waves),
}
CLASSIFICATIONS: dict[str, Classification] = {
    "digits": Classification("digits 64-48-32-10", "digits", (48, 32), 20),
    "mnist": Classification("MNIST 784-128-64-10", "mnist", (128, 64), 2),
    "mnist-wide": Classification("MNIST 784-512-256-10", "mnist", (512, 256), 2),
}
