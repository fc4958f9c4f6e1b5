"""Drawing without a window: the package's colours and style, loss axes, labels at line ends, bytes of a PNG.

A figure is as wide as a page shows it, 8 inches, so that its letters are read at their size. A panel has at most
:data:`MOST_LINES` lines. Matplotlib is imported when first used.
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Sequence
from typing import Any

MOST_LINES = 6  # in a panel: more cannot be followed
WIDTH = 8.0  # inches, of a figure as wide as a page
SIZE = 9.0  # points, of the smallest letters
# The first is for what a figure is about, the last for what it is compared with. Each is of another lightness than
# the others, so that they differ on a grey print; their line styles differ too.
COLOURS = ("#c1121f", "#3a84c4", "#f5ab4a", "#512a83", "#69ab4d", "#16161d")
LINE_STYLES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)), ":")
GREY = "#767676"  # of reference lines and remarks

_LETTERS = 13  # of a title, in an inch
_LONGEST = 26  # letters of a label at a line end: a longer one would leave the panel no room
_ROOM = 100.0  # above the highest beginning: a loss that rises a hundredfold has diverged, how far says the table
_STYLE: Any = {
    "font.size": SIZE,
    "axes.titlesize": SIZE + 1,
    "axes.labelsize": SIZE,
    "xtick.labelsize": SIZE,
    "ytick.labelsize": SIZE,
    "legend.fontsize": SIZE,
    "figure.titlesize": SIZE + 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e0e0e0",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "figure.dpi": 120,
}


def subplots(rows: int, columns: int, **settings: Any) -> tuple[Any, Any]:
    """A figure and its panels in the package's style, as ``matplotlib.pyplot.subplots`` gives them, in memory.

    Args:
        rows: Of panels.
        columns: Of panels.
        settings: As there. ``figsize`` is in inches; :data:`WIDTH` fills a page.

    Example:
        >>> figure, axes = subplots(1, 1, figsize=(2, 2))
        >>> png(figure)[1:4]
        b'PNG'
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with matplotlib.rc_context(_STYLE):
        return plt.subplots(rows, columns, **settings)


def line_style(place: int) -> dict[str, Any]:
    """Colour and line style of a line, as keyword arguments of ``plot``; after six they begin again.

    Example:
        >>> line_style(0)
        {'color': '#c1121f', 'linestyle': '-'}
    """
    place %= len(COLOURS)
    return {"color": COLOURS[place], "linestyle": LINE_STYLES[place]}


def title(where: Any, words: str) -> None:
    """Put a title above a panel, at its left, or above a whole figure, in the package's size.

    Args:
        where: Axes or a figure.
        words: Above a figure they are broken into lines of its width.

    Example:
        >>> figure, axes = subplots(1, 1, figsize=(2, 2))
        >>> title(axes, "Adam")
        >>> axes.get_title(loc="left")
        'Adam'
    """
    if hasattr(where, "suptitle"):
        where.suptitle(textwrap.fill(words, round(_LETTERS * where.get_figwidth())), fontsize=SIZE + 1)
    else:
        where.set_title(words, fontsize=SIZE + 0.5, loc="left")


def loss_axes(*panels: Any, since: int = 0) -> None:
    """Make the vertical axes logarithmic; a line that diverges leaves the frame and does not stretch it.

    The upper end is at most 100 times the highest value a line begins with, over all panels given. Call it when
    everything is drawn.

    Args:
        *panels: Matplotlib axes that show losses.
        since: The first point of each line that must be seen, for losses that fall far at once. With 1, a line may
            come into the frame from above, on its way from its first point to its second.

    Example:
        >>> figure, axes = subplots(1, 1, figsize=(2, 2))
        >>> _ = axes.plot([1.0, 0.1, 0.01]), axes.plot([2.0, 1e9, 1e32])
        >>> loss_axes(axes)
        >>> float(axes.get_ylim()[1])
        200.0
    """
    begins, later = [], []
    for axes in panels:
        axes.set_yscale("log")
        for line in axes.get_lines():
            values = [float(v) for v in line.get_ydata()]
            seen = [v for v in values if math.isfinite(v) and v > 0]
            begins += seen[:1]
            later += [v for v in values[since:] if math.isfinite(v) and v > 0]
    for axes in panels:
        low, high = axes.get_ylim()
        if begins and high > _ROOM * max(begins):
            axes.set_ylim(top=_ROOM * max(begins))
        if since and later and max(later) < high:
            span = max(max(later) / max(low, 1e-300), 1.0)
            axes.set_ylim(top=min(axes.get_ylim()[1], max(later) * span**0.05))
        _readable_ticks(axes)


