"""A general optimizer, models and data that several tests of the general family use."""

import copy
import functools

import torch
from torch import nn
from torch.nn import functional

import metatele
from metatele.config import GeneralConfig
from metatele.learned.general.optimizer import GeneralOptimizer
from metatele.network.heads import heads_of
from metatele.symmetry.group import GroupElement
from metatele.symmetry.heads import turn_


@functools.cache
def transfer():
    return metatele.load("checkpoints/transfer").optimizer.state_dict()


def meta(**settings):
    made = GeneralOptimizer(GeneralConfig(**settings))
    made.repeated.load_state_dict(transfer())
    return made.requires_grad_(False)


def optimizer_of(model, *arguments, settings=None, **keywords):
    return metatele.LearnedOptimizer(model, meta(**(settings or {})), *arguments, **keywords)


class Product(nn.Module):
    """``x @ W``, of raw parameters."""

    def __init__(self):
        super().__init__()
        self.W, self.b = nn.Parameter(0.5 * torch.randn(6, 8)), nn.Parameter(torch.zeros(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.tanh(x @ self.W + self.b))


class Language(nn.Module):
    """Attention with an embedding that is the last layer too."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 8), nn.Parameter(0.1 * torch.randn(1, 5, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        return self.head(self.block(self.tokens(x) + self.places)).mean(1)


class Skips(nn.Module):
    """A residual perceptron with a norm, which is no ``nn.Sequential``."""

    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Linear(6, 8), nn.Linear(8, 8)
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(self.norm(h + torch.tanh(self.inner(h))))


class Recurrent(nn.Module):
    """A fused LSTM, of which nothing is seen, and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.lstm, self.up, self.last = nn.LSTM(6, 5, batch_first=True), nn.ConvTranspose1d(5, 3, 2), nn.Linear(9, 4)

    def forward(self, x):
        h, _ = self.lstm(x[:, None].expand(-1, 2, -1))
        return self.last(self.up(h.mT).flatten(1))


def perceptron():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(36, 4)
    )


def grouped():
    """Convolutions without a batch norm, whose statistics each process has of its own share."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 4)
    )


MODELS = {
    "perceptron": perceptron,
    "convolutional": convolutional,
    "grouped": grouped,
    "language": Language,
    "product": Product,
    "skips": Skips,
    "recurrent": Recurrent,
}


def make(name, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return MODELS[name]().to(dtype)


def batch(name, step, samples=12, dtype=torch.float32):
    """Inputs and labels of a step; a negative one is always the same."""
    random = torch.Generator().manual_seed(1000 + step)
    if name == "language":
        x = torch.randint(11, (samples, 5), generator=random)
        return x, x[:, 0]
    shape = (1, 6, 6) if name in ("convolutional", "grouped") else (6,)
    x = torch.randn(samples, *shape, generator=random).to(dtype)
    return x, x.flatten(1)[:, :4].argmax(1)


def loss_of(name, model, step, samples=12, squared=False, dtype=torch.float32):
    x, labels = batch(name, step, samples, dtype)
    outputs = model(x)
    if squared:
        wanted = torch.nn.functional.one_hot(labels, outputs.shape[-1]).to(outputs.dtype)
        return functional.mse_loss(outputs, wanted)
    return functional.cross_entropy(outputs, labels)


def run(name, model, optimizer, steps, squared=False, samples=12, dtype=torch.float32, scale=1.0):
    """Losses of steps by number; a negative number stands for the batch that comes again."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(name, model, step, samples, squared, dtype) * scale
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def change(k, condition, random):
    """A matrix with singular values from ``condition^-½`` to ``condition^½``."""
    Q, P = (torch.linalg.qr(torch.randn(k, k, generator=random, dtype=torch.float64))[0] for _ in range(2))
    values = torch.logspace(-0.5, 0.5, k, base=condition, dtype=torch.float64)
    M = Q * values @ P
    return GroupElement(M, torch.linalg.inv(M))


def in_another_basis(model, x, condition=100.0, seed=1):
    """A copy in a random basis of each head."""
    model, random = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    weights = {id(p): p.detach() for p in model.parameters()}
    for head in heads_of([model(x)], list(model.parameters())):
        turn_(head, change(head.units, condition, random), weights)
    return model
