"""The figure of field.py: every situation's held-out loss over Adam's, with the spread of its seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

LEAST, MOST = 0.1, 4.0  # ratios beyond are drawn at the edge
_NAMED = 5  # situations at the good end whose names there is room for


def drawn(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A dot for each situation, in the order of its ratio; a line from its lowest seed to its highest.

    Those that are not fine are named, and those at the lower edge; ``field.py --redraw`` prints every name.

    Args:
        rows: Of ``field.json``.
    """
    from metatele.figures import COLOURS, GREY, ink, png, spread, subplots

    good, bad = COLOURS[1], COLOURS[0]
    found = [row for row in rows if row.get("held_out_best_ratio") is not None]
    found.sort(key=lambda row: row["held_out_best_ratio"])
    figure, axes = subplots(1, 1, figsize=(8.0, 4.6), layout="constrained")
    for place, row in enumerate(found):
        colour, marker = (good, "o") if row["fine"] else (bad, "D")
        low, *_, high = sorted(_ratios(row)) * 2
        axes.plot([place, place], [_shown(low), _shown(high)], color=colour, linewidth=1.4, alpha=0.45)
        ratio = _shown(row["held_out_best_ratio"])
        axes.scatter([place], [ratio], color=colour, marker=marker, s=24, linewidths=0, zorder=3)
    axes.axhline(1, color="black", linewidth=1.4)
    last = max(len(found) - 1, 1)
    axes.annotate(
        "Adam, the better of the rates 1e-3 and 1e-2",
        (0.42 * last, 1.0),
        (0.42 * last, 2.4),
        ha="center",
        fontsize=9,
        arrowprops={"arrowstyle": "-", "lw": 0.7, "shrinkB": 0},
    )
    axes.text(0.62 * last, 0.35, "below the line, its held-out loss\nis lower than Adam's", color=GREY, fontsize=9)
    axes.set_yscale("log")
    axes.set_ylim(LEAST * 0.9, MOST * 1.1)
    ticks = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
    axes.set_yticks(ticks, ["≤ 1/10", "1/5", "1/2", "1", "2", "≥ 4"])
    axes.minorticks_off()
    axes.set_xticks([])
    axes.set_xlim(-1, len(found))
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("least held-out loss over Adam's")
    fine = sum(bool(row["fine"]) for row in found)
    axes.set_xlabel(f"{len(found)} situations, best first; a line spans the seeds", color=GREY)
    worst = [place for place, row in enumerate(found) if not row["fine"]]
    heights = [math.log(_shown(found[place]["held_out_best_ratio"])) for place in worst]
    for place, height in zip(worst, spread(heights, [0.2] * len(worst), math.log(LEAST), math.log(MOST)), strict=True):
        at = (place, _shown(found[place]["held_out_best_ratio"]))
        _name(axes, found[place]["name"], at, (len(found) + 1.0, math.exp(height)), ink(bad))
    if best := [row["name"] for row in found[:_NAMED] if row["fine"] and row["held_out_best_ratio"] <= LEAST]:
        axes.text(len(best) + 4.6, LEAST * 0.97, "\n".join(best), color=ink(good), fontsize=9, va="bottom")
    figure.suptitle(
        f"LearnedOptimizer in {len(found)} ordinary situations: no worse than Adam in {fine}, worse in {len(worst)}",
        fontsize=12,
        x=0.02,
        ha="left",
        weight="bold",
    )
    return png(figure)


def _name(axes: Any, name: str, at: tuple[float, float], where: tuple[float, float], colour: str) -> None:
    """Write a name beside the panel or in it, joined to its dot."""
    arrow = {"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 1, "shrinkB": 3}
    axes.annotate(name, at, where, color=colour, fontsize=9, va="center", annotation_clip=False, arrowprops=arrow)


def _shown(ratio: float) -> float:
    return min(max(ratio, LEAST), MOST)


def _ratios(row: Mapping[str, Any]) -> list[float]:
    """Of every seed."""
    pairs = zip(row["ours"]["per_seed"], row["adam"]["per_seed"], strict=True)
    least = 1e-30
    return [max(a["held_out_best"] or MOST, least) / max(b["held_out_best"] or least, least) for a, b in pairs]
