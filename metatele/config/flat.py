"""Settings of the flat family, the paper's LSTMs, and of its inner problems."""

from __future__ import annotations

import math
from dataclasses import dataclass

from metatele.config.base import check_types, require, require_positive, setting

METHODS = {
    "update-tele": "LSTM(update,tele)",
    "update": "LSTM(update)",
    "lr-tele": "LSTM(lr,tele)",
}


@dataclass(frozen=True)
class TaskConfig:
    """The distribution of inner problems: fit random targets (Zhao et al. 2024, section 5.2).

    Inputs ``X [d, n]``, targets ``Y [o, n]`` and initial weights are uniform on ``[low, high]``; d and o are the first
    and the last width, n is ``samples``.

    Raises:
        ConfigError: A size is not positive, or low is not below high.

    Example:
        >>> TaskConfig(widths=(5, 8, 3), samples=4).widths
        (5, 8, 3)
    """

    widths: tuple[int, ...] = setting((20, 20, 20), "layer sizes of the inner network")
    samples: int = setting(20, "columns of X and Y")
    activation: str = setting("leaky_relu:0.1", "activation of the inner network")
    bias: bool = setting(False, "whether the inner network has biases")
    low: float = setting(0.0, "lower end of the uniform entries of X, Y and the initial weights")
    high: float = setting(1.0, "upper end of the same")

    def __post_init__(self) -> None:
        """Check sizes."""
        check_types(self)
        require(
            len(self.widths) >= 2 and all(isinstance(w, int) and w > 0 for w in self.widths),
            "widths",
            "at least two positive sizes",
            self.widths,
        )
        require_positive(self, "samples")
        require(math.isfinite(self.low) and math.isfinite(self.high), "low and high", "finite", (self.low, self.high))
        require(self.low < self.high, "low", f"below high ({self.high})", self.low)


@dataclass(frozen=True)
class MethodConfig:
    """A meta-optimizer of the flat family: which moves, and their sizes. Enough to rebuild the network.

    Raises:
        ConfigError: A value is out of range.

    Example:
        >>> MethodConfig(method="lr-tele", hidden=20).title
        'LSTM(lr,tele)'
    """

    method: str = setting("update-tele", "which moves are learned", tuple(METHODS))
    hidden: int = setting(300, "size of the LSTM cells")
    teleport_hidden: int = setting(0, "size of the teleport move's cells; 0: the same as hidden")
    layers: int = setting(2, "LSTM cells in a row")
    input_scale: float = setting(1.0, "factor on the initial weights that read the gradient")
    preprocessing: str = setting("raw", "what the LSTM sees of a gradient", ("raw", "asinh", "log-sign"))
    update_scale: float = setting(1.0, "factor on the learned update")
    gradient_rates: bool = setting(False, "gate the learned update, and add learned rates times the gradient")
    rate_low: float = setting(1e-7, "smallest learned learning rate")
    rate_high: float = setting(5e-3, "largest learned learning rate")
    rate_output: str = setting("clamp", "how an output becomes a rate between the two", ("clamp", "log"))
    rate_of: str = setting(
        "gradient", "what a learned rate multiplies: the gradient, or its direction", ("gradient", "direction")
    )
    gradient_cap: float = setting(
        0.0, "longest gradient that rates multiply, in units of the shortest so far on the trajectory; 0: any"
    )
    action: str = setting("exact", "how the group acts", ("exact", "approximate", "rescaling"))
    parametrisation: str = setting("exp", "from T to g", ("exp", "cayley", "first-order", "direct"))
    radius: float = setting(0.01, "Frobenius norm of T (at most 0.5)")
    radius_decay: float = setting(0.0, "steps after which the radius has halved, as 1/(1 + t/steps); 0: constant")
    norm: str = setting(
        "fixed", "of T: always radius, bounded by it, or learned up to it", ("fixed", "bounded", "learned")
    )

    teleport_head: float = setting(1.0, "factor on the initial weights of the teleport's head")
    teleport_mean: float = setting(
        0.0, "added to the initial T along the constant matrix (norm, before scaling); below 0 contracts the mean"
    )

    def __post_init__(self) -> None:
        """Check sizes and ranges."""
        check_types(self)
        require_positive(self, "hidden", "layers", "input_scale", "update_scale", "rate_low", "rate_high")
        require_positive(self, "radius", "teleport_head")
        require(self.rate_low < self.rate_high, "rate_low", f"below rate_high ({self.rate_high})", self.rate_low)
        require(self.teleport_hidden >= 0, "teleport_hidden", "zero or positive", self.teleport_hidden)
        require(math.isfinite(self.teleport_mean), "teleport_mean", "finite", self.teleport_mean)
        require(self.radius_decay >= 0, "radius_decay", "zero or positive", self.radius_decay)
        require(
            self.gradient_cap == 0 or 1 <= self.gradient_cap < math.inf,
            *("gradient_cap", "0 or at least 1", self.gradient_cap),
        )
        require(self.radius <= 0.5, "radius", "at most 0.5", self.radius)

    @property
    def title(self) -> str:
        """Name in tables and figures."""
        return METHODS[self.method]
