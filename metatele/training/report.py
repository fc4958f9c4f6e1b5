"""``curves.json`` and what is drawn from it: the table and the figure."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch

from metatele import figures
from metatele.checkpoint import versions
from metatele.config import TaskConfig, to_dict
from metatele.files import write_atomically
from metatele.intervals import half_width
from metatele.training.curves import Curves

FORMAT = 1
_FIRST_STEPS = 30  # as far as the paper's Figure 6 goes
_TABLE_STEPS = (0, 1, 5, 10, 20, 29, 99, 299, 999)
# Place of each method's colour and line style in the package's palette.
_PLACES = {"LSTM(update,tele)": 0, "LSTM(lr,tele)": 2, "LSTM(update)": 1, "GD": 5, "Adam": 4, "L-BFGS": 3}
_LEARNED = ("LSTM(update,tele)", "LSTM(lr,tele)", "LSTM(update)")
_SHOWN_FIRST = ("GD", "Adam", "L-BFGS", "Momentum", "SGD")


def document(curves: list[Curves], task: TaskConfig, seed: int, device: str) -> dict[str, Any]:
    """The content of ``curves.json``.

    Args:
        curves: Of all methods on the same trajectories, at the same steps.
        task: What they were evaluated on.
        seed: Of the trajectories.
        device: Where it ran.
    """
    return {
        "format": FORMAT,
        "task": to_dict(task),
        "steps": curves[0].losses.shape[0] - 1,
        "trajectories": curves[0].losses.shape[1],
        "seed": seed,
        "device": device,
        "versions": {**versions(), "machine": platform.machine(), "threads": str(torch.get_num_threads())},
        "methods": [c.to_json() for c in curves],
    }


def _steps(doc: dict[str, Any]) -> list[int]:
    return sorted({s for s in _TABLE_STEPS if s <= doc["steps"]} | {doc["steps"]})


def rows(doc: dict[str, Any]) -> list[list[str]]:
    """Table of mean losses, one method a row, the first row the head.

    Args:
        doc: What :func:`document` made.

    Example:
        >>> curve = Curves("GD", torch.tensor([[4.0, 8.0], [1.0, 3.0]]), 0.0)
        >>> rows(document([curve], TaskConfig(), 0, "cpu"))[1][:3]
        ['GD', '6', '2']
    """
    steps = _steps(doc)
    several = any(len(m.get("seed_means", [])) > 1 for m in doc["methods"])
    table = [["method", *(f"step {s}" for s in steps), f"p10-p90 at {steps[-1]}", "diverged", "us per step"]]
    if several:
        table[0].append("rise")
    for method in doc["methods"]:
        loss = method["loss"]
        spread = f"{_number(loss['p10'][steps[-1]])} to {_number(loss['p90'][steps[-1]])}"
        table.append(
            [
                _label(method, doc),
                *(_number(loss["mean"][s]) + _interval(method, s) for s in steps),
                spread,
                str(method["diverged"]),
                f"{1e6 * method['seconds_per_step']:.0f}",
            ]
        )
        if several:
            table[-1].append(_number(method["worst_rise"]) if "worst_rise" in method else "")
    return table


def _interval(method: dict[str, Any], step: int) -> str:
    """Half-width of the 95 % interval of the mean over meta-training seeds, by Student's t."""
    values = [means[step] for means in method.get("seed_means", [])]
    if len(values) < 2 or None in values:
        return ""
    return f" ±{_number(half_width(values))}"


def _label(method: dict[str, Any], doc: dict[str, Any]) -> str:
    """The name, with the folder where two methods of one name would be confused."""
    same = [m for m in doc["methods"] if m["name"] == method["name"]]
    return method["name"] if len(same) == 1 else f"{method['name']} {method['checkpoint']}"


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "inf"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.2e}"


def markdown(table: list[list[str]]) -> str:
    """A table in Markdown, aligned; the first row is the head, the first column to the left.

    Example:
        >>> print(markdown([["a", "loss"], ["GD", "2"]]), end="")
        | a  | loss |
        |:---|-----:|
        | GD |    2 |
    """
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]

    def line(row: list[str]) -> str:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(cells) + " |"

    rule = "|" + "|".join(":" + "-" * (w + 1) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(table[0]), rule, *map(line, table[1:])]) + "\n"


def write(doc: dict[str, Any], out: Path) -> str:
    """Write ``curves.json``, ``table.csv``, ``table.md`` and ``loss.png``.

    Args:
        doc: As of :func:`document`.
        out: Folder, which is there.

    Returns:
        The table, in Markdown.
    """
    table = rows(doc)
    text = markdown(table)
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(table)
    write_atomically(out / "curves.json", (json.dumps(doc, allow_nan=False) + "\n").encode())
    write_atomically(out / "table.csv", buffer.getvalue().encode())
    write_atomically(out / "table.md", text.encode())
    write_atomically(out / "loss.png", figure(doc))
    return text


def _drawn(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """At most six methods, as many as can be followed: those that are learned, then the usual optimizers."""
    order = {name: place for place, name in enumerate(_SHOWN_FIRST)}
    ranked = sorted(doc["methods"], key=lambda method: order.get(method["name"], -1))
    kept = ranked[: figures.MOST_LINES]
    return [method for method in doc["methods"] if any(method is one for one in kept)]


def figure(doc: dict[str, Any]) -> bytes:
    """PNG of the median loss against the step with its 10 % to 90 % band, at most six methods.

    A long run gets a second panel with the paper's 30 steps.
    """
    ends = [_FIRST_STEPS, doc["steps"]] if doc["steps"] > 2 * _FIRST_STEPS else [doc["steps"]]
    width = figures.WIDTH if len(ends) > 1 else 0.7 * figures.WIDTH
    fig, panels = figures.subplots(1, len(ends), figsize=(width, 3.9), squeeze=False, sharey=True, layout="constrained")
    methods = _drawn(doc)
    taken = {_PLACES[m["name"]] for m in methods if m["name"] in _PLACES and _label(m, doc) == m["name"]}
    free = iter([place for place in range(figures.MOST_LINES) if place not in taken])
    places = [
        _PLACES[m["name"]] if m["name"] in _PLACES and _label(m, doc) == m["name"] else next(free) for m in methods
    ]
    for axes, end in zip(panels[0], ends, strict=True):
        for method, place in zip(methods, places, strict=True):
            _draw(axes, method, _label(method, doc), end, place)
        axes.set_xlabel("step")
        axes.set_xlim(0, end)
    figures.loss_axes(*panels[0])
    panels[0, 0].set_ylabel("loss")
    seeds = f", {doc['seeds']} meta-training seeds" if doc.get("seeds", 1) > 1 else ""
    left = [_label(m, doc) for m in doc["methods"] if not any(m is one for one in methods)]
    rest = f"; in the table alone: {', '.join(left)}" if left else ""
    figures.title(fig, f"median and 10-90 % of {doc['trajectories']} held-out trajectories{seeds}{rest}")
    figures.label_lines(panels[0, -1])
    return figures.png(fig)


def _draw(axes: Any, method: dict[str, Any], label: str, end: int, place: int) -> None:
    steps = range(end + 1)
    low, middle, high = (
        [math.nan if v is None else v for v in method["loss"][key][: end + 1]] for key in ("p10", "median", "p90")
    )
    style, learned = figures.line_style(place), method["name"] in _LEARNED
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.13, linewidth=0)
    width = 2.4 if method["name"].endswith("tele)") else 1.6
    axes.plot(steps, middle, linewidth=width, label=label, zorder=3 if learned else 2, **style)
