"""The loss of a perceptron on one batch, as a function of its flat weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from metatele.losses import Loss
from metatele.mlp import MLP, Pass, Weights


@dataclass(frozen=True)
class Landscape:
    """``w ↦ L(w)`` on fixed data, for any number of networks at the same time.

    Attributes:
        mlp: Shape of the networks.
        inputs: ``[..., d, n]``, one column per sample; a batch dimension of 1 is shared by the networks.
        targets: As the loss takes them.
        loss: Of the outputs.

    Example:
        >>> import torch
        >>> from metatele.activations import Identity
        >>> from metatele.losses import SquaredError
        >>> line = Landscape(MLP((1, 1), Identity()), torch.ones(1, 1), torch.zeros(1, 1), SquaredError())
        >>> line.at(torch.tensor([[3.0], [5.0]])).value
        tensor([ 4.5000, 12.5000])
    """

    mlp: MLP
    inputs: Tensor
    targets: Tensor
    loss: Loss

    def at(self, flat: Tensor) -> Point:
        """The loss and its derivatives at weights ``[..., P]``."""
        return Point(self, flat.detach())

    def value(self, flat: Tensor) -> Tensor:
        """``L(w)``, ``[...]``; differentiable."""
        return self.loss.value(self.outputs(flat), self.targets)

    def outputs(self, flat: Tensor) -> Tensor:
        """The networks' outputs ``[..., o, n]``; differentiable."""
        return self.mlp.forward(self.mlp.unflatten(flat), self.inputs)


class Point:
    """A landscape at given weights; passes are made when first needed, and once.

    Attributes:
        landscape: The landscape.
        flat: The weights ``[..., P]``.
    """

    def __init__(self, landscape: Landscape, flat: Tensor) -> None:
        self.landscape, self.flat = landscape, flat

    @cached_property
    def forward(self) -> Pass:
        """The forward pass."""
        return Pass(self.landscape.mlp, self.landscape.mlp.unflatten(self.flat), self.landscape.inputs)

    @cached_property
    def _backward(self) -> Pass:
        self.forward.backward(self.landscape.targets, self.landscape.loss)
        return self.forward

    @cached_property
    def value(self) -> Tensor:
        """``L(w)``, ``[...]``."""
        return self.landscape.loss.value(self.outputs, self.landscape.targets)

    @property
    def outputs(self) -> Tensor:
        """The networks' outputs ``[..., o, n]``."""
        return self.forward.pre[-1]

    @cached_property
    def gradient(self) -> Tensor:
        """``∇L(w)``, flat ``[..., P]``."""
        return self.landscape.mlp.flatten(self._backward.gradient())

    def hessian_product(self, direction: Tensor) -> Tensor:
        """``∇²L(w) v``, flat ``[..., P]``."""
        mlp = self.landscape.mlp
        return mlp.flatten(self._backward.hessian_product(mlp.unflatten(direction)))

    @property
    def weights(self) -> Weights:
        """The weights, layer by layer."""
        return self.forward.weights
