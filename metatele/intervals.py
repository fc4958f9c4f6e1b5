"""Confidence intervals of a mean over a few seeds. Imports no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# 97.5 % quantiles of Student's t by sample size; from 11 on the one for 10 is a safe upper bound.
_STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def half_width(values: Sequence[float]) -> float:
    """Half-width of the 95 % interval of the mean, by Student's t; needs two values.

    Example:
        >>> round(half_width([1.0, 2.0, 3.0]), 3)
        2.484
    """
    return _STUDENT_T[min(len(values), 10)] * statistics.stdev(values) / math.sqrt(len(values))
