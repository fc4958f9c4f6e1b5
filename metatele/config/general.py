"""Settings of the general family, which takes any module."""

from __future__ import annotations

import math
from dataclasses import dataclass

from metatele.config.base import check_types, require, require_positive, setting

# Kinds of numbers that the controller reads; which there are, its own table says.
SENSES = ("feedback", "noise", "sizes", "repeats", "data", "clock", "loss", "place")


@dataclass(frozen=True)
class GeneralConfig:
    """A meta-optimizer for any module. Enough to rebuild it.

    These are constants of the algorithm: others than the defaults change what the shipped checkpoint does on every
    network.

    Example:
        >>> GeneralConfig(hold=5).hold
        5
    """

    # the controller
    hidden: int = setting(0, "size of the controller's hidden layer; 0: its outputs are linear in what it sees")
    blind: tuple[str, ...] = setting((), "numbers the controller does not see, to find out what they are worth")
    hold: int = setting(10, "steps between two looks, at which moments are taken in and the controller is asked")
    rarest: int = setting(6, "times hold, up to which looks become rarer while a run grows old")
    settle: int = setting(50, "steps by whose multiples they do: a look costs as much as several steps")
    warm: int = setting(10, "first steps, each of which is a look")
    remembered: int = setting(4096, "samples that are remembered, to tell how often they come again")
    repeats: int = setting(
        4,
        "outputs of a squared error from which a batch that comes again and again is there to be fitted, as the "
        "equivariant family does; 0: never",
    )

    heads: float = setting(
        1.5,
        "imbalance of an attention head, from which all are brought to a balanced basis before the first step; random "
        "weights have at most 1.4; 0: never",
    )

    # the direction
    momentum: float = setting(0.9, "decay of the running gradient")
    agreeing: float = setting(0.3, "share of a look in the running agreement of half batches")
    averaging: float = setting(0.9, "decay of the inputs' second moments, by looks")
    dense: int = setting(128, "inputs up to which second moments are matrices; of more, factors of a few columns")
    rank: int = setting(32, "columns of such a factor")
    orthogonal: int = setting(5, "iterations of Newton and Schulz towards a matrix of singular values 1")
    leading: int = setting(
        192,
        "shorter side of a layer from which, where directions are dear, twice rank leading ones are drawn to 1 each "
        "and the others alike, at a quarter of the products; 0: never",
    )
    share: float = setting(
        0.5, "of the operations of a pass that making a direction may take; dearer ones are made now and then"
    )
    overhead: float = setting(3e6, "operations that a layer's pass is at least as dear as, for small ones")
    stale: int = setting(2, "steps that a direction is kept for where making it is dear")

    # length of a step
    start: float = setting(0.03, "first step, relative to the size of a matrix")
    least: float = setting(0.3, "least length of a step, relative to the first, by feedback alone; falls as 1/steps")
    ageing: float = setting(40.0, "steps after which it has fallen to a half")
    feedback: float = setting(0.9, "decay of the slope along the last step, which lengthens or shortens the next")
    slow: float = setting(0.99, "decay of squared gradients, beside which the running gradient is measured")
    clip: float = setting(4.0, "times the usual norm, up to which a gradient counts whole")
    floor: float = setting(0.5, "least size of a matrix that steps are relative to, of what its fan-in gives")
    vector_floor: float = setting(0.1, "the same of vectors, root mean square")
    above_first: float = setting(1.5, "times the first loss, above which one has left its range")
    above_last: float = setting(3.0, "times that of the last look, which it has to be above too")
    back: float = setting(4.0, "steps are this much shorter after the loss had left its range")
    cool: float = setting(0.4, "share of the run over which steps fall to nothing where its length is known")

    def __post_init__(self) -> None:
        """Check sizes and ranges."""
        check_types(self)
        require_positive(self, "hold", "rarest", "settle", "dense", "rank", "orthogonal", "share", "overhead", "stale")
        require_positive(self, "start", "least", "ageing")
        require_positive(self, "floor", "vector_floor", "clip")
        for name in ("momentum", "averaging", "feedback", "slow"):
            require(0 <= getattr(self, name) < 1, name, "in [0, 1)", getattr(self, name))
        require(0 < self.cool <= 1, "cool", "above 0 and at most 1", self.cool)
        require(self.hidden >= 0, "hidden", "zero or more", self.hidden)
        for name in ("back", "above_first", "above_last"):
            require(1 < getattr(self, name) < math.inf, name, "above 1", getattr(self, name))
        require(0 < self.agreeing <= 1, "agreeing", "above 0 and at most 1", self.agreeing)
        require(self.leading >= 0, "leading", "zero or more", self.leading)
        require(self.remembered >= 0, "remembered", "zero or more", self.remembered)
        require(self.repeats >= 0, "repeats", "zero or more", self.repeats)
        require(set(self.blind) <= set(SENSES), "blind", f"among {', '.join(SENSES)}", self.blind)
        require(0 <= self.heads < math.inf, "heads", "zero or more", self.heads)
        require(0 <= self.warm < math.inf, "warm", "zero or more", self.warm)

    @property
    def title(self) -> str:
        """Name in tables and figures."""
        return "General"
