"""The paper's inner problem: fit random targets with a small perceptron (Zhao et al. 2024, Figure 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metatele.config import TaskConfig
from metatele.perceptron.activations import activation
from metatele.perceptron.losses import SquaredError
from metatele.perceptron.mlp import MLP
from metatele.random import generator
from metatele.tasks.fitting import Fitting


@dataclass(frozen=True)
class Problems:
    """A batch of inner problems ``½‖Y - f(X; w)‖²_F``, one for each trajectory.

    Attributes:
        mlp: Shape shared by all networks.
        inputs: ``X [B, d, n]``, one column per sample.
        targets: ``Y [B, o, n]``.
        initial: Initial flat weights ``[B, P]``.

    Example:
        >>> line = Problems(MLP((1, 1), ()), torch.ones(2, 1, 1), torch.zeros(2, 1, 1), torch.tensor([[3.0], [5.0]]))
        >>> len(line), line.loss_and_gradient(line.initial)
        (2, (tensor([ 4.5000, 12.5000]), tensor([[3.],
                [5.]])))
    """

    mlp: MLP
    inputs: Tensor
    targets: Tensor
    initial: Tensor

    def __len__(self) -> int:
        """Number of problems."""
        return self.inputs.shape[0]

    def loss_and_gradient(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """``½‖Y - f(X; w)‖²_F`` as ``[B]`` and its gradient ``[B, P]``, both detached.

        Args:
            flat: Weights ``[B, P]``.

        Raises:
            ShapeMismatchError: There is another number of weights.
        """
        return self.mlp.squared_error(self.mlp.unflatten(flat.detach()), self.inputs, self.targets)

    def fitting(self) -> Fitting:
        """The same problems as those of every kind are given."""
        return Fitting(self.mlp, self.inputs, self.targets, self.initial, SquaredError())

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Problems:
        """The same problems elsewhere."""
        return replace(
            self,
            inputs=self.inputs.to(device, dtype),
            targets=self.targets.to(device, dtype),
            initial=self.initial.to(device, dtype),
        )

    def repeat(self, times: int) -> Problems:
        """``times`` copies in a row, for instance one for each learning rate of a grid."""
        return replace(
            self,
            inputs=self.inputs.repeat(times, 1, 1),
            targets=self.targets.repeat(times, 1, 1),
            initial=self.initial.repeat(times, 1),
        )

    def replaced(self, where: Sequence[int], others: Problems) -> Problems:
        """A copy with the problems at some positions exchanged."""
        index = torch.tensor(list(where), device=self.inputs.device)
        return replace(
            self,
            inputs=self.inputs.index_copy(0, index, others.inputs),
            targets=self.targets.index_copy(0, index, others.targets),
            initial=self.initial.index_copy(0, index, others.initial),
        )


@dataclass(frozen=True)
class Regression:
    """Distribution of problems with all of X, Y and the weights uniform on one interval.

    The paper's has widths 20-20-20, 20 samples, LeakyReLU 0.1 and [0, 1] (Zhao et al. 2024, Figure 6).

    Args:
        config: Widths, activation, bias, number of samples and interval.

    Example:
        >>> problems = Regression(TaskConfig()).sample(seed=0, stream="train", indices=range(2))
        >>> loss, gradient = problems.loss_and_gradient(problems.initial)
        >>> loss.shape, gradient.shape
        (torch.Size([2]), torch.Size([2, 800]))
    """

    config: TaskConfig

    @property
    def mlp(self) -> MLP:
        """Shape of the inner network."""
        return MLP(self.config.widths, activation(self.config.activation), self.config.bias)

    def sample(self, seed: int, stream: str, indices: Sequence[int]) -> Problems:
        """Problems number ``indices`` of a stream; the same on every machine.

        Args:
            seed: Of all randomness.
            stream: Its use, as named in :mod:`metatele.random`; streams never overlap.
            indices: Which problems, counted from 0.
        """
        c, mlp = self.config, self.mlp
        d, o, n = c.widths[0], c.widths[-1], c.samples
        sizes = [d * n, o * n, mlp.num_parameters]
        draws = [torch.rand(sum(sizes), generator=generator(seed, stream, i)) for i in indices]
        values = c.low + (c.high - c.low) * torch.stack(draws)
        X, Y, w = values.split(sizes, -1)
        return Problems(mlp, X.unflatten(-1, (d, n)), Y.unflatten(-1, (o, n)), w.contiguous())
