"""Ten real tasks of breadth.py: small networks of many kinds, written as their users write them, and their data.

A task is sized so that one run takes about half a minute on one core. Everything about it but the seed is fixed: the
seed draws the initial weights and the order of the batches.
"""

# ruff: noqa: D101, D102 -- what forward() does is the class; a class named like its architecture needs no sentence

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Arrays = Mapping[str, np.ndarray]
Pair = tuple[Tensor, Tensor]

IMAGES, HELD_OUT = 10_000, 1_000  # of each image set
SUBSET = 1_000  # training samples on which the training loss at the end is taken
CONTEXT = 64
CHARACTERS = 65


# --- data


def gathered(root: Path) -> dict[str, np.ndarray]:
    """All that the tasks need, from the sets' own files under a folder and from scikit-learn; bytes stay bytes."""
    from sklearn.datasets import load_digits, make_friedman1

    from metatele.data.formats import read_idx, read_records

    arrays: dict[str, np.ndarray] = {}
    digits = load_digits()
    arrays["digits_x"], arrays["digits_y"] = digits.data.astype(np.uint8), digits.target.astype(np.uint8)
    x, y = make_friedman1(2_000, noise=1.0, random_state=0)
    arrays["friedman_x"], arrays["friedman_y"] = x.astype(np.float32), y.astype(np.float32)
    for name, folders in {"mnist": ("MNIST/raw", "mnist"), "fashion": ("FashionMNIST/raw", "fashion-mnist")}.items():
        folder = next((f for f in map(root.joinpath, folders) if f.is_dir()), root / folders[0])
        for split, stem, count in (("train", "train", IMAGES), ("test", "t10k", HELD_OUT)):
            for kind, rank, letter in (("images", 3, "x"), ("labels", 1, "y")):
                file = folder / f"{stem}-{kind}-idx{rank}-ubyte"
                file = file if file.is_file() else file.with_name(f"{file.name}.gz")
                arrays[f"{name}_{split}_{letter}"] = read_idx(file, rank)[:count]
    folder = root / "cifar-10-batches-bin"
    for split, file, count in (("train", "data_batch_1.bin", IMAGES), ("test", "test_batch.bin", HELD_OUT)):
        images, labels = read_records(folder / file, 1, 3 * 32 * 32, 10_000)
        arrays[f"cifar_{split}_x"] = images[:count].reshape(-1, 3, 32, 32)
        arrays[f"cifar_{split}_y"] = labels[:count].reshape(-1)
    text = (root / "tinyshakespeare" / "input.txt").read_bytes()
    codes = np.frombuffer(text, dtype=np.uint8)
    arrays["text"] = np.searchsorted(np.unique(codes), codes).astype(np.uint8)
    return arrays


def packed(path: Path, arrays: Arrays) -> None:
    """Write arrays into one compressed file."""
    np.savez_compressed(path, **arrays)


def unpacked(path: Path) -> dict[str, np.ndarray]:
    """Read what :func:`packed` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


@dataclass(frozen=True)
class Split:
    """What a run trains on and what it is judged by.

    Attributes:
        draw: A training batch, from a generator; the whole set where the task is full-batch.
        subset: Fixed training samples.
        held_out: Samples that no batch contains.
    """

    draw: Callable[[torch.Generator], Pair]
    subset: Pair
    held_out: Pair


def _sampled(x: Tensor, y: Tensor, held_out: Pair, batch: int | None) -> Split:
    def draw(random: torch.Generator) -> Pair:
        if batch is None:
            return x, y
        rows = torch.randint(len(x), (batch,), generator=random)
        return x[rows], y[rows]

    return Split(draw, (x[:SUBSET], y[:SUBSET]), held_out)


def _standard(images: np.ndarray, like: np.ndarray) -> Tensor:
    """Pixels less the training set's mean, over its standard deviation, in each channel."""
    axes = tuple(a for a in range(like.ndim) if like.ndim < 4 or a != 1)
    mean, std = like.mean(axes, keepdims=True), like.std(axes, keepdims=True)
    return torch.from_numpy(((images - mean) / std).astype(np.float32))


