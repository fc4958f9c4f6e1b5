"""Data of the field's situations: small, made or read in a moment, the same for a seed on every machine.

Every function takes a seed, which decides what is drawn and which fifth is held out, and returns a :class:`Data`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metatele.data import load_images

Pair = tuple[Tensor, Tensor]


class Data(NamedTuple):
    """Inputs with their targets, to train on and held out."""

    train: Pair
    held_out: Pair


Maker = Callable[[int], Data]


def split(x: Any, y: Any, seed: int, standardise: bool = True, share: float = 0.2) -> Data:
    """Hold out a random share; standardise each column by what is left to train on, if wanted."""
    inputs = torch.as_tensor(np.asarray(x), dtype=torch.float32)
    targets = torch.as_tensor(np.asarray(y))
    targets = targets.long() if targets.dtype in (torch.int32, torch.int64) else targets.float()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    held, kept = order[: int(share * len(inputs))], order[int(share * len(inputs)) :]
    if standardise:
        inputs = (inputs - inputs[kept].mean(0)) / inputs[kept].std(0).clamp_min(1e-6)
    return Data((inputs[kept], targets[kept]), (inputs[held], targets[held]))


def table(name: str, regression: bool = False) -> Maker:
    """A table that comes with scikit-learn, standardised; targets of a regression too."""

    def make(seed: int) -> Data:
        from sklearn import datasets

        x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
        return split(x, column(y) if regression else y.astype(np.int64), seed)

    return make


def made(name: str, regression: bool = False, targets: float = 1.0, standardise: bool = True, **settings: Any) -> Maker:
    """A generator of scikit-learn, ``make_…``; targets of a regression are standardised, then multiplied."""

    def make(seed: int) -> Data:
        from sklearn import datasets

        x, y = getattr(datasets, f"make_{name}")(random_state=seed, **settings)
        return split(x, targets * column(y) if regression else y.astype(np.int64), seed, standardise)

    return make


def column(y: np.ndarray) -> np.ndarray:
    """Standardised targets as a column."""
    return ((y - y.mean()) / y.std())[:, None].astype(np.float32)


def binary(maker: Maker) -> Maker:
    """Labels 0 and 1 as a column of numbers, for BCE; several labels a row stay as many columns."""

    def make(seed: int) -> Data:
        data = maker(seed)
        return Data(*((x, y.float() if y.ndim == 2 else y.float()[:, None]) for x, y in data))

    return make


def mapped(maker: Maker, inputs: Callable[[Tensor], Tensor]) -> Maker:
    """Other inputs."""

    def make(seed: int) -> Data:
        data = maker(seed)
        return Data(*((inputs(x), y) for x, y in data))

    return make


def mislabelled(maker: Maker, share: float) -> Maker:
    """A share of the training labels is drawn anew; the held-out ones stay."""

    def make(seed: int) -> Data:
        (x, y), held_out = maker(seed)
        random = torch.Generator().manual_seed(seed)
        wrong = torch.rand(len(y), generator=random) < share
        drawn = torch.randint(int(y.max()) + 1, y.shape, generator=random)
        return Data((x, torch.where(wrong, drawn, y)), held_out)

    return make


def repeated_rows(maker: Maker, times: int, rows: int) -> Maker:
    """A few training rows, each several times."""

    def make(seed: int) -> Data:
        (x, y), held_out = maker(seed)
        return Data((x[:rows].repeat(times, 1), y[:rows].repeat(times, *[1] * (y.ndim - 1))), held_out)

    return make


def digits(seed: int) -> Data:
    """8x8 images in [0, 1]."""
    from sklearn import datasets

    x, y = datasets.load_digits(return_X_y=True)
    return split(x / 16, y, seed, standardise=False)


def reconstructed(maker: Maker) -> Maker:
    """The targets are the inputs."""

    def make(seed: int) -> Data:
        data = maker(seed)
        return Data(*((x, x) for x, _ in data))

    return make


@lru_cache(maxsize=4)
def subset(name: str, train: int, held_out: int) -> Data:
    """Read once."""
    images = load_images(name)
    kept = images.train_images[:train].clone(), images.train_labels[:train].clone()
    return Data(kept, (images.test_images[:held_out].clone(), images.test_labels[:held_out].clone()))


def images(name: str, train: int, held_out: int, shape: tuple[int, ...] = ()) -> Maker:
    """The first images of a set on disk, whatever the seed, as rows or of a shape, in [-1, 1]."""

    def make(seed: int) -> Data:
        parts = subset(name, train, held_out)
        return Data(*(((x.view(-1, *shape) if shape else x) * 2 - 1, y) for x, y in parts))

    return make


# --- made by hand


def checkerboard(seed: int) -> Data:
    """Four by four fields of two colours."""
    x = np.random.default_rng(seed).uniform(0, 4, (1500, 2))
    return split(x, np.floor(x).sum(1).astype(np.int64) % 2, seed)


def parity(bits: int, columns: int, rows: int) -> Maker:
    """Whether an even number of the first bits is set; the other columns say nothing."""

    def make(seed: int) -> Data:
        x = np.random.default_rng(seed).integers(0, 2, (rows, columns))
        return split(2 * x - 1, x[:, :bits].sum(1) % 2, seed, standardise=False)

    return make


def rare(seed: int) -> Data:
    """One row in a hundred is positive: where a noisy projection is largest."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(1500, 20))
    score = x[:, :5].sum(1) + 0.5 * random.normal(size=1500)
    return split(x, (score > np.quantile(score, 0.99)).astype(np.int64), seed, share=0.4)


