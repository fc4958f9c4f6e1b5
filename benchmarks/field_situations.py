"""Ordinary situations that nobody tuned for: what people train, in small.

A situation makes, for a seed, a :class:`Run`: network, loss, data, number of steps, and what happens on the way. The
first weights, the batches and the data depend on the seed alone, so every optimizer gets the same ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from field_data import (
    Data,
    Maker,
    Pair,
    adding,
    bag_of_words,
    binary,
    california,
    characters,
    checkerboard,
    column_scales,
    constant_columns,
    count_targets,
    digits,
    images,
    made,
    mapped,
    mislabelled,
    most_frequent,
    parity,
    rare,
    reconstructed,
    repeated_rows,
    table,
    waves,
    word_ids,
)
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Run:
    """A network about to be trained.

    Attributes:
        model: With its first weights.
        loss: Of outputs and targets, a mean.
        data: To train on and held out.
        steps: Of the optimizer.
        batch: Rows of a step, or of one of its ``accumulate`` parts; 0 is all of them, every time the same batch.
        seed: Of the order of the rows.
        at: What happens before a step, by its number.
        count_from: Step after which held-out losses count: that of the last change of the data.
        accumulate: Backward passes of a step.
        clip: Largest norm of the gradient.
        schedule: ``onecycle`` or ``cosine``, on top of the optimizer's own rate.
        settings: For the optimizer's constructor: ``weight_decay``, what a step takes off the weights at the
            optimizer's own rate, and ``params``, groups of parameters.
        factors: On the rates of those groups.
    """

    model: nn.Module
    loss: Loss
    data: Data
    steps: int
    batch: int
    seed: int
    at: dict[int, Callable[[Run], None]] = field(default_factory=dict)
    count_from: int = 0
    accumulate: int = 1
    clip: float | None = None
    schedule: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    factors: Sequence[float] = ()

    def batches(self) -> Iterator[Pair]:
        """Without end: epoch after epoch in new order, whole batches alone, of what the data are at that time."""
        random = torch.Generator().manual_seed(1000 + self.seed)
        while True:
            source = self.data
            x, y = source.train
            if not self.batch:
                yield x, y
                continue
            for rows in torch.randperm(len(x), generator=random).split(self.batch):
                if self.data is not source:
                    break
                if len(rows) == min(self.batch, len(x)):
                    yield x[rows], y[rows]


@dataclass(frozen=True)
class Situation:
    """A run by name.

    Attributes:
        name: In tables, and for ``--only``.
        make: The run of a seed.
    """

    name: str
    make: Callable[[int], Run]


# --- networks and losses


def perceptron(
    widths: Sequence[int],
    activation: Callable[[], nn.Module] = nn.ReLU,
    norm: Callable[[int], nn.Module] | None = None,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Linear layers with an activation between; before it a norm, after it dropout, if wanted."""
    layers: list[nn.Module] = []
    for d, o in itertools.pairwise(widths):
        layers += [nn.Linear(d, o), *([norm(o)] if norm else []), activation()]
        layers += [nn.Dropout(dropout)] if dropout else []
    end = len(layers) - 1 - bool(norm) - bool(dropout)  # nothing follows the last linear layer
    return nn.Sequential(*layers[:end])


class Residual(nn.Module):
    """``x + f(x)``."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        """Add what the inner layers give."""
        return x + self.inner(x)


class Recurrent(nn.Module):
    """A fused LSTM or GRU on numbers or symbols, read out at the last step or at every one."""

    def __init__(self, kind: type[nn.RNNBase], inputs: int, hidden: int, outputs: int, symbols: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, inputs) if symbols else nn.Identity()
        self.core = kind(inputs, hidden, batch_first=True)
        self.head, self.every = nn.Linear(hidden, outputs), bool(symbols)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, outputs]``, or ``[batch, outputs, length]`` as cross-entropy has it."""
        h = self.core(self.embed(x))[0]
        return self.head(h).transpose(1, 2) if self.every else self.head(h[:, -1])


class Attending(nn.Module):
    """Symbols and positions embedded, encoder layers, the mean over positions read out."""

    def __init__(self, symbols: int, length: int, width: int, outputs: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.place = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.core = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, outputs)

    def forward(self, ids: Tensor) -> Tensor:
        """``[batch, outputs]``."""
        return self.head(self.core(self.embed(ids) + self.place).mean(1))


