"""The figure of field.py: every situation's held-out loss over Adam's, with the spread of its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LEAST, MOST = 0.1, 4.0  # ratios beyond are drawn at the edge
GOOD, BAD = "#2b6cb0", "#d62728"


def drawn(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A dot for each situation, in the order of its ratio; a line from its lowest seed to its highest.

    Args:
        rows: Of ``field.json``.
    """
    from metatele.figures import png, subplots

    found = [row for row in rows if row.get("held_out_best_ratio") is not None]
    found.sort(key=lambda row: row["held_out_best_ratio"])
    figure, axes = subplots(1, 1, figsize=(8.0, 1.2 + 0.15 * max(len(found), 3)))
    for place, row in enumerate(found):
        colour = GOOD if row["fine"] else BAD
        low, *_, high = sorted(_ratios(row)) * 2
        axes.plot([_shown(low), _shown(high)], [place, place], color=colour, linewidth=1.2, alpha=0.45)
        axes.scatter([_shown(row["held_out_best_ratio"])], [place], color=colour, s=22, linewidths=0, zorder=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(LEAST * 0.9, MOST * 1.1)
    ticks = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)
    axes.set_xticks(ticks, ["≤ 0.1", *(f"{tick:g}" for tick in ticks[1:])])
    axes.minorticks_off()
    axes.set_yticks(range(len(found)), [row["name"] for row in found], fontsize=6.5)
    axes.set_ylim(len(found) - 0.3, -0.7)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("least held-out loss over Adam's (better of 1e-3 and 1e-2)")
    for colour, text in ((GOOD, "fine"), (BAD, "not fine")):
        count = sum(row["fine"] == (colour == GOOD) for row in found)
        axes.scatter([], [], color=colour, label=f"{text}: {count}", linewidths=0)
    axes.legend(loc="lower left", fontsize=8, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    return png(figure)


def _shown(ratio: float) -> float:
    return min(max(ratio, LEAST), MOST)


def _ratios(row: Mapping[str, Any]) -> list[float]:
    """Of every seed."""
    pairs = zip(row["ours"]["per_seed"], row["adam"]["per_seed"], strict=True)
    least = 1e-30
    return [max(a["held_out_best"] or MOST, least) / max(b["held_out_best"] or least, least) for a, b in pairs]