def _readable_ticks(axes: Any) -> None:
    """Numbers as people write them, where the axis spans so few decades that powers of ten would be few."""
    from matplotlib import ticker

    low, high = axes.get_ylim()
    if low <= 0 or high / low > 1e4 or not 1e-4 <= low <= high <= 1e5:
        return
    decades = math.log10(high / low)
    subs = (1, 1.5, 2, 3, 4, 5, 7) if decades < 0.8 else (1, 2, 5) if decades < 2.5 else (1,)
    axes.yaxis.set_major_locator(ticker.LogLocator(10, subs, numticks=20))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def label_lines(axes: Any, size: float = SIZE) -> None:
    """Write each line's label at its end, in its colour, to the right of the panel; labels do not overlap.

    It stands in place of a legend. A label that had to move is joined to its line. Where one is longer than 26 letters,
    such as a folder's name, there is a legend below the panel after all. Call it last, when limits,
    titles and the labels of axes are set; of several panels, for each.

    Args:
        axes: Of matplotlib, in a figure with a constrained layout, which makes room at the right.
        size: Points, of the letters.

    Example:
        >>> figure, axes = subplots(1, 1, figsize=(4, 2), layout="constrained")
        >>> _ = axes.plot([3, 2.0], label="Adam"), axes.plot([3, 1.98], label="ours")
        >>> label_lines(axes)
        >>> [text.get_text() for text in axes.texts]
        ['ours', 'Adam']
    """
    figure = axes.figure
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    labelled = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    if any(len(row) > _LONGEST for line in labelled for row in str(line.get_label()).split("\n")):
        below = {"loc": "upper left", "bbox_to_anchor": (0.0, -0.16), "frameon": False}
        axes.legend(handles=labelled, fontsize=size, **below)
        return
    ends = [(end[1], end[0], line) for line in labelled if (end := _end(line, frame)) is not None]
    found = sorted(ends, key=lambda item: item[0])
    points = figure.dpi / 72
    row = 1.25 * size * points
    gaps = [row * (1 + str(line.get_label()).count("\n")) for *_, line in found]
    room = [(gap - row) / 2 for gap in gaps[:1] + gaps[-1:]] or [0.0]
    heights = spread([y for y, *_ in found], gaps, frame.y0 + room[0], frame.y1 - room[-1])
    far = [
        x < frame.x1 - 2 * points or abs(height - y) > 0.4 * size * points
        for (y, x, _), height in zip(found, heights, strict=True)
    ]
    for (y, x, line), height, joined in zip(found, heights, far, strict=True):
        arrow = {
            "arrowstyle": "-",
            "color": line.get_color(),
            "lw": 0.7,
            "shrinkA": 0,
            "shrinkB": 0,
            "relpos": (0, 0.5),
        }
        axes.annotate(
            line.get_label(),
            xy=axes.transData.inverted().transform((x, y)),
            xytext=(1.0 + (14 if any(far) else 4) * points / frame.width, (height - frame.y0) / frame.height),
            textcoords="axes fraction",
            color=ink(line.get_color()),
            fontsize=size,
            va="center",
            ha="left",
            annotation_clip=False,
            arrowprops=arrow if joined else None,
        )