class Tied(nn.Module):
    """Symbols of a window embedded and mixed; the output is by the embedding's own weights."""

    def __init__(self, symbols: int, length: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.mix = nn.Sequential(nn.Flatten(), nn.Linear(length * width, 64), nn.GELU(), nn.Linear(64, width))

    def forward(self, ids: Tensor) -> Tensor:
        """``[batch, symbols]``."""
        return self.mix(self.embed(ids)) @ self.embed.weight.T


def convolutional(channels: int, size: int, norm: bool = False, widths: Sequence[int] = (8, 16)) -> nn.Sequential:
    """Convolutions of 3 x 3, each followed by a pool; then one linear layer."""
    layers: list[nn.Module] = []
    for d, o in itertools.pairwise((channels, *widths)):
        layers += [nn.Conv2d(d, o, 3, padding=1), *([nn.BatchNorm2d(o)] if norm else []), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * (size >> len(widths)) ** 2, 10))


def scaled(model: nn.Module, factor: float) -> nn.Module:
    """All weights multiplied."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(factor)
    return model


def smoothed(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with labels smoothed by 0.1."""
    return F.cross_entropy(output, target, label_smoothing=0.1)


def poisson(output: Tensor, target: Tensor) -> Tensor:
    """Minus the log-probability of counts whose log-rate the network gives; never negative."""
    return (output.exp() - target * output + torch.lgamma(target + 1)).mean()


CE, MSE, BCE, HUBER = F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits, F.smooth_l1_loss


# --- the table

SITUATIONS: dict[str, Situation] = {}


def add(
    name: str,
    data: Maker,
    network: Callable[[], nn.Module],
    loss: Loss = CE,
    batch: int = 64,
    steps: int = 300,
    prepare: Callable[[Run], None] | None = None,
    **more: Any,
) -> None:
    """Make a situation known; ``prepare`` changes its run before it begins."""

    def make(seed: int) -> Run:
        torch.manual_seed(seed)
        model = network()
        run = Run(model, loss, data(seed), steps, batch, seed, **more)
        if prepare is not None:
            prepare(run)
        return run

    assert name not in SITUATIONS
    SITUATIONS[name] = Situation(name, make)


def plain(
    name: str, data: Maker, widths: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU, **more: Any
) -> None:
    """A perceptron on a table."""
    add(name, data, lambda: perceptron(widths, activation), **more)


# --- what happens before or on the way


def frozen_first_layer(until: int) -> Callable[[Run], None]:
    """The first layer does not learn until a step."""

    def prepare(run: Run) -> None:
        first = next(run.model.children())
        first.requires_grad_(False)
        run.at[until] = lambda run: first.requires_grad_(True)  # type: ignore[assignment]

    return prepare


def changed(step: int, before: Callable[[Pair], Pair], after: Callable[[Pair], Pair]) -> Callable[[Run], None]:
    """Other data from a step on, to train on and held out."""

    def prepare(run: Run) -> None:
        later = Data(*(after(part) for part in run.data))
        run.data, run.count_from = Data(*(before(part) for part in run.data)), step
        run.at[step] = lambda run: setattr(run, "data", later)

    return prepare


def classes(low: int, high: int) -> Callable[[Pair], Pair]:
    """The rows of some classes."""

    def chosen(pair: Pair) -> Pair:
        rows = (pair[1] >= low) & (pair[1] < high)
        return pair[0][rows], pair[1][rows]

    return chosen


def pretrained(steps: int, lr: float, other: Callable[[Data], Data] | None = None) -> Callable[[Run], None]:
    """Trained with Adam before, on the same data or others."""

    def prepare(run: Run) -> None:
        goal = run.data
        run.data = other(goal) if other else goal
        optimizer, batches = torch.optim.Adam(run.model.parameters(), lr), run.batches()
        for _ in range(steps):
            x, y = next(batches)
            optimizer.zero_grad()
            run.loss(run.model(x), y).backward()
            optimizer.step()
        optimizer.zero_grad()
        run.data = goal

    return prepare


def in_double(run: Run) -> None:
    """Weights and inputs, and targets that are numbers, in float64."""
    run.model.double()
    run.data = Data(*((x.double(), y.double() if y.is_floating_point() else y) for x, y in run.data))


def in_two_groups(run: Run) -> None:
    """The last layer in a group of its own, which goes slower."""
    last = list(list(run.model.children())[-1].parameters())
    rest = [p for p in run.model.parameters() if all(p is not q for q in last)]
    run.settings["params"], run.factors = [{"params": rest}, {"params": last}], (1.0, 0.3)


STANDARD_DIGITS = mapped(digits, lambda x: (x - 0.3) / 0.38)
DIGIT_IMAGES = mapped(digits, lambda x: x.view(-1, 1, 8, 8))
OUT = 10

