"""Drawing without a window: panels, loss axes, bytes of a PNG. Matplotlib is imported when first used."""

from __future__ import annotations

import io
import math
from typing import Any

_ROOM = 100.0  # above the highest beginning: a loss that rises a hundredfold has diverged, how far says the table


def subplots(rows: int, columns: int, **settings: Any) -> tuple[Any, Any]:
    """A figure and its panels, as ``matplotlib.pyplot.subplots`` gives them, drawn into memory.

    Example:
        >>> figure, axes = subplots(1, 1, figsize=(2, 2))
        >>> png(figure)[1:4]
        b'PNG'
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(rows, columns, **settings)


def loss_axes(*panels: Any) -> None:
    """Make the vertical axes logarithmic; a line that diverges leaves the frame and does not stretch it.

    The upper end is at most 100 times the highest value a line begins with, over all panels given. Call it when
    everything is drawn.

    Args:
        *panels: Matplotlib axes that show losses.

    Example:
        >>> figure, axes = subplots(1, 1, figsize=(2, 2))
        >>> _ = axes.plot([1.0, 0.1, 0.01]), axes.plot([2.0, 1e9, 1e32])
        >>> loss_axes(axes)
        >>> float(axes.get_ylim()[1])
        200.0
    """
    begins = []
    for axes in panels:
        axes.set_yscale("log")
        for line in axes.get_lines():
            begins += [float(v) for v in line.get_ydata() if math.isfinite(v) and v > 0][:1]
    for axes in panels:
        if begins and axes.get_ylim()[1] > _ROOM * max(begins):
            axes.set_ylim(top=_ROOM * max(begins))


def png(figure: Any) -> bytes:
    """A figure as bytes of a PNG file; it is closed."""
    from matplotlib import pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    plt.close(figure)
    return buffer.getvalue()
