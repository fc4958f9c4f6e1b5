"""Small networks as people build them: perceptrons, convolutional, recurrent and attention ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metatele.tasks.modules.data import Source
from metatele.tasks.modules.draws import Draws

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "elu": nn.ELU,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "mish": nn.Mish,
}
_USUAL = ("relu",) * 6 + ("tanh", "tanh", "gelu", "gelu", "silu", "leaky", "elu", "sigmoid", "softplus", "mish")
# Kinds of networks on sequences.
READERS = ("attention", "attention", "attention", "gru", "lstm", "rnn", "convolution", "mean", "flat")


@dataclass(frozen=True)
class Network:
    """What a network is like; :func:`built` makes it.

    Attributes:
        kind: ``"perceptron"``, ``"convolution"``, ``"autoencoder"``, ``"patches"`` (a small ViT), or one of
            :data:`READERS`.
        depth: Hidden layers or blocks.
        width: Of hidden layers; channels of convolutions.
        activation: One of :data:`ACTIVATIONS`.
        norm: ``"none"``, ``"layer"``, ``"batch"``, ``"rms"`` or ``"group"``.
        dropout: Share of hidden units that are left out.
        residual: Whether hidden layers are added to what they read.
        bias: Whether layers have one.
        start: How weights begin: ``"default"`` (torch's), ``"orthogonal"``, ``"kaiming"``, ``"xavier"``, ``"small"``,
            or ``"gpt"``: with standard deviation 0.02, what is added to a stream less by its depth, biases at zero.
        tied: Whether tokens are written by the matrix that reads them; of a ViT, whether a class token is read.
        seed: Of the first weights.
        expansion: Hidden units of a block of attention, for each of its width.
    """

    kind: str
    depth: int
    width: int
    activation: str = "relu"
    norm: str = "none"
    dropout: float = 0.0
    residual: bool = False
    bias: bool = True
    start: str = "default"
    tied: bool = False
    seed: int = 0
    expansion: int = 2


def _norm(name: str, width: int, dimensions: int = 0) -> list[nn.Module]:
    if name == "none":
        return []
    if name == "batch":
        return [(nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[dimensions](width)]
    if dimensions:
        return [nn.GroupNorm(4 if width % 4 == 0 else 1, width)]
    return [nn.RMSNorm(width) if name == "rms" else nn.LayerNorm(width)]


class Residual(nn.Module):
    """``x + block(x)``."""

    def __init__(self, *block: nn.Module) -> None:
        super().__init__()
        self.block = nn.Sequential(*block)

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        out: Tensor = x + self.block(x)
        return out


def perceptron(network: Network, inputs: int, outputs: int) -> nn.Sequential:
    """Layers one after another; ``depth`` hidden ones."""
    layers: list[nn.Module] = []
    width = inputs
    for _ in range(network.depth):
        made: list[nn.Module] = [
            nn.Linear(width, network.width, bias=network.bias),
            *_norm(network.norm, network.width),
        ]
        made.append(ACTIVATIONS[network.activation]())
        if network.dropout:
            made.append(nn.Dropout(network.dropout))
        layers += [Residual(*made)] if network.residual and width == network.width else made
        width = network.width
    return nn.Sequential(*layers, nn.Linear(width, outputs, bias=network.bias))


def autoencoder(network: Network, inputs: int) -> nn.Sequential:
    """A perceptron whose middle layer is narrow."""
    narrow = max(2, network.width // 8)
    half = max(1, network.depth // 2)
    spec = Network("perceptron", half, network.width, network.activation, network.norm, 0.0, network.residual)
    return nn.Sequential(
        perceptron(spec, inputs, narrow), ACTIVATIONS[network.activation](), perceptron(spec, narrow, inputs)
    )


def convolutional(network: Network, shape: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Convolutions on images, halved in size now and then, then one linear layer."""
    channels, size = shape[0], shape[1]
    layers: list[nn.Module] = []
    for number in range(network.depth):
        wide = network.width
        halve = number > 0 and size >= 8
        first = nn.Conv2d(channels, wide, 3, padding=1, bias=network.bias)
        made: list[nn.Module] = [first, *_norm(network.norm, wide, 2), ACTIVATIONS[network.activation]()]
        if network.tied and channels == wide:  # here: depthwise, then pointwise
            made[:1] = [nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.Conv2d(wide, wide, 1)]
        if network.dropout:
            made.append(nn.Dropout(network.dropout))
        layers += [Residual(*made)] if network.residual and channels == wide else made
        if halve:
            layers.append(nn.MaxPool2d(2))
            size //= 2
        channels = wide
    if network.depth % 2 == 0 or size > 8:
        layers.append(nn.AdaptiveAvgPool2d(1 if network.residual else 2))
        size = 1 if network.residual else 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, outputs, bias=network.bias))


