"""Figure 12: what a teleport does to momentum, and the right objective for AdaGrad.

Regression ``‖Y - W₃σ(W₂σ(W₁X))‖²`` with X 5x4, Y 8x4, widths 6 and 7, LeakyReLU 0.1, everything uniform on
[0, 1]; 300 steps, one teleport after step 5. (a) momentum with its buffer carried along, kept, or reset;
(b) AdaGrad with ascent of ‖∇L‖² (rate 1.2e-5) and of ‖∇L‖²_A (7.5e-3, A from the optimizer's state). The
paper gives no learning rates for the optimizers: all arms of an optimizer share the one of a grid whose mean
log loss over these arms at the end, on other problems, is the least. A minute or two.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from metatele import figures
from metatele.experiments import images as common

_USUAL_STEPS = 300
_TELEPORT_STEP = 5
_GRID = [10 ** (e / 4) for e in range(-24, 1)]
_PLACES = (5, 0, 1, 4, 3)  # in the palette; the bare optimizer is first
# Arm -> (optimizer, teleport: objective, rate, state). A rate of None is found by line search.
ARMS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "Momentum": ("Momentum", None),
    "Momentum, carried": ("Momentum", {"lr": 1.2e-5, "state": "transport"}),
    "Momentum, kept": ("Momentum", {"lr": 1.2e-5, "state": "keep"}),
    "Momentum, reset": ("Momentum", {"lr": 1.2e-5, "state": "reset"}),
    "Momentum, carried, line search": ("Momentum", {"lr": None, "state": "transport"}),
    "AdaGrad": ("AdaGrad", None),
    "AdaGrad, ‖∇L‖²": ("AdaGrad", {"lr": 1.2e-5, "state": "keep"}),
    "AdaGrad, ‖∇L‖²_A": ("AdaGrad", {"lr": 7.5e-3, "state": "keep", "metric": "adaptive"}),
    "AdaGrad, ‖∇L‖²_A, line search": ("AdaGrad", {"lr": None, "state": "keep", "metric": "adaptive"}),
}


def problem(seed: int) -> tuple[Any, Any, Any]:
    """Model, inputs and targets of a run; the same on every machine."""
    import torch
    from torch import nn

    from metatele.random import generator

    random = generator(seed, "evaluation")
    model = nn.Sequential(
        *(nn.Linear(5, 6, False), nn.LeakyReLU(0.1), nn.Linear(6, 7, False), nn.LeakyReLU(0.1), nn.Linear(7, 8, False))
    )
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.rand(p.shape, generator=random))
    return model, torch.rand(4, 5, generator=random), torch.rand(4, 8, generator=random)


def _optimizer(name: str, parameters: Any, lr: float) -> Any:
    import torch

    if name == "Momentum":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    return torch.optim.Adagrad(parameters, lr=lr)


def trajectory(arm: str, seed: int, lr: float, steps: int) -> tuple[list[float], dict[str, float] | None]:
    """Losses before each step and after the last, and what the teleport did."""
    import metatele

    name, teleport = ARMS[arm]
    model, x, y = problem(seed)
    optimizer = _optimizer(name, model.parameters(), lr)
    if teleport is not None:
        move = metatele.GradientNormAscent(teleport["lr"], 10, action="exact", max_drift=0.1)
        optimizer = metatele.TeleportOptimizer(
            optimizer,
            model,
            move,
            at=[_TELEPORT_STEP],
            state=teleport["state"],
            metric=teleport.get("metric", "euclidean"),
        )
    losses: list[float] = []
    for _ in range(steps + 1):
        optimizer.zero_grad()
        loss = (model(x) - y).square().sum()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]) or losses[-1] > 1e8:
            return losses + [math.inf] * (steps + 1 - len(losses)), None
        loss.backward()
        optimizer.step()
    if teleport is None:
        return losses, None
    report = optimizer.report
    return losses, {
        "objective_ratio": float(report.objective_after / report.objective_before),
        "drift": float(report.drift),
        "rolled_back": float(report.rolled_back),
        "seconds": report.seconds,
    }


def tuned(name: str, steps: int) -> float:
    """The rate that serves all arms of an optimizer best, on three problems of their own."""

    def score(lr: float) -> float:
        ends = [
            trajectory(arm, 1000 + i, lr, steps)[0][-1]
            for arm, (optimizer, _) in ARMS.items()
            if optimizer == name
            for i in range(3)
        ]
        return sum(math.log(max(end, 1e-30)) for end in ends)

    return min(_GRID, key=score)


def run(seeds: int, steps: int) -> dict[str, Any]:
    """The content of ``results.json``."""
    begin_s = time.perf_counter()
    rates = {name: tuned(name, steps) for name in ("Momentum", "AdaGrad")}
    arms = []
    for arm, (name, _) in ARMS.items():
        runs = [trajectory(arm, seed, rates[name], steps) for seed in range(seeds)]
        arms.append(
            {
                "name": arm,
                "lr": rates[name],
                "loss": [[v if math.isfinite(v) else None for v in losses] for losses, _ in runs],
                "teleports": [t for _, t in runs if t is not None],
            }
        )
    return {
        "format": common.FORMAT,
        "experiment": "fig12",
        "steps": steps,
        "seeds": list(range(seeds)),
        "seconds": time.perf_counter() - begin_s,
        "arms": arms,
    }


def table(doc: dict[str, Any]) -> list[list[str]]:
    """Losses at a few steps, and what the teleports did."""
    shown = [s for s in (6, 10, 30, 100, 300) if s <= doc["steps"]]
    rows = [["arm", "lr", *(f"loss at {s}" for s in shown), "grad norm² x (each run)", "drift"]]
    for arm in doc["arms"]:
        ratios = ", ".join(f"{t['objective_ratio']:.3g}" for t in arm["teleports"])
        drift = max((t["drift"] for t in arm["teleports"]), default=math.nan)
        rows.append(
            [
                arm["name"],
                f"{arm['lr']:.1e}",
                *(common.cell([losses[s] for losses in arm["loss"]], 3) for s in shown),
                ratios,
                f"{drift:.1e}" if math.isfinite(drift) else "",
            ]
        )
    return rows


def figure(doc: dict[str, Any]) -> bytes:
    """Both panels."""
    fig, panels = figures.subplots(1, 2, figsize=(figures.WIDTH, 3.8), layout="constrained", sharey=True)
    for axes, name in zip(panels, ("Momentum", "AdaGrad"), strict=True):
        chosen = [arm for arm in doc["arms"] if arm["name"].startswith(name)]
        for arm, place in zip(chosen, _PLACES, strict=False):
            short = arm["name"].removeprefix(f"{name}, ").replace(", line", ",\nline")
            label = "no teleport" if short == name else short
            common.draw_band(axes, range(doc["steps"] + 1), arm["loss"], label=label, **figures.line_style(place))
        axes.set_xlabel("step")
        axes.margins(x=0)
        figures.title(axes, name)
    figures.loss_axes(*panels, since=3)
    panels[0].set_ylabel("loss")
    figures.title(fig, f"mean and one standard deviation over {len(doc['seeds'])} runs; teleport after step 5")
    for axes in panels:
        figures.label_lines(axes)
    return figures.png(fig)


def main(arguments: Sequence[str]) -> None:
    """Parse, run, print the table."""
    parser = common.small_parser("fig12", __doc__, 5, _USUAL_STEPS)
    common.small_main(arguments, parser, lambda args: run(args.seeds, args.steps), table, figure)