# tables
plain("iris, one batch, Tanh", table("iris"), (4, 16, 3), nn.Tanh, batch=0, steps=200)
plain("wine, batch 16", table("wine"), (13, 32, 32, 3), batch=16, steps=200)
plain("breast cancer, BCE, SiLU", binary(table("breast_cancer")), (30, 32, 1), nn.SiLU, loss=BCE, batch=32)
plain("diabetes, batch 32", table("diabetes", True), (10, 32, 1), loss=MSE, batch=32)
plain("diabetes, linear, one batch", table("diabetes", True), (10, 1), loss=MSE, batch=0, steps=200)
FRIEDMAN = made("friedman1", True, n_samples=1000, noise=1.0)
plain("friedman1, GELU", FRIEDMAN, (10, 64, 64, 1), nn.GELU, loss=MSE, steps=400)
BIG = made("friedman2", True, 1e3, n_samples=800, noise=50.0)
plain("friedman2, targets of 1e3, one batch", BIG, (4, 32, 1), nn.Tanh, loss=MSE, batch=0)
ARC = made("friedman3", True, n_samples=800, noise=0.1)
plain("friedman3, Huber, LeakyReLU", ARC, (4, 48, 48, 1), nn.LeakyReLU, loss=HUBER, batch=32)
SMALL = made("regression", True, 1e-3, n_samples=800, n_features=20, noise=20.0)
plain("regression, targets of 1e-3", SMALL, (20, 32, 1), loss=MSE)
plain("prices, skewed columns", california, (8, 64, 64, 1), loss=MSE, batch=128)
plain("counts, Poisson", count_targets, (8, 32, 1), nn.Softplus, loss=poisson, batch=32)
CLASSES = made("classification", n_samples=1500, n_features=20, n_informative=8, n_classes=4)
plain("classification, Sigmoid", CLASSES, (20, 64, 4), nn.Sigmoid)
plain("label noise 20 %", mislabelled(CLASSES, 0.2), (20, 64, 64, 4))
plain("moons, one batch", binary(made("moons", n_samples=500, noise=0.2)), (2, 16, 16, 1), nn.Tanh, loss=BCE, batch=0)
CIRCLES = made("circles", n_samples=600, noise=0.1, factor=0.6)
plain("circles, width 8", binary(CIRCLES), (2, 8, 8, 1), loss=BCE, batch=32)
plain("checkerboard", checkerboard, (2, 64, 64, 64, 2), batch=128, steps=600)
plain("parity of 4 bits", parity(4, 10, 1000), (10, 64, 64, 2), steps=500)
plain("xor among 20 columns, one batch", parity(2, 20, 600), (20, 32, 2), nn.Tanh, batch=0, steps=200)
MANY = made("multilabel_classification", n_samples=1000, n_features=30, n_classes=8)
plain("several labels, BCE", binary(MANY), (30, 64, 8), loss=BCE, batch=32)
plain("1 % positives", binary(rare), (20, 64, 32, 1), loss=BCE, batch=100)
plain("3000 sparse words", bag_of_words(3000, 1200), (3000, 64, 2), batch=100, steps=150)
plain("each row 8 times", repeated_rows(table("breast_cancer"), 8, 100), (30, 32, 2), batch=32)
# unnormalised inputs
plain("digits of 0 to 255", mapped(digits, lambda x: 255 * x), (64, 64, 32, OUT))
plain("a column of 1e5, three of zeros", mapped(table("wine"), constant_columns), (17, 32, 3), batch=32)
plain("columns of 1e-3 to 1e4", mapped(table("breast_cancer"), column_scales), (30, 32, 2), batch=64)
# digits and images
plain("digits, logistic regression", digits, (64, OUT))
plain("digits, one batch", digits, (64, 32, OUT), batch=0, steps=150)
plain("digits standardised", STANDARD_DIGITS, (64, 64, 32, OUT), batch=128, steps=500)
plain("digits, batch 4", digits, (64, 48, OUT), batch=4, steps=600)
plain("digits, batch 8, SiLU", digits, (64, 48, OUT), nn.SiLU, batch=8, steps=500)
plain("digits, 16 layers", digits, (64, *[32] * 15, OUT), batch=100)
plain("digits, 8 layers, Tanh", digits, (64, *[48] * 7, OUT), nn.Tanh)
plain("digits, width 1024", digits, (64, 1024, OUT), batch=128, steps=150)
plain("MNIST, batch 128", images("mnist", 4000, 1000), (784, 128, OUT), batch=128, steps=200)
plain("MNIST, batch 256, Sigmoid", images("mnist", 4000, 1000), (784, 64, OUT), nn.Sigmoid, batch=256, steps=150)
CLOTHES = images("fashion-mnist", 4000, 1000)
plain("Fashion-MNIST, smoothed labels", CLOTHES, (784, 128, 64, OUT), nn.LeakyReLU, loss=smoothed, steps=250)
# changes on the way, and what was there before
plain("first layer freed at 42", digits, (64, 48, 32, OUT), prepare=frozen_first_layer(42), batch=100)
CONTINUAL = changed(150, classes(0, 5), classes(5, 10))
plain("digits 0 to 4, then 5 to 9", digits, (64, 48, 32, OUT), prepare=CONTINUAL)
INVERTED = changed(150, lambda p: p, lambda p: (1 - p[0], p[1]))
plain("inputs inverted at 150", digits, (64, 48, 32, OUT), prepare=INVERTED)
plain("fine-tuning", digits, (64, 64, OUT), prepare=pretrained(150, 1e-2), steps=150)
FIRST_CLASSES = pretrained(200, 3e-3, lambda data: Data(*(classes(0, 5)(part) for part in data)))
plain("fine-tuning on new classes", digits, (64, 64, OUT), prepare=FIRST_CLASSES, batch=32, steps=150)
# the usual parts
add("dropout", STANDARD_DIGITS, lambda: perceptron((64, 128, 128, OUT), dropout=0.3), batch=32)
add("BatchNorm", digits, lambda: perceptron((64, 64, 64, OUT), norm=nn.BatchNorm1d), batch=32)
add("LayerNorm, GELU", FRIEDMAN, lambda: perceptron((10, 64, 64, 1), nn.GELU, nn.LayerNorm), loss=MSE)
add(
    "residual, 4 blocks",
    CLASSES,
    lambda: nn.Sequential(
        nn.Linear(20, 48),
        *(Residual(nn.LayerNorm(48), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48)) for _ in range(4)),
        nn.LayerNorm(48),
        nn.Linear(48, 4),
    ),
)
add(
    "autoencoder",
    reconstructed(digits),
    lambda: nn.Sequential(*perceptron((64, 48, 12, 48, 64)), nn.Sigmoid()),
    loss=MSE,
    steps=400,
)
plain("weights times 3", digits, (64, 64, 32, OUT), prepare=lambda run: scaled(run.model, 3) and None)
plain("weights times 0.1", digits, (64, 64, 32, OUT), nn.Tanh, prepare=lambda run: scaled(run.model, 0.1) and None)
# convolutions
add("CNN, digits", DIGIT_IMAGES, lambda: convolutional(1, 8), batch=64, steps=200)
add("CNN, CIFAR-10", images("cifar10", 2000, 300, (3, 32, 32)), lambda: convolutional(3, 32), batch=32, steps=150)
SHIRTS = images("fashion-mnist", 4000, 300, (1, 28, 28))
add("CNN with BatchNorm, Fashion-MNIST", SHIRTS, lambda: convolutional(1, 28, norm=True), batch=32, steps=120)
# sequences and text
add("LSTM, adding", adding, lambda: Recurrent(nn.LSTM, 2, 32, 1), loss=MSE, batch=32)
add("GRU, waves", waves, lambda: Recurrent(nn.GRU, 1, 24, 1), loss=MSE, batch=32, steps=200)
add("GRU, characters", characters(24, 600), lambda: Recurrent(nn.GRU, 16, 48, 20, 20), batch=16, steps=200)
add("tied embedding, characters", characters(3, 4000, every=False), lambda: Tied(20, 3, 24), batch=128, steps=400)
TOPICS = word_ids(1000, 1500, 30, 5)
add("mean of embeddings, topics", TOPICS, lambda: nn.Sequential(nn.EmbeddingBag(1000, 32), nn.Linear(32, 5)), batch=32)
add("encoder, most frequent symbol", most_frequent, lambda: Attending(6, 16, 32, 6), batch=32, steps=200)
# loops
plain("gradients clipped, batch 8", digits, (64, 48, 32, OUT), nn.GELU, batch=8, steps=500, clip=0.5)
plain("4 passes of 8 a step", CLASSES, (20, 48, 48, 4), batch=8, steps=250, accumulate=4)
plain("OneCycle on top", STANDARD_DIGITS, (64, 64, OUT), batch=32, schedule="onecycle")
plain("cosine on top", FRIEDMAN, (10, 48, 48, 1), nn.SiLU, loss=MSE, schedule="cosine")
plain("weight decay", CLASSES, (20, 64, 64, 4), batch=32, settings={"weight_decay": 1e-4})
plain("two groups", digits, (64, 48, OUT), nn.Tanh, batch=32, prepare=in_two_groups)
plain("float64", table("diabetes", True), (10, 24, 24, 1), nn.Tanh, loss=MSE, batch=64, prepare=in_double)
