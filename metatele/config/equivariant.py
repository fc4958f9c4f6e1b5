"""Settings of the equivariant family, and of its inner problems."""

from __future__ import annotations

import math
from dataclasses import dataclass

from metatele.config.base import check_types, require, require_positive, setting

# Kinds of numbers that the equivariant family's controller reads; which there are, its own table says.
SENSES = ("slopes", "cosine", "loss", "spectra", "sizes", "clock", "data", "place")


@dataclass(frozen=True)
class EquivariantConfig:
    """A meta-optimizer that takes networks of any shape. Enough to rebuild it.

    What is not said to be learned is a constant of the algorithm: the shipped checkpoint was meta-trained with the
    defaults, and others change what it does on every network.

    Example:
        >>> EquivariantConfig(hold=1).hold
        1
    """

    # the controller
    hidden: int = setting(32, "size of the controller's LSTM cell")
    blind: tuple[str, ...] = setting((), "numbers the controller does not see, to find out what they are worth")
    hold: int = setting(16, "mini-batches between two looks of the controller, after the first (warm)")
    warm: int = setting(
        16, "batches that differ, up to which every step has controls of its own: early steps matter most"
    )
    recognise: int = setting(32, "steps between two looks at what kind of loss it is; it hardly ever changes")

    head: float = setting(
        0.3, "factor of the controller's first output weights, so that it begins by its offsets; learned"
    )

    # moments and their spectra
    inputs: bool = setting(True, "steps are made where the second moments of a layer's inputs have been evened out")
    errors: bool = setting(True, "the same for those of the errors")
    averaging: float = setting(0.95, "decay of the running second moments on mini-batches")
    fewest: int = setting(
        32, "samples of meta-training's smallest batches; smaller ones count and step less, in proportion"
    )
    stride: int = setting(32, "most steps between two batches that a running average takes in; fewer hardly change it")
    slow: int = setting(4, "least steps between two spectra, which cost more than the rest of a step")
    slow_looks: int = setting(3, "least looks of the controller between two spectra, for the same reason")
    between: int = setting(4, "batches that a running average takes in between two spectra, at least")
    young: int = setting(
        4,
        "most steps between two batches taken in or two spectra are the age over this: early moments change fast",
    )
    young_wide: int = setting(2, "the same of batches in layers wider than dense, whose moments take long to join")
    small: int = setting(64, "widths up to twice this have new spectra every 4 steps, wider ones less often")
    keep: float = setting(
        2.0, "of wide layers (whole, whole_averaged), eigenvalues below this times their mean may share one; 0: none"
    )
    margin: int = setting(
        8,
        "one more column for every so many eigenvalues that share none, and one: the next spectrum may have more",
    )
    whole: int = setting(128, "rows up to which moments of one batch keep every eigenvalue")
    whole_averaged: int = setting(96, "rows up to which averaged moments do; noise leaves small ones no meaning")
    dense: int = setting(
        1024, "rows up to which moments are matrices; of wider ones, factors of a few columns are kept"
    )
    rank: int = setting(64, "columns of such a factor; of one batch it may have twice as many")

    # length of a step
    start: float = setting(-2.5, "log of the first step size, in units of pre-activations as large as they are")
    follow: float = setting(
        0.4, "share of the best length, as slopes tell it, in the next one; learned, this begins it"
    )
    floor: float = setting(0.01, "of a mean squared pre-activation, so that outputs near zero do not forbid every step")
    reach: float = setting(1.0, "largest relative change of a layer's pre-activations by its own step")
    fastest: float = setting(10.0, "log of the largest step size, far above any useful one: it must not overflow")
    far: float = setting(4.0, "times the squared length of D when the controller looked, up to which D is not cut")

    # what is done about a step after which the loss has grown
    growth: float = setting(2.0, "growth of the loss at which a step is shortened; on mini-batches its fourth power")
    shorten: float = setting(0.1, "what is left of a step that is shortened")
    forgive: float = setting(
        4.0, "growth granted after a step shortened right after another: the step was not to blame"
    )
    crept: float = setting(
        10.0, "growth of the loss above its lowest, in small steps, at which a step is shortened too"
    )
    leak: float = setting(0.02, "rise of the log of that lowest loss with every step, so that it is forgotten")

    # the teleport before the first step
    opening: bool = setting(True, "teleport the network itself before the first step")
    drift: float = setting(0.3, "largest relative change of the outputs by the teleport before the first step")
    opening_damping: float = setting(0.01, "damping of its moments, relative to their mean eigenvalue")
    opening_power: float = setting(0.88, "share of their spread that it takes away; 1 would follow rounding and noise")
    opening_fit: float = setting(
        1e-6, "relative damping of its least squares: nearly equal units would get huge weights"
    )
    opening_floor: float = setting(
        1e-3, "singular values of the inputs, relative to their norm, below which none is inverted"
    )
    opening_refit: float = setting(1e-2, "relative damping with which the next layer makes up for those left out")

    def __post_init__(self) -> None:
        """Check sizes and ranges."""
        check_types(self)
        require_positive(self, "hidden", "small", "hold", "recognise", "fewest", "stride", "slow", "dense", "rank")
        require_positive(self, "slow_looks", "between", "young", "young_wide", "margin", "head")
        require_positive(self, "reach", "far", "opening_damping", "opening_fit", "opening_floor", "opening_refit")
        require(0 <= self.averaging < 1, "averaging", "in [0, 1)", self.averaging)
        for name in ("growth", "forgive", "crept"):
            require(1 < getattr(self, name) < math.inf, name, "above 1", getattr(self, name))
        require(0 < self.shorten < 1, "shorten", "between 0 and 1", self.shorten)
        require(0 <= self.opening_power <= 1, "opening_power", "from 0 to 1", self.opening_power)
        for name in ("keep", "drift", "floor", "leak", "warm", "whole", "whole_averaged", "follow"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, "zero or positive", value)
        for name in ("start", "fastest"):
            require(math.isfinite(getattr(self, name)), name, "finite", getattr(self, name))
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