class Attention(nn.Module):
    """A block of a transformer: causal attention, then two layers, each added to what it reads."""

    def __init__(self, network: Network, heads: int, causal: bool, fused: bool) -> None:
        super().__init__()
        width = network.width
        norm = "layer" if network.norm in ("none", "batch", "group") else network.norm
        (self.before,), (self.between,) = _norm(norm, width), _norm(norm, width)
        self.heads, self.causal = heads, causal
        self.together = nn.MultiheadAttention(width, heads, batch_first=True, bias=network.bias) if fused else None
        self.read = nn.Identity() if fused else nn.Linear(width, 3 * width, bias=network.bias)
        self.write = nn.Identity() if fused else nn.Linear(width, width, bias=network.bias)
        self.layers = nn.Sequential(
            nn.Linear(width, network.expansion * width, bias=network.bias),
            ACTIVATIONS[network.activation](),
            nn.Linear(network.expansion * width, width, bias=network.bias),
            nn.Dropout(network.dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[n, positions, width]`` to the same."""
        h = self.before(x)
        if self.together is None:
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.read(h).chunk(3, -1))
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
            x = x + self.write(seen.transpose(1, 2).flatten(2))
        else:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if self.causal else None
            x = x + self.together(h, h, h, attn_mask=mask, need_weights=False)[0]
        out: Tensor = x + self.layers(self.between(x))
        return out


class Reader(nn.Module):
    """A network on sequences: what reads a token or number, blocks, and what writes, at every position or once.

    Args:
        network: Whose ``kind`` is one of :data:`READERS`.
        source: Of the sequences.
    """

    def __init__(self, network: Network, source: Source) -> None:
        super().__init__()
        self.kind, self.each, width, length = network.kind, source.positions, network.width, source.shape[0]
        self.first: nn.Module = (
            nn.Embedding(source.tokens, width)
            if source.tokens
            else nn.Linear(source.shape[-1], width, bias=network.bias)
        )
        causal = source.positions and getattr(source, "game", "") != "sort"
        layers = network.depth
        self.places = nn.Parameter(0.02 * torch.randn(length, width)) if network.kind == "attention" else None
        rows = width
        self.body: nn.Module
        match network.kind:
            case "attention":
                heads = 4 if width % 4 == 0 and width >= 32 else 2
                fused = bool(network.seed % 2)
                blocks = [Attention(network, heads, causal, fused) for _ in range(layers)]
                self.body = nn.Sequential(*blocks, nn.LayerNorm(width))
            case "gru" | "lstm" | "rnn":
                cell = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}[network.kind]
                self.body = cell(width, width, layers, batch_first=True)
            case "convolution":
                made: list[nn.Module] = []
                for _ in range(layers):
                    made += [nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(width, width, 3, bias=network.bias)]
                    made += [*_norm(network.norm, width, 1), ACTIVATIONS[network.activation]()]
                self.body = nn.Sequential(*made)
            case "mean":
                norm = "layer" if network.norm == "batch" else network.norm  # which takes no positions
                self.body = perceptron(replace(network, norm=norm), width, width)
            case _:
                rows = width
                self.body = perceptron(network, length * width, length * width if self.each else width)
        self.last = nn.Linear(rows, source.outputs, bias=network.bias)
        if network.tied and source.tokens == source.outputs:
            nn.init.normal_(self.last.weight, std=width**-0.5)
            self.first.weight = self.last.weight

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``[n, positions, outputs]``, or ``[n, outputs]``."""
        h: Tensor = self.first(x)
        if self.places is not None:
            h = h + self.places
        match self.kind:
            case "gru" | "lstm" | "rnn":
                h = self.body(h)[0]
            case "convolution":
                h = self.body(h.transpose(1, 2)).transpose(1, 2)
            case "flat":
                h = self.body(h.flatten(1))
                h = h.unflatten(-1, (x.shape[1], -1)) if self.each else h
            case _:
                h = self.body(h)
        if not self.each and h.dim() == 3:
            h = h[:, -1] if self.kind in ("gru", "lstm", "rnn") else h.mean(1)
        out: Tensor = self.last(h)
        return out


class Patches(nn.Module):
    """A small ViT: patches of an image, blocks of attention, and their mean or a class token.

    Args:
        network: Its description.
        shape: ``[channels, size, size]`` of an image.
        outputs: Numbers for each.
    """

    def __init__(self, network: Network, shape: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        (channels, size, _), width = shape, network.width
        side = patch_side(size)
        self.first = nn.Conv2d(channels, width, side, side, bias=network.bias)
        count = (size // side) ** 2 + int(network.tied)
        self.places = nn.Parameter(0.02 * torch.randn(count, width))
        self.token = nn.Parameter(0.02 * torch.randn(width)) if network.tied else None
        heads, fused = 4 if width >= 32 else 2, bool(network.seed % 2)
        blocks = [Attention(network, heads, False, fused) for _ in range(network.depth)]
        self.body = nn.Sequential(*blocks, nn.LayerNorm(width))
        self.last = nn.Linear(width, outputs, bias=network.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, channels, size, size]`` to ``[n, outputs]``."""
        h = self.first(x).flatten(2).transpose(1, 2)
        if self.token is not None:
            h = torch.cat([self.token.expand(len(h), 1, -1), h], 1)
        h = self.body(h + self.places)
        out: Tensor = self.last(h.mean(1) if self.token is None else h[:, 0])
        return out


def patch_side(size: int) -> int:
    """Of patches, in pixels: 16 or 25 of them.

    Example:
        >>> [patch_side(size) for size in (8, 10, 12, 16)]
        [2, 2, 3, 4]
    """
    return size // 4 if size % 4 == 0 else 2


def _as_gpt(model: nn.Module) -> None:
    """Standard deviation 0.02; of what is added to a stream less by its depth, so that the sum stays as large."""
    blocks = [m for m in model.modules() if isinstance(m, Attention)]
    for name, p in model.named_parameters():
        if p.dim() >= 2:
            nn.init.normal_(p, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
    for block in blocks:
        added = block.write if block.together is None else block.together.out_proj
        for layer in (added, block.layers[2]):
            nn.init.normal_(cast("nn.Linear", layer).weight, std=0.02 / (2 * len(blocks)) ** 0.5)


def _begin(model: nn.Module, start: str) -> None:
    if start == "gpt":
        _as_gpt(model)
        return
    for p in model.parameters():
        if start == "default" or p.dim() < 2:
            continue
        if start == "orthogonal":
            nn.init.orthogonal_(p)
        elif start == "kaiming":
            nn.init.kaiming_normal_(p, nonlinearity="relu")
        elif start == "xavier":
            nn.init.xavier_uniform_(p)
        else:
            nn.init.normal_(p, std=0.02)


def built(network: Network, source: Source) -> nn.Module:
    """A network for a source's samples, with its first weights; random numbers of others are left alone.

    Example:
        >>> from metatele.tasks.modules.images import Images
        >>> images = Images("shapes", 8, 1, 4, "class", "ce", 0.1, 0.0, True, 1.0)
        >>> built(Network("convolution", 2, 8), images)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 4])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(network.seed)
        if network.kind == "perceptron":
            inputs = math.prod(source.shape)
            model: nn.Module = perceptron(network, inputs, source.outputs)
            if len(source.shape) > 1:
                model = nn.Sequential(nn.Flatten(), *model.children())
        elif network.kind == "autoencoder":
            model = autoencoder(network, source.shape[0])
        elif network.kind == "patches":
            model = Patches(network, source.shape, source.outputs)
        elif network.kind == "convolution" and len(source.shape) == 3:
            model = convolutional(network, source.shape, source.outputs)
        else:
            model = Reader(network, source)
        _begin(model, network.start)
    return model


def drawn_network(draws: Draws, kind: str, broadest: int, deepest: int) -> Network:
    """A network for a kind of problem."""
    shared: dict[str, Any] = {
        "activation": draws.choice(_USUAL),
        "dropout": draws.choice((0.0, 0.0, 0.0, 0.0, 0.1, 0.3)),
        "bias": draws.chance(0.9),
        "start": draws.choice(("default",) * 7 + ("orthogonal", "kaiming", "xavier", "small")),
        "tied": draws.chance(0.3),
        "seed": draws.seed(),
    }
    norm, residual = draws.choice(("none",) * 4 + ("layer", "batch", "batch", "rms")), draws.chance(0.3)
    if kind in ("language", "patches"):
        shared["activation"] = draws.choice(("gelu", "gelu", "gelu", "relu", "silu"))
        shared["start"], shared["tied"] = draws.choice(("gpt", "gpt", "default")), draws.chance(0.5)
        shared["expansion"], layer = draws.choice((2, 4, 4)), draws.choice(("layer", "layer", "layer", "rms"))
        depth, width = draws.choice((1, 1, 2, 2, 3)), draws.choice((16, 16, 24, 32, 32, 48))
        return Network("attention" if kind == "language" else "patches", depth, width, norm=layer, **shared)
    if kind in ("tokens", "signals"):
        reader = draws.choice(READERS)
        depth, width = draws.choice((1, 1, 2, 3)), draws.choice((8, 16, 16, 32, 32, 64))
        if reader == "flat":
            width = 8
        return Network(reader, depth, width, norm=norm, residual=residual, **shared)
    if kind in ("images", "prototypes") and draws.chance(0.8 if kind == "images" else 0.5):
        depth, width = draws.choice((1, 2, 2, 3, 4)), draws.choice((4, 8, 8, 16, 32))
        return Network("convolution", depth, width, norm=norm, residual=residual, **shared)
    depth = draws.choice((0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 6, draws.whole(4, deepest)))
    depth, width = min(depth, deepest - 1), draws.whole(8, broadest)
    if kind == "autoencoder":
        return Network("autoencoder", max(2, depth), width, norm=norm, residual=residual, **shared)
    return Network("perceptron", depth, width, norm=norm, residual=residual, **shared)
