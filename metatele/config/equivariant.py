"""Settings of the equivariant family, and of its inner problems."""

from __future__ import annotations

import math
from dataclasses import dataclass

from metatele.config.base import check_types, require, require_positive, setting

# What the equivariant family's controller sees, by kind: how many numbers, in their order.
SENSES = {"slopes": 2, "cosine": 1, "loss": 2, "spectra": 2, "sizes": 3, "clock": 1, "data": 2, "place": 3}


@dataclass(frozen=True)
class EquivariantConfig:
    """A meta-optimizer that takes networks of any shape. Enough to rebuild it."""

    hidden: int = setting(32, "size of the controller's LSTM cell")
    averaging: float = setting(0.95, "decay of the running second moments on mini-batches")
    growth: float = setting(2.0, "growth of the loss at which a step is shortened; on mini-batches its fourth power")
    hold: int = setting(16, "mini-batches between two looks of the controller, after the first 16")
    reach: float = setting(1.0, "largest relative change of a layer's pre-activations by its own step")
    small: int = setting(64, "widths up to twice this have new spectra every 4 steps, wider ones less often")
    keep: float = setting(
        2.0, "of wide layers (128, on mini-batches 96), eigenvalues below this times their mean may share one; 0: none"
    )
    opening: bool = setting(True, "teleport the network itself before the first step")
    inputs: bool = setting(True, "steps are made where the second moments of a layer's inputs have been evened out")
    errors: bool = setting(True, "the same for those of the errors")
    drift: float = setting(0.3, "largest relative change of the outputs by the teleport before the first step")
    blind: tuple[str, ...] = setting((), "numbers the controller does not see, to find out what they are worth")

    def __post_init__(self) -> None:
        """Check sizes and ranges."""
        check_types(self)
        require_positive(self, "hidden", "small", "hold")
        require(0 <= self.averaging < 1, "averaging", "in [0, 1)", self.averaging)
        require_positive(self, "reach")
        require(1 < self.growth < math.inf, "growth", "above 1", self.growth)
        require(0 <= self.keep < math.inf, "keep", "zero or positive", self.keep)
        require(0 <= self.drift < math.inf, "drift", "zero or positive", self.drift)
        require(set(self.blind) <= set(SENSES), "blind", f"among {', '.join(SENSES)}", self.blind)

    @property
    def title(self) -> str:
        """Name in tables and figures."""
        return "Equivariant(update,tele)"


@dataclass(frozen=True)
class MixtureConfig:
    """The distribution of inner problems of every shape: widths, depths, activations, data, losses, batches."""

    narrowest: int = setting(5, "least width")
    widest: int = setting(64, "largest width; widths are log-uniform")
    depths: tuple[int, ...] = setting((2, 2, 3, 3, 4), "numbers of weight layers, drawn evenly")

    def __post_init__(self) -> None:
        """Check sizes."""
        check_types(self)
        require(2 <= self.narrowest <= self.widest, "narrowest", f"from 2 to widest ({self.widest})", self.narrowest)
        require(
            len(self.depths) > 0 and all(isinstance(d, int) and d >= 2 for d in self.depths),
            *("depths", "numbers of layers, at least 2", self.depths),
        )
