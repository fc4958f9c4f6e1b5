"""What one forward and one backward pass tell an equivariant optimizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metatele.network import bias
from metatele.network.bias import with_ones
from metatele.network.use import RANK, WIDEST, Fingerprint, Moment, Use
from metatele.perceptron.mlp import Pass, Weights


class Observation(NamedTuple):
    """What a forward and a backward pass of ``[B]`` networks tell.

    What is a function is called by a step that needs it alone, and at most once; a step says before the pass what it
    will need (:meth:`~metatele.learned.equivariant.states.EquivariantStates.wants`).

    Attributes:
        gradients: ``∂L/∂W`` of each layer ``[B, o, i]``, that of a bias as last column.
        samples: n of the first layer's inputs.
        fingerprint: Of those inputs.
        outputs: z of the last layer, ``[B, o, n]``.
        error: ``∂L/∂z`` of it.
        uses: What every layer received and got back, for the numbers of the layers whose moments are wanted: of those
            at least there are moments, with ``[B]`` or, of inputs that all share, ``[1]`` in front. Mean squares are
            there for all.
        sizes: ``‖W‖²`` of each layer with its bias, ``[B, layers]``.
    """

    gradients: list[Tensor]
    samples: int
    fingerprint: Callable[[], Fingerprint]
    outputs: Tensor
    error: Tensor
    uses: Callable[[Collection[int]], list[Use]]
    sizes: Callable[[], Tensor]

    @staticmethod
    @torch.no_grad()
    def of(done: Pass, dense: int = WIDEST, rank: int = RANK) -> Observation:
        """Of a pass that has been made backwards too.

        Args:
            done: The pass.
            dense: Rows up to which moments are matrices.
            rank: Columns of factors of larger ones.

        Example:
            >>> from metatele.perceptron.activations import Tanh
            >>> from metatele.perceptron.losses import MeanSquaredError
            >>> from metatele.perceptron.mlp import MLP
            >>> _ = torch.manual_seed(0)
            >>> mlp = MLP((3, 8, 2), Tanh(), True)
            >>> done = Pass(mlp, mlp.unflatten(torch.randn(5, mlp.num_parameters)), torch.randn(3, 9))
            >>> done.backward(torch.randn(2, 9), MeanSquaredError())
            >>> seen = Observation.of(done)
            >>> seen.samples, seen.gradients[0].shape
            (9, torch.Size([5, 8, 4]))
            >>> first, last = seen.uses({1})
            >>> first.inputs, last.inputs.tensor.shape, last.errors.tensor.shape
            (None, torch.Size([5, 9, 9]), torch.Size([5, 2, 2]))
        """
        hidden = [h if h.dim() == 3 else h[None] for h in done.hidden]  # data that all share are there once

        @torch.no_grad()
        def uses(wanted: Collection[int]) -> list[Use]:
            counts = torch.tensor([z.shape[-2] * z.shape[-1] for z in done.pre]).to(done.pre[0])
            squares = (inner(done.pre, done.pre) / counts).unbind(-1)
            found = []
            for layer, (h, e, biased) in enumerate(zip(hidden, done.errors, done.mlp.biases, strict=True)):
                n, inputs, errors = h.shape[-1], None, None
                if layer in wanted:
                    inputs = Moment.of(with_ones(h) if biased else h, dense, rank).over(n)
                    errors = Moment.of(e, dense, rank)
                found.append(Use(inputs, errors, squares[layer], n))
            return found

        @torch.no_grad()
        def sizes() -> Tensor:
            weights = joined(done.weights)
            return inner(weights, weights)

        return Observation(
            joined(done.gradient()),
            hidden[0].shape[-1],
            lambda: Fingerprint.of(hidden[0]),
            done.pre[-1],
            done.errors[-1],
            uses,
            sizes,
        )


class Wants(NamedTuple):
    """What a step will read of the passes before it, beside gradients and the last layer's outputs.

    Attributes:
        layers: Those whose moments it takes in.
        fingerprint: Whether it asks whether the batch is the last one.
        squares: Whether it reads the mean squares of every layer's outputs.

    Example:
        >>> sorted(Wants.everything(2).layers)
        [0, 1]
    """

    layers: frozenset[int]
    fingerprint: bool
    squares: bool

    @staticmethod
    def everything(layers: int) -> Wants:
        """What the first step reads, of a network of so many layers."""
        return Wants(frozenset(range(layers)), True, True)


def joined(weights: Weights) -> list[Tensor]:
    """Each layer's matrix with its bias as last column."""
    return [bias.joined(W, b) for W, b in zip(weights.matrices, weights.biases, strict=True)]


def parted(layers: Sequence[Tensor], biases: Sequence[bool]) -> Weights:
    """The inverse of :func:`joined`."""
    pairs = [bias.parted(w, b) for w, b in zip(layers, biases, strict=True)]
    return Weights(tuple(W for W, _ in pairs), tuple(b for _, b in pairs))


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """``⟨a, b⟩`` of the matrices ``[B, ·, ·]`` of each layer, ``[B, layers]``."""
    if len(a[0]) == 1:  # one pass over memory, without a product in between
        return torch.stack([torch.dot(x.flatten(), y.flatten()) for x, y in zip(a, b, strict=True)])[None]
    return torch.stack([torch.linalg.vecdot(x.flatten(1), y.flatten(1)) for x, y in zip(a, b, strict=True)], -1)
