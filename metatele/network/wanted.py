"""What of a network's next passes will be asked for: said beforehand, by whoever will read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metatele.network.use import RANK, WIDEST


@dataclass(frozen=True)
class Wanted:
    """What of the next passes will be asked for.

    Attributes:
        data: The first layer's inputs, whole.
        ends: The last layer's outputs.
        product: ``Σ δhᵀ`` of the last layer, to compare it with its gradient at the step.
        fingerprint: Sums by which the data are known again.
        moments: Numbers of the layers whose second moments are.
        squares: Mean squares of every layer's outputs.
        dtype: What moments and sums are computed in.
        widest: Rows up to which a moment is kept whole.
        rank: Columns of the factor of a wider one.
    """

    data: bool = False
    ends: bool = False
    product: bool = False
    fingerprint: bool = False
    moments: frozenset[int] = frozenset()
    squares: bool = False
    dtype: torch.dtype = torch.float32
    widest: int = WIDEST
    rank: int = RANK

    @property
    def anything(self) -> bool:
        """Whether a pass is looked at."""
        return self.data or self.ends or self.fingerprint or self.squares or bool(self.moments)


NOTHING = Wanted()
