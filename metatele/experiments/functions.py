"""Gradient descent on the ellipse, Booth's and Rosenbrock's function, with and without one teleport.

Both begin at the same point; the second descends from the point of the same level set with the largest
gradient. Each has the best learning rate of a grid, and the second also that of the first: on a quadratic the
best rate without teleport contracts the steepest direction no faster than the flattest, so a teleport needs
its own. A few seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from metatele import figures
from metatele.experiments import images as common

_GRID = [10 ** (e / 8) for e in range(-48, 5)]
_ARMS = ("GD", "GD teleport", "GD teleport, rate of GD")
_PLACES = (5, 0, 1)  # in the palette


def descend(name: str, lr: float, steps: int, teleport: bool) -> tuple[list[list[float]], list[float]]:
    """Points and losses of a trajectory."""
    import torch

    from metatele.tasks.functions import function

    f = function(name)
    w = torch.tensor(f.start, dtype=torch.float64)
    points, losses = [w.tolist()], [float(f.value(w))]
    if teleport:
        w = f.teleport(w)
        points.append(w.tolist())
    for _ in range(steps):
        w = w - lr * f.gradient(w)
        points.append(w.tolist())
        value = float(f.value(w))
        losses.append(value if math.isfinite(value) else math.inf)
        if not math.isfinite(value) or value > 1e12:
            return points, losses + [math.inf] * (steps + 1 - len(losses))
    return points, losses


def _safe(losses: list[float]) -> list[float]:
    """Losses with a logarithm: what is below rounding counts as rounding."""
    return [max(loss, 1e-30) for loss in losses]


def _tuned(name: str, steps: int, teleport: bool) -> float:
    """The rate of the grid with the least mean log loss."""

    def score(lr: float) -> float:
        return sum(map(math.log, _safe(descend(name, lr, steps, teleport)[1])))

    return min(_GRID, key=score)


def run(steps: int) -> dict[str, Any]:
    """The content of ``results.json``; arms are those of all functions."""
    from metatele.tasks.functions import FUNCTIONS

    begin_s = time.perf_counter()
    arms = []
    for name in FUNCTIONS:
        own = {teleport: _tuned(name, steps, teleport) for teleport in (False, True)}
        for arm in _ARMS:
            lr = own[arm == "GD teleport"]
            points, losses = descend(name, lr, steps, arm != "GD")
            kept = [v if math.isfinite(v) else None for v in losses]
            arms.append({"name": arm, "function": name, "lr": lr, "points": points, "loss": [kept]})
    return {
        "format": common.FORMAT,
        "experiment": "functions",
        "steps": steps,
        "seconds": time.perf_counter() - begin_s,
        "arms": arms,
    }


def table(doc: dict[str, Any]) -> list[list[str]]:
    """Losses at a few steps."""
    shown = sorted({s for s in (0, 1, 3, 10, 30, 100) if s < doc["steps"]} | {doc["steps"]})
    rows = [["function", "arm", "lr", *(f"loss at {s}" for s in shown)]]
    for arm in doc["arms"]:
        values = [arm["loss"][0][s] for s in shown]
        rows.append(
            [
                arm["function"],
                arm["name"],
                f"{arm['lr']:.2g}",
                *("diverged" if v is None else f"{v:.3g}" for v in values),
            ]
        )
    return rows


def figure(doc: dict[str, Any]) -> bytes:
    """Trajectories on the level sets above, losses below."""
    import numpy as np
    import torch

    from metatele.tasks.functions import FUNCTIONS, function

    fig, grid = figures.subplots(2, 3, figsize=(figures.WIDTH, 6.4), layout="constrained")
    for column, name in enumerate(FUNCTIONS):
        f, chosen = function(name), [arm for arm in doc["arms"] if arm["function"] == name]
        everything = np.array([p for arm in chosen for p in arm["points"]] + [list(f.optimum)])
        inside = everything[np.abs(everything).max(1) < 30]  # a diverging one would hide the others
        low, high = inside.min(0), inside.max(0)
        margin = 0.15 * (high - low) + 0.1
        xs, ys = (np.linspace(low[i] - margin[i], high[i] + margin[i], 200) for i in (0, 1))
        mesh = torch.from_numpy(np.stack(np.meshgrid(xs, ys), -1))
        values = f.value(mesh).numpy()
        axes = grid[0, column]
        axes.contour(xs, ys, np.log10(values + 1e-6), levels=14, cmap="Greys", linewidths=0.6)
        for arm, place in zip(chosen, _PLACES, strict=True):
            colour = figures.COLOURS[place]
            p = np.array(arm["points"])
            axes.plot(p[:, 0], p[:, 1], color=colour, marker=".", markersize=5, linewidth=1.2, label=arm["name"])
            if arm["name"] == "GD teleport":
                axes.plot(p[:2, 0], p[:2, 1], color=colour, linestyle=":", linewidth=2.5, label="teleport")
            losses = [np.nan if v is None else v for v in arm["loss"][0]]
            grid[1, column].plot(np.maximum(losses, 1e-30), **figures.line_style(place))
        axes.set_xlim(xs[0], xs[-1])
        axes.set_ylim(ys[0], ys[-1])
        axes.plot(*f.optimum, marker="*", color="black", markersize=9, linestyle="", label="minimum")
        axes.grid(visible=False)
        figures.title(axes, f"{name},\nrates {chosen[0]['lr']:.2g} and {chosen[1]['lr']:.2g}")
        figures.loss_axes(grid[1, column])
        grid[1, column].set_xlabel("step")
    grid[1, 0].set_ylabel("loss")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=figures.SIZE)
    return figures.png(fig)


def main(arguments: Sequence[str]) -> None:
    """Parse, run, print the table."""
    parser = common.small_parser("functions", __doc__, 1, 100)
    common.small_main(arguments, parser, lambda args: run(args.steps), table, figure)
