"""Plain numbers drawn from one generator, for what a problem is like."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


class Draws:
    """Numbers drawn one after another.

    Args:
        generator: From which all come.

    Example:
        >>> draws = Draws(torch.Generator().manual_seed(0))
        >>> draws.choice("abc"), 4 <= draws.whole(4, 9) <= 9, draws.chance(0.0)
        ('c', True, False)
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, low: float, high: float) -> float:
        """A number between two, evenly."""
        return low + (high - low) * float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def log_uniform(self, low: float, high: float) -> float:
        """A positive number between two, its logarithm evenly."""
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def whole(self, low: int, high: int) -> int:
        """A whole positive number from ``low`` to ``high``, its logarithm evenly."""
        return max(low, min(high, int(self.log_uniform(low, high + 1))))

    def chance(self, share: float) -> bool:
        """True in a share of all draws."""
        return self.uniform(0, 1) < share

    def choice(self, options: Sequence[T]) -> T:
        """One of several, evenly; what stands there twice comes twice as often."""
        return options[min(len(options) - 1, int(self.uniform(0, len(options))))]

    def seed(self) -> int:
        """A seed for another generator."""
        return int(torch.randint(2**62, (), generator=self.generator))


def seeded(seed: int) -> torch.Generator:
    """A generator at the beginning of a seed's numbers."""
    return torch.Generator().manual_seed(seed)
