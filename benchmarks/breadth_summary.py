"""What the rows of breadth.py say: shares of tuned AdamW's steps and time, a table, a figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from breadth_tasks import TASKS
from peers import METHODS

Rows = Sequence[dict[str, Any]]


def steps_to(row: dict[str, Any], target: float) -> float:
    """Steps until the held-out curve, a line between its points, is first down to a target; infinite if never.

    Example:
        >>> steps_to({"at": [0, 10, 20], "held_out": [3.0, 2.0, 1.0]}, 1.5)
        15.0
    """
    before: tuple[float, float] | None = None
    for at, loss in zip(row["at"], row["held_out"], strict=True):
        if loss is None:
            break
        if loss <= target:
            if before is None:
                return float(at)
            step, high = before
            return step + (at - step) * (high - target) / (high - loss)
        before = (at, loss)
    return math.inf


def _median(values: Sequence[float | None]) -> float | None:
    """Median with what is missing as infinite; none if that is what comes."""
    found = statistics.median(math.inf if v is None else v for v in values)
    return found if math.isfinite(found) else None


def _cell(rows: Rows, target: float, steps: int) -> dict[str, Any]:
    share = _median([steps_to(row, target) / steps for row in rows])
    ratios = [row["ms_per_step"] / row["adamw_ms_per_step"] for row in rows if row.get("adamw_ms_per_step")]
    times = 1.0 if rows[0]["method"] == "adamw" else _median(ratios) if ratios else None
    return {
        "seeds": len(rows),
        "settings": rows[0]["settings"],
        "train": _median([row["train_end"] for row in rows]),
        "held_out": _median([row["held_out"][-1] for row in rows]),
        "held_out_all": [row["held_out"][-1] for row in rows],
        "ms_per_step": _median([row["ms_per_step"] for row in rows]),
        "ms_over_adamw": times,
        "steps_share": share,
        "time_share": None if share is None or times is None else share * times,
    }


def _geometric(values: Sequence[float | None]) -> dict[str, Any]:
    """Geometric mean over the tasks that got there, and in how many it did not."""
    reached = [max(v, 1e-9) for v in values if v is not None]
    return {
        "geometric_mean_of_reached": math.exp(statistics.fmean(map(math.log, reached))) if reached else None,
        "largest": max(reached) if reached and len(reached) == len(values) else None,
        "never": len(values) - len(reached),
        "tasks": len(values),
    }


def _ahead(cells: dict[str, Any], method: str, peer: str) -> bool | None:
    ours, theirs = (cells.get(m, {}).get("train") for m in (method, peer))
    return None if theirs is None else ours is not None and ours < theirs


def summary(rows: Rows) -> dict[str, Any]:
    """For each task and method the medians over seeds, and for each method the means over the ten tasks.

    Returns:
        ``tasks[task][method]``: losses at the end, ms per step, and the share of tuned AdamW's steps (``steps_share``)
        and time (``time_share``) after which its median final held-out loss is reached; null if never.
        ``methods[method]``: geometric means of both, tasks ahead of Muon and of SOAP in training loss at the end, and
        held-out loss over the best tuned peer's.
    """
    tasks: dict[str, Any] = {}
    for task in TASKS:
        by_method = {m: [r for r in rows if (r["task"], r["method"]) == (task, m)] for m in METHODS}
        target = _median([r["held_out"][-1] for r in by_method["adamw"]]) if by_method["adamw"] else None
        if target is None:
            continue
        tasks[task] = {m: _cell(found, target, found[0]["steps"]) for m, found in by_method.items() if found}
    methods: dict[str, Any] = {}
    for method in METHODS:
        shown = {t: cells for t, cells in tasks.items() if method in cells and not TASKS[t].extra}
        if not shown:
            continue
        own = [cells[method] for cells in shown.values()]
        best = {t: _best(cells, method) for t, cells in shown.items()}
        methods[method] = {
            "steps": _geometric([c["steps_share"] for c in own]),
            "time": _geometric([c["time_share"] for c in own]),
            "train_ahead_of": {
                peer: sum(bool(_ahead(cells, method, peer)) for cells in shown.values()) for peer in ("muon", "soap")
            },
            "held_out_over_best_peer": {
                t: None if best[t] is None or c["held_out"] is None else c["held_out"] / best[t]
                for (t, _), c in zip(shown.items(), own, strict=True)
            },
        }
    return {"tasks": tasks, "methods": methods}


def _best(cells: dict[str, Any], method: str) -> float | None:
    """The lowest held-out loss of the tuned peers."""
    peers = [c["held_out"] for m, c in cells.items() if METHODS[m].rates and m != method and c["held_out"] is not None]
    return min(peers, default=None)


# --- shown


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def table(found: dict[str, Any]) -> str:
    """Markdown: losses at the end and the share of AdamW's steps, then the means over tasks."""
    tasks, methods = found["tasks"], [m for m in METHODS if any(m in cells for cells in found["tasks"].values())]
    head = ["task", *(METHODS[m].title for m in methods)]
    lines = ["Held-out loss at the end, median of seeds; in brackets training loss.", "", *_head(head)]
    for task, cells in tasks.items():
        shown = [
            _number(cells[m]["held_out"]) + f" ({_number(cells[m]['train'])})" if m in cells else "" for m in methods
        ]
        lines.append(f"| {TASKS[task].title} | " + " | ".join(shown) + " |")
    lines += [
        "",
        "Steps to tuned AdamW's final held-out loss over its steps (× ms per step over its own).",
        "",
        *_head(head),
    ]
    for task, cells in tasks.items():
        shown = [
            (_number(cells[m]["steps_share"], 2) if cells[m]["steps_share"] is not None else "never")
            + f" (× {_number(cells[m]['ms_over_adamw'], 2)})"
            if m in cells
            else ""
            for m in methods
        ]
        lines.append(f"| {TASKS[task].title} | " + " | ".join(shown) + " |")
    lines += [
        "",
        *_head(["method", "steps", "time", "never", "trains ahead of Muon", "of SOAP", "worst held-out / best peer"]),
    ]
    for m, means in found["methods"].items():
        ratios = list(means["held_out_over_best_peer"].values())
        worst = _number(max(ratios)) if ratios and None not in ratios else "–"
        ahead = means["train_ahead_of"]
        steps, times = (means[k]["geometric_mean_of_reached"] for k in ("steps", "time"))
        never = f"{means['steps']['never']} of {means['steps']['tasks']}"
        cells = [METHODS[m].title, _number(steps, 2), _number(times, 2), never, ahead["muon"], ahead["soap"], worst]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _head(cells: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(cells) + " |", "|" + "---|" * len(cells)]


