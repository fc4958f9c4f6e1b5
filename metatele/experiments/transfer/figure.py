"""The study's figures, from its stored results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from metatele import figures
from metatele.experiments.transfer.results import OURS, WHITENING, RegressionTask, Results, Task

# Place of each method drawn in the package's palette; a panel holds six, the others are in the table.
_PLACES = {OURS: 0, "Momentum": 1, "Muon": 2, "L-BFGS": 3, "Adam": 4, WHITENING: 5}
_COLUMNS = 3


def _panel(axes: Any, task: Task, names: Sequence[str], time_axis: bool) -> None:
    for name in (name for name in names if name in _PLACES):
        found = task.curves(name)
        if not found:
            continue
        scale = task.milliseconds[name] / 1e3 if time_axis else 1
        xs = [x * scale for x in found[0][0]]
        values = list(zip(*(losses for _, losses in found), strict=True))
        mean = [math.exp(sum(math.log(max(v, 1e-30)) for v in at) / len(at)) for at in values]
        if len(found) > 1:
            low, high = ([f(at) for at in values] for f in (min, max))
            axes.fill_between(xs, low, high, color=figures.COLOURS[_PLACES[name]], alpha=0.2, linewidth=0)
        style = {**figures.line_style(_PLACES[name]), "linewidth": 2.4 if name == OURS else 1.2}
        axes.plot(xs, mean, label=name, zorder=3 if name == OURS else 2, **style)
    figures.loss_axes(axes)
    size, more = "-".join(map(str, task.widths)), ""
    if isinstance(task, RegressionTask):
        axes.set_xscale("log")
        more = f", {task.samples} samples"
    figures.title(axes, f"{task.title}\n{size}{more}" if size not in task.title else task.title)


def figure(results: Results, time_axis: bool = False) -> bytes:
    """A panel for each task: loss against the step, or against time; a PNG."""
    columns = min(_COLUMNS, len(results.tasks))
    rows = math.ceil(len(results.tasks) / columns)
    fig, grid = figures.subplots(
        rows, columns, figsize=(figures.WIDTH, 2.1 * rows + 0.7), squeeze=False, layout="constrained"
    )
    for axes, task in zip(grid.flat, results.tasks, strict=False):
        _panel(axes, task, results.names, time_axis)
    for axes in list(grid.flat)[len(results.tasks) :]:
        axes.axis("off")
    for axes in grid[-1]:
        axes.set_xlabel("seconds" if time_axis else "step")
    for axes in grid[:, 0]:
        axes.set_ylabel("training loss")
    handles = {label: h for axes in grid.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    fig.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False, fontsize=figures.SIZE
    )
    figures.title(fig, "mean over held-out problems; every other method tuned on each task, ours on none")
    return figures.png(fig, tones=32)
