"""The slope q along the last step, and how far it stands out of its noise: numbers of the host."""

from __future__ import annotations

import math

Pair = tuple[float, float]


def averaged(old: Pair, new: Pair, share: float) -> Pair:
    """Running averages of q and q²."""
    return old[0] + share * (new[0] - old[0]), old[1] + share * (new[1] - old[1])


def slope(sums: Pair) -> float:
    """``z = avg(q)/√avg(q²)``, from both averages; 0 where there are none.

    Example:
        >>> slope((1.0, 4.0)), slope((0.0, 0.0))
        (0.5, 0.0)
    """
    mean, square = sums
    return mean / math.sqrt(square) if square > 0 else 0.0
