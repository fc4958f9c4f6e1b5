"""The loss of a perceptron on one batch, as a function of its flat weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from metatele.losses import Loss
from metatele.mlp import MLP


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
        >>> line.value_and_gradient(torch.tensor([[3.0], [5.0]]))[0]
        tensor([ 4.5000, 12.5000])
    """

    mlp: MLP
    inputs: Tensor
    targets: Tensor
    loss: Loss

    def value(self, flat: Tensor) -> Tensor:
        """``L(w)``, ``[...]``; differentiable."""
        return self.loss.value(self.mlp.forward(self.mlp.unflatten(flat), self.inputs), self.targets)

    def value_and_gradient(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """``L(w)`` ``[...]`` and ``∇L(w)`` ``[..., P]``, detached."""
        return self.mlp.value_and_gradient(self.mlp.unflatten(flat.detach()), self.inputs, self.targets, self.loss)

    def hessian_product(self, flat: Tensor, direction: Tensor) -> Tensor:
        """``∇²L(w) v`` ``[..., P]``, detached."""
        unflatten = self.mlp.unflatten
        return self.mlp.hessian_product(
            unflatten(flat.detach()), self.inputs, self.targets, self.loss, unflatten(direction.detach())
        )

    def outputs(self, flat: Tensor) -> Tensor:
        """The networks' outputs ``[..., o, n]``."""
        return self.mlp.forward(self.mlp.unflatten(flat), self.inputs)