def _images(name: str, batch: int, to_itself: bool = False) -> Callable[[Arrays], Split]:
    def split(arrays: Arrays) -> Split:
        train, test = arrays[f"{name}_train_x"], arrays[f"{name}_test_x"]
        x, held_x = _standard(train, train), _standard(test, train)
        if to_itself:
            return _sampled(x, x, (held_x, held_x), batch)
        y, held_y = (torch.from_numpy(arrays[f"{name}_{s}_y"].astype(np.int64)) for s in ("train", "test"))
        return _sampled(x, y, (held_x, held_y), batch)

    return split


def _digits(arrays: Arrays) -> Split:
    x = torch.from_numpy(arrays["digits_x"].astype(np.float32)) / 16
    y = torch.from_numpy(arrays["digits_y"].astype(np.int64))
    test = torch.arange(len(y)) % 5 == 0  # neighbours share a writer
    return _sampled(x[~test], y[~test], (x[test], y[test]), 64)


def _friedman(arrays: Arrays) -> Split:
    x, y = (torch.from_numpy(arrays[f"friedman_{k}"]) for k in "xy")
    y = ((y - y[:1000].mean()) / y[:1000].std())[:, None]
    return _sampled(x[:1000], y[:1000], (x[1000:], y[1000:]), 64)


def _text(batch: int) -> Callable[[Arrays], Split]:
    def split(arrays: Arrays) -> Split:
        text = torch.from_numpy(arrays["text"].astype(np.int64))
        end = len(text) * 9 // 10

        def windows(begins: Tensor) -> Pair:
            places = begins[:, None] + torch.arange(CONTEXT)
            return text[places], text[places + 1]

        def draw(random: torch.Generator) -> Pair:
            return windows(torch.randint(end - CONTEXT - 1, (batch,), generator=random))

        fixed = torch.linspace(0, end - CONTEXT - 1, 128).long()
        held_out = torch.linspace(end, len(text) - CONTEXT - 1, 128).long()
        return Split(draw, windows(fixed), windows(held_out))

    return split


def _teacher(arrays: Arrays) -> Split:
    """What a random block of attention makes of random sequences, scaled to a deviation of 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher, x = Student(), torch.randn(512, 8, 16)
        with torch.no_grad():
            y = teacher(x)
    y = (y - y.mean((0, 1))) / y.std((0, 1))
    return _sampled(x[:256], y[:256], (x[256:], y[256:]), None)


# --- networks


class Residual(nn.Module):
    """``x + body(x)``."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def mlp(widths: tuple[int, ...], activation: type[nn.Module]) -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in pairwise(widths[:-1]):
        layers += [nn.Linear(i, o), activation()]
    return Headed(nn.Sequential(*layers), nn.Linear(widths[-2], widths[-1]))


class Headed(nn.Module):
    """A body and the linear layer that reads it."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Autoencoder(nn.Module):
    """784 - 256 - 32 - 256 - 784, with a residual layer on each side and BatchNorm."""

    def __init__(self, width: int = 256, code: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(784, width), nn.BatchNorm1d(width), nn.ReLU(), self._skip(width)
        )
        self.code = nn.Linear(width, code)
        self.decoder = nn.Sequential(nn.Linear(code, width), nn.BatchNorm1d(width), nn.ReLU(), self._skip(width))
        self.head = nn.Linear(width, 784)

    @staticmethod
    def _skip(width: int) -> nn.Module:
        return Residual(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoder(self.code(self.encoder(x)))).view_as(x)


def cnn() -> nn.Module:
    def layer(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]

    body = nn.Sequential(*layer(3, 16), *layer(16, 32), *layer(32, 64), nn.Flatten())
    return Headed(body, nn.Linear(64 * 16, 10))


class Block(nn.Module):
    """Two convolutions with BatchNorm beside an identity, or beside a 1 x 1 convolution where the size changes."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.norm2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.short: nn.Module = nn.Identity()
        if stride != 1:
            self.short = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.short(x))