def _end(line: Any, frame: Any) -> tuple[float, float] | None:
    """Where a line is last seen, in pixels."""
    points = line.get_transform().transform(line.get_xydata())
    seen = [(float(x), float(y)) for x, y in points if math.isfinite(x + y) and frame.x0 - 1 <= x <= frame.x1 + 1]
    inside = [(x, y) for x, y in seen if frame.y0 - 1 <= y <= frame.y1 + 1]
    if inside:
        return inside[-1]
    if not seen:
        return None
    return seen[-1][0], min(max(seen[-1][1], frame.y0), frame.y1)


def spread(wanted: Sequence[float], gaps: Sequence[float], low: float, high: float) -> list[float]:
    """Places nearest to those wanted, in least squares, that keep their distances.

    Args:
        wanted: Centres, ascending.
        gaps: The height of each: neighbours are at least half the sum of theirs apart.
        low: No centre lies below.
        high: None above, unless there is no room.

    Example:
        >>> spread([0.0, 0.2, 5.0], [1.0, 1.0, 1.0], -9.0, 9.0)
        [-0.4, 0.6, 5.0]
    """
    before = [0.0]
    for a, b in itertools.pairwise(gaps):
        before.append(before[-1] + (a + b) / 2)
    pools: list[tuple[float, int]] = []  # mean and number of those that touch
    for place, offset in zip(wanted, before, strict=False):
        mean, count = place - offset, 1
        while pools and pools[-1][0] > mean:
            other, more = pools.pop()
            mean, count = (mean * count + other * more) / (count + more), count + more
        pools.append((mean, count))
    free = [mean for mean, count in pools for _ in range(count)]
    top = max(low, high - before[-1])
    return [round(min(max(place, low), top) + offset, 9) for place, offset in zip(free, before, strict=False)]


def ink(colour: str) -> str:
    """The colour itself, or a darker one of its hue in which small letters can be read on white."""
    from matplotlib import colors

    tone: tuple[float, ...] = colors.to_rgb(colour)
    while lightness(tone) > 52:
        tone = tuple(0.95 * part for part in tone)
    return str(colors.to_hex(tone))  # type: ignore[arg-type]


def lightness(colour: Any) -> float:
    """CIE L* of a colour, 0 for black to 100 for white: what is left of it on a grey print.

    Example:
        >>> round(lightness("#ffffff")), round(lightness("#808080"))
        (100, 54)
    """
    from matplotlib import colors

    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colors.to_rgb(colour)]
    luminance = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def crowded(figure: Any) -> list[str]:
    """The panels, by title, that have more than :data:`MOST_LINES` lines; a straight line between two points is none.

    Example:
        >>> figure, axes = subplots(1, 1, figsize=(2, 2))
        >>> _ = [axes.plot([3, 2, place]) for place in range(7)]
        >>> crowded(figure)
        ['panel 0: 7 lines']
    """
    counts = [sum(len(line.get_xdata()) > 2 for line in axes.get_lines()) for axes in figure.axes]
    titles = [
        axes.get_title(loc="left") or axes.get_title() or f"panel {place}" for place, axes in enumerate(figure.axes)
    ]
    return [f"{title}: {count} lines" for title, count in zip(titles, counts, strict=True) if count > MOST_LINES]


def png(figure: Any, tones: int = 256) -> bytes:
    """A figure as bytes of a PNG file, small by a palette of its own; it is closed.

    Args:
        figure: Of matplotlib.
        tones: Of the palette. Fewer make a large picture smaller.
    """
    from matplotlib import pyplot as plt
    from PIL import Image

    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, dpi=120, format="png")
    plt.close(figure)
    full.seek(0)
    picture = Image.open(full).convert("RGB")
    picture.quantize(tones, Image.Quantize.MEDIANCUT, 2, dither=Image.Dither.NONE).save(
        small, format="PNG", optimize=True
    )
    return small.getvalue()
