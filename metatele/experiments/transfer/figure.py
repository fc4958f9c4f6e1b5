"""The study's figures, from its stored results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from metatele.experiments import images as common
from metatele.experiments.transfer.results import FLAT, OURS, PATIENT, WHITENING, RegressionTask, Results, Task

_COLOURS = {
    "SGD": "#999999",
    "Momentum": "#56B4E9",
    "Adam": "#009E73",
    PATIENT: "#006B4E",
    "AdamW": "#66CC99",
    "Muon": "#CC79A7",
    "L-BFGS": "#A6761D",
    WHITENING: "#0072B2",
    FLAT: "#E69F00",
    OURS: "#D55E00",
}
_COLUMNS = 5


def _panel(axes: Any, task: Task, names: Sequence[str], time_axis: bool) -> None:
    for name in names:
        found = task.curves(name)
        if not found:
            continue
        scale = task.milliseconds[name] / 1e3 if time_axis else 1
        xs = [x * scale for x in found[0][0]]
        values = list(zip(*(losses for _, losses in found), strict=True))
        mean = [math.exp(sum(math.log(max(v, 1e-30)) for v in at) / len(at)) for at in values]
        if len(found) > 1:
            low, high = ([f(at) for at in values] for f in (min, max))
            axes.fill_between(xs, low, high, color=_COLOURS[name], alpha=0.2, linewidth=0)
        style = {"color": _COLOURS[name], "linewidth": 2.4 if name == OURS else 1.3}
        axes.plot(xs, mean, label=name, zorder=3 if name == OURS else 2, **style)
    axes.set_yscale("log")
    size, more = "-".join(map(str, task.widths)), ""
    if isinstance(task, RegressionTask):
        axes.set_xscale("log")
        more = f", {task.samples} samples"
    axes.set_title(f"{task.title}\n{size}{more}" if size not in task.title else task.title, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(True, alpha=0.3)


def figure(results: Results, time_axis: bool = False) -> bytes:
    """A panel for each task: loss against the step, or against time; a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(_COLUMNS, len(results.tasks))
    rows = math.ceil(len(results.tasks) / columns)
    fig, grid = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.75 * rows + 0.5), squeeze=False)
    for axes, task in zip(grid.flat, results.tasks, strict=False):
        _panel(axes, task, results.names, time_axis)
    for axes in list(grid.flat)[len(results.tasks) :]:
        axes.axis("off")
    for axes in grid[-1]:
        axes.set_xlabel("seconds" if time_axis else "step", fontsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel("training loss", fontsize=8)
    handles = {label: h for axes in grid.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(9, len(handles)), fontsize=8)
    fig.suptitle("mean over held-out problems; every other method tuned on each task, ours on none", fontsize=10)
    fig.set_layout_engine("constrained")
    return common.png(fig)
