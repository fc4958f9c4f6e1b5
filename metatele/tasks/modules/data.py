"""What the data of a problem on modules are: inputs and targets, and how an output is judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Data(NamedTuple):
    """Samples.

    Attributes:
        inputs: ``[n, ...]``, numbers or tokens.
        targets: ``[n, ...]``, numbers, or classes ``[n]`` or ``[n, positions]``, where -100 does not count.
    """

    inputs: Tensor
    targets: Tensor

    def part(self, rows: Tensor | slice) -> Data:
        """Some of the samples."""
        return Data(self.inputs[rows], self.targets[rows])


class Source(Protocol):
    """Where the samples of a problem come from.

    Attributes:
        shape: Of one input.
        outputs: Numbers that a network gives for one sample, or one position.
        loss: Name in :data:`LOSSES`.
        tokens: Different tokens, where inputs are such; else 0.
        positions: Whether there are outputs for every position.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """See above."""

    @property
    def outputs(self) -> int:
        """See above."""

    @property
    def loss(self) -> str:
        """See above."""

    @property
    def tokens(self) -> int:
        """See above."""

    @property
    def positions(self) -> bool:
        """See above."""

    def draw(self, count: int, generator: torch.Generator, clean: bool = False) -> Data:
        """``count`` new samples; ``clean`` ones are without the noise that training samples have."""


def _classes(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), ignore_index=-100)


def _smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), ignore_index=-100, label_smoothing=0.1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "huber": F.smooth_l1_loss,
    "bce": F.binary_cross_entropy_with_logits,
    "ce": _classes,
    "smoothed": _smoothed,
}


def flipped(targets: Tensor, classes: int, share: float, generator: torch.Generator) -> Tensor:
    """Classes, a share of them replaced by any."""
    others = torch.randint(classes, targets.shape, generator=generator)
    return torch.where(torch.rand(targets.shape, generator=generator) < share, others, targets)