def count_targets(seed: int) -> Data:
    """Counts, to be explained by their log-rate."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(1000, 8))
    return split(x, random.poisson(np.exp(0.5 * x[:, :1] + np.sin(x[:, 1:2]))).astype(np.float32), seed)


def column_scales(x: Tensor) -> Tensor:
    """Columns of scales from 1e-3 to 1e4."""
    return x * torch.logspace(-3, 4, x.shape[1])


def constant_columns(x: Tensor) -> Tensor:
    """A column of 1e5 and three of zeros beside the others."""
    return torch.cat([x, torch.full((len(x), 1), 1e5), torch.zeros(len(x), 3)], 1)


def bag_of_words(words: int, rows: int, length: int = 40) -> Maker:
    """Counts of words in documents of two topics, whose words differ a little; nearly all are zero."""

    def make(seed: int) -> Data:
        ids, y = documents(words, rows, length, 2, seed)
        counts = np.zeros((rows, words), np.float32)
        np.add.at(counts, (np.arange(rows)[:, None], ids), 1)
        return split(counts, y, seed, standardise=False)

    return make


def word_ids(words: int, rows: int, length: int, topics: int) -> Maker:
    """The same documents as rows of word numbers."""
    return lambda seed: _whole(split(*documents(words, rows, length, topics, seed), seed, standardise=False))


def documents(words: int, rows: int, length: int, topics: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Words with Zipf's frequencies, a tenth of them three times as frequent in a topic of their own."""
    random = np.random.default_rng(seed)
    frequency = np.tile(1 / np.arange(10, words + 10), (topics, 1))
    for row in frequency:
        row[random.choice(words, words // 10, replace=False)] *= 3
    frequency /= frequency.sum(1, keepdims=True)
    y = random.integers(0, topics, rows)
    ids = np.stack([random.choice(words, length, p=frequency[topic]) for topic in y])
    return ids, y


def _whole(data: Data) -> Data:
    return Data(*((x.long(), y) for x, y in data))


def characters(length: int, rows: int, every: bool = True, symbols: int = 20) -> Maker:
    """Sequences of a random Markov chain of second order, and what follows: each symbol, or the last one alone."""

    def make(seed: int) -> Data:
        random = np.random.default_rng(seed)
        chain = random.dirichlet(np.full(symbols, 0.1), (symbols, symbols)).cumsum(-1)
        text = random.integers(0, symbols, (rows, length + 1))
        for k in range(2, length + 1):
            rates = chain[text[:, k - 2], text[:, k - 1]]
            text[:, k] = (random.random((rows, 1)) > rates[:, :-1]).sum(1)
        following = text[:, 1:] if every else text[:, -1]
        return _whole(split(text[:, :-1], following, seed, standardise=False))

    return make


def adding(seed: int) -> Data:
    """Sum of the two marked numbers of a sequence of 12."""
    random = np.random.default_rng(seed)
    x = np.stack([random.uniform(-1, 1, (1200, 12)), np.zeros((1200, 12))], -1)
    for row in x:
        row[random.choice(12, 2, replace=False), 1] = 1
    return split(x, (x[..., 0] * x[..., 1]).sum(1, keepdims=True).astype(np.float32), seed, standardise=False)


def waves(seed: int) -> Data:
    """The next value of a noisy sum of two sines, from the last 24."""
    random = np.random.default_rng(seed)
    rates, phases = random.uniform(0.2, 1.0, (1000, 2, 1)), random.uniform(0, 6.3, (1000, 2, 1))
    series = np.sin(rates * np.arange(25) + phases).sum(1) + 0.05 * random.normal(size=(1000, 25))
    return split(series[:, :-1, None], series[:, -1:].astype(np.float32), seed, standardise=False)


def most_frequent(seed: int) -> Data:
    """Which of six symbols is the most frequent of 16."""
    random = np.random.default_rng(seed)
    ids = np.stack([random.choice(6, 16, p=random.dirichlet(np.ones(6))) for _ in range(1500)])
    y = np.array([np.bincount(row, minlength=6).argmax() for row in ids])
    return _whole(split(ids, y, seed, standardise=False))


def california(seed: int) -> Data:
    """A table of eight skewed columns of very different scales, with a price that is cut off at a ceiling."""
    random = np.random.default_rng(seed)
    x = np.exp(random.normal(size=(2000, 8)) * random.uniform(0.2, 1, 8)) * 10.0 ** random.uniform(-1, 2, 8)
    z = (np.log(x) - np.log(x).mean(0)) / np.log(x).std(0)
    y = np.exp(0.4 * z[:, 0] - 0.3 * z[:, 1] * z[:, 2] + 0.2 * np.sin(2 * z[:, 3]) + 0.2 * random.normal(size=2000))
    return split(x, np.minimum(y, 3)[:, None].astype(np.float32), seed)