# Method to its marker and its colour's place in the palette; the first colour is ours.
LOOKS = {"muon": ("s", 1), "soap": ("^", 4), "shampoo": ("v", 2), "schedule-free": ("D", 3), "prodigy": ("P", 5)}
_LEAST, _NEVER = 0.1, 1.3  # the left end, unless something is further left; where those stand that never get there


def drawn(found: dict[str, Any]) -> bytes:
    """A dot for each task and method: the share of tuned AdamW's steps that its final held-out loss takes.

    The tasks stand in the order of our share, those that are not among the ten below. Ours without `total_steps`
    is in the tables alone: its shares are the same to the second digit, but for two tasks.
    """
    from metatele.figures import COLOURS, png, subplots

    def share_of(task: str) -> float:
        value = found["tasks"][task].get("ours", {}).get("steps_share")
        return 9.0 if value is None else value

    tasks = sorted(found["tasks"], key=lambda task: (TASKS[task].extra, share_of(task)))
    figure, axes = subplots(1, 1, figsize=(8.0, 1.95 + 0.3 * max(len(tasks), 3)), layout="constrained")
    shares = [c["steps_share"] for cells in found["tasks"].values() for c in cells.values()]
    left = min([_LEAST, *(s for s in shares if s)])
    for place, task in enumerate(tasks):
        cells = found["tasks"][task]
        # Dots that never got there stand side by side behind the line.
        never = [m for m in LOOKS if m in cells and cells[m]["steps_share"] is None]
        for method, (marker, tone) in LOOKS.items():
            if method in cells:
                share = cells[method]["steps_share"]
                value = _NEVER * 1.12 ** never.index(method) if share is None else max(share, left)
                axes.scatter([value], [place], marker=marker, color=COLOURS[tone], s=38, linewidths=0, zorder=2)
        if "ours" in cells and cells["ours"]["steps_share"] is not None:
            share = max(cells["ours"]["steps_share"], left)
            axes.plot([share, 1], [place, place], color=COLOURS[0], linewidth=1.2, alpha=0.4, zorder=1)
            axes.scatter([share], [place], color=COLOURS[0], s=95, edgecolors="white", linewidths=0.8, zorder=3)
            axes.text(share, place - 0.36, f"{share:.2f}", color=COLOURS[0], ha="center", va="center", fontsize=9)
    axes.axvline(1, color="black", linewidth=1.4)
    axes.text(1.02, -0.8, "tuned AdamW", ha="right", va="bottom", fontsize=9)
    axes.axvspan(1.17, 1.9, color="#eeeeee", zorder=0, linewidth=0)
    axes.text(1.47, -0.8, "never", ha="center", va="bottom", fontsize=9)
    axes.set_xscale("log")
    axes.set_xlim(left * 0.85, 1.9)
    ticks = [t for t in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0) if t >= left * 0.85]
    words = {0.1: "1/10", 0.2: "1/5", 0.5: "1/2", 1.0: "as many"}
    axes.set_xticks(ticks, [words.get(t, f"{t:g}") for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(tasks)), [TASKS[t].title + (" *" if TASKS[t].extra else "") for t in tasks])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(tasks) - 0.5, -0.7)
    axes.grid(visible=False, axis="x")
    end = "; * not one of the ten" if any(TASKS[t].extra for t in tasks) else ""
    axes.set_xlabel(f"steps needed, as a share of AdamW's; further left is faster{end}")
    title = "How many of tuned AdamW's steps reach AdamW's final held-out loss?"
    figure.suptitle(title, fontsize=12, x=0.02, ha="left", weight="bold")
    methods = [m for m in LOOKS if any(m in cells for cells in found["tasks"].values())]
    dots = [axes.scatter([], [], color=COLOURS[0], s=95, linewidths=0)]
    dots += [axes.scatter([], [], marker=LOOKS[m][0], color=COLOURS[LOOKS[m][1]], s=38, linewidths=0) for m in methods]
    names = [METHODS[m].title + (", as it comes" if m == "prodigy" else ", tuned") for m in methods]
    figure.legend(
        dots,
        ["LearnedOptimizer, nothing tuned", *names],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
        handletextpad=0.1,
        columnspacing=2,
    )
    return png(figure)