def resnet() -> nn.Module:
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
    return Headed(nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(64, 10))


class CharGRU(nn.Module):
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(CHARACTERS, 32)
        self.gru = nn.GRU(32, width, batch_first=True)
        self.head = nn.Linear(width, CHARACTERS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.embed(x))[0])


class ViT(nn.Module):
    """16 patches of 7 x 7 and a class token, two encoder layers."""

    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 7, 7)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x[:, None]).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[:, 0]))


class MixerLayer(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 7, 7)
        self.layers = nn.Sequential(*(MixerLayer(16, width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.embed(x[:, None]).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class GPT(nn.Module):
    """Pre-norm blocks, learned positions, the head tied to the embedding."""

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(CHARACTERS, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential()
        for _ in range(depth):
            feed = (nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            self.blocks.append(Residual(nn.LayerNorm(width), Attention(width, heads, causal=True)))
            self.blocks.append(Residual(nn.LayerNorm(width), *feed))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CHARACTERS, bias=False)
        self.head.weight = self.embed.weight
        for name, p in self.named_parameters():
            if p.ndim == 2:  # what a residual branch ends in is shorter, so that depth does not matter
                ends = name.endswith(("out.weight", "body.3.weight"))
                nn.init.normal_(p, std=(width * 2 * depth if ends else width) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class Student(nn.Module):
    """One block of attention and a perceptron after it."""

    def __init__(self, width: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.attention = Residual(Attention(width, 2, causal=False))
        self.feed = Residual(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.feed(self.attention(x)))


# --- tasks


def class_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy; of every position where there are several."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


@dataclass(frozen=True)
class Task:
    """A network, its data and its loss.

    Attributes:
        title: What tables and figures call it.
        steps: Of a run.
        model: Builds the network, by torch's global generator.
        split: Its data.
        loss: Of outputs and targets.
        seconds: Of a run with AdamW on one core, roughly: what is planned by.
        extra: Whether it is left out of the means over tasks.
    """

    title: str
    steps: int
    model: Callable[[], nn.Module]
    split: Callable[[Arrays], Split]
    loss: Callable[[Tensor, Tensor], Tensor]
    seconds: float
    extra: bool = False


TASKS: dict[str, Task] = {
    "digits": Task("digits, MLP", 300, lambda: mlp((64, 128, 128, 10), nn.ReLU), _digits, class_loss, 1),
    "friedman1": Task("friedman1, MLP", 300, lambda: mlp((10, 64, 64, 1), nn.SiLU), _friedman, F.mse_loss, 1),
    "autoencoder": Task(
        "Fashion-MNIST, autoencoder", 300, Autoencoder, _images("fashion", 128, to_itself=True), F.mse_loss, 5
    ),
    "cnn": Task("CIFAR-10, CNN", 200, cnn, _images("cifar", 64), class_loss, 15),
    "resnet": Task("CIFAR-10, residual CNN", 200, resnet, _images("cifar", 64), class_loss, 20),
    "gru": Task("characters, GRU", 200, CharGRU, _text(32), class_loss, 12),
    "vit": Task("MNIST, ViT", 200, ViT, _images("mnist", 64), class_loss, 8),
    "mixer": Task("Fashion-MNIST, mixer", 200, Mixer, _images("fashion", 64), class_loss, 8),
    "gpt": Task("characters, GPT 2 x 64", 300, GPT, _text(32), class_loss, 12),
    "attention": Task("attention student, full batch", 300, Student, _teacher, F.mse_loss, 2),
    "gpt-4x128": Task("characters, GPT 4 x 128", 150, lambda: GPT(128, 4), _text(16), class_loss, 20, extra=True),
}
