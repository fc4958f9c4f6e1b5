"""What one forward and one backward pass tell an equivariant optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metatele.network.bias import with_ones
from metatele.perceptron.mlp import Pass, Weights


class Layers(NamedTuple):
    """What the controller reads of each layer; every few steps it is enough to ask for it.

    Attributes:
        inputs: h ``[B, i, n]``, with a row of ones below where the layer has a bias; ``[1, i, n]`` if it is shared.
        errors: δ ``[B, o, n]``.
        squares: Mean ``z²`` of each layer, ``[B, layers]``.
        sizes: ``‖W‖²`` of each layer with its bias, ``[B, layers]``.
    """

    inputs: list[Tensor]
    errors: list[Tensor]
    squares: Tensor
    sizes: Tensor


class Observation(NamedTuple):
    """What a forward and a backward pass of ``[B]`` networks tell.

    Attributes:
        gradients: ``∂L/∂W`` of each layer ``[B, o, i]``, that of a bias as last column.
        data: h of the first layer ``[B, d, n]``, or ``[1, d, n]`` if it is shared.
        outputs: z of the last layer, ``[B, o, n]``.
        error: ``∂L/∂z`` of it.
        layers: Makes the rest, if it is asked for.
    """

    gradients: list[Tensor]
    data: Tensor
    outputs: Tensor
    error: Tensor
    layers: Callable[[], Layers]

    @staticmethod
    @torch.no_grad()
    def of(done: Pass) -> Observation:
        """Of a pass that has been made backwards too."""
        hidden = [h if h.dim() == 3 else h[None] for h in done.hidden]  # data that all share are there once

        @torch.no_grad()
        def layers() -> Layers:
            weights = joined(done.weights)
            counts = torch.tensor([z.shape[-2] * z.shape[-1] for z in done.pre]).to(done.pre[0])
            return Layers(
                [with_ones(h) if b else h for h, b in zip(hidden, done.mlp.biases, strict=True)],
                done.errors,
                inner(done.pre, done.pre) / counts,
                inner(weights, weights),
            )

        return Observation(joined(done.gradient()), hidden[0], done.pre[-1], done.errors[-1], layers)


def joined(weights: Weights) -> list[Tensor]:
    """Each layer's matrix with its bias as last column."""
    pairs = zip(weights.matrices, weights.biases, strict=True)
    return [W if b is None else torch.cat([W, b.unsqueeze(-1)], -1) for W, b in pairs]


def parted(layers: Sequence[Tensor], biases: Sequence[bool]) -> Weights:
    """The inverse of :func:`joined`."""
    pairs = list(zip(layers, biases, strict=True))
    return Weights(tuple(w[..., :-1] if b else w for w, b in pairs), tuple(w[..., -1] if b else None for w, b in pairs))


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """``⟨a, b⟩`` of the matrices ``[B, ·, ·]`` of each layer, ``[B, layers]``."""
    if len(a[0]) == 1:  # one pass over memory, without a product in between
        return torch.stack([torch.dot(x.flatten(), y.flatten()) for x, y in zip(a, b, strict=True)])[None]
    return torch.stack([torch.linalg.vecdot(x.flatten(1), y.flatten(1)) for x, y in zip(a, b, strict=True)], -1)
