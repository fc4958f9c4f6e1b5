"""Draw the idea: level sets of a network of two weights, a teleport along one of them, a step before and after.

    python docs/draw/the_idea.py --out runs/explanation      # the stored picture: --out docs/explanation

Everything in the picture is computed: the teleport by `metatele.teleport_`, the steps by `torch.optim.SGD`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from small import small_png
from torch import nn

import metatele
from metatele.figures import COLOURS, GREY, ink, subplots
from metatele.files import write_atomically

RATE = 0.15
RATES = tuple(n / 20 for n in range(1, 21))  # tried without teleport
STEPS = 12
START = (0.75, 0.45)
BEFORE, AFTER, TUNED, MINIMA = COLOURS[1], COLOURS[0], GREY, COLOURS[4]


def network(start: tuple[float, float] = START) -> nn.Sequential:
    """``x ↦ u v x``, two weights."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.fill_(start[0])
        model[1].weight.fill_(start[1])
    return model


def place(model: nn.Sequential) -> tuple[float, float]:
    """(u, v)."""
    return float(model[0].weight.detach()), float(model[1].weight.detach())


def loss_fn(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``½(y - 1)²`` where the target is 1."""
    return 0.5 * (y - target).square().mean()


X = torch.ones(1, 1, dtype=torch.float64)


def trained(model: nn.Sequential, rate: float) -> tuple[list[tuple[float, float]], list[float]]:
    """Where gradient descent goes, and the loss there."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    path, losses = [], []
    for _ in range(STEPS + 1):
        optimizer.zero_grad()
        loss = loss_fn(model(X), X)
        loss.backward()
        path.append(place(model))
        losses.append(float(loss.detach()))
        optimizer.step()
    return path, losses


def teleported() -> tuple[nn.Sequential, Any]:
    """The network at a steeper point of its orbit, and the report."""
    model = network()
    report = metatele.teleport_(model, X, X, loss_fn, objective="grad-norm", steps=20, radius=0.4)
    return model, report


def draw() -> bytes:
    """The picture, as a PNG."""
    plain, plain_losses = trained(network(), RATE)
    model, report = teleported()
    moved, moved_losses = trained(model, RATE)
    ratio = report.objective_after / report.objective_before
    best = min(RATES, key=lambda rate: trained(network(), rate)[1][-1])
    _, tuned = trained(network(), best)
    figure, (left, right) = subplots(1, 2, figsize=(9, 3.7), layout="constrained", width_ratios=(1.5, 1))
    _levels(left, plain, moved)
    for losses, colour, style, text, at in (
        (plain_losses, BEFORE, "-", f"no teleport, rate {RATE}", (4.6, 1e-1)),
        (moved_losses, AFTER, "-", f"teleport first, rate {RATE}", (4.9, 2e-7)),
        (tuned, TUNED, "--", f"no teleport, best rate: {best:g}", (3.4, 3e-5)),
    ):
        right.plot(losses, color=colour, linestyle=style, marker="o", markersize=3.5)
        right.text(*at, text, color=colour, fontsize=10)
    right.set_yscale("log")
    right.set_ylim(1e-8, 1)
    right.set_xlabel("gradient steps")
    right.set_title("loss L = ½ (1 − u v)²", fontsize=11)
    right.minorticks_off()
    right.grid(alpha=0.25)
    right.spines[["top", "right"]].set_visible(False)
    print(f"loss {report.loss_before:.6f} -> {report.loss_after:.6f}; ‖∇L‖² x {ratio:.2f}")
    return small_png(figure)


def _levels(axes: Any, plain: list[tuple[float, float]], moved: list[tuple[float, float]]) -> None:
    u, v = torch.meshgrid(torch.linspace(0.02, 3.1, 200), torch.linspace(0.0, 1.45, 200), indexing="xy")
    loss = 0.5 * (1 - u * v).square()
    level = 0.5 * (1 - plain[0][0] * plain[0][1]) ** 2
    axes.contour(u, v, loss, levels=[0.02, 0.08, 0.15, 0.3, 0.4], colors="#b5b5b5", linewidths=0.9)
    product = plain[0][0] * plain[0][1]
    line = torch.linspace(0.2, 3.1, 200)
    axes.plot(line, product / line, color="black", linewidth=1.8)
    axes.plot(line, 1 / line, color=MINIMA, linewidth=2.2)
    axes.text(1.08, 0.98, "minima: u v = 1", color=ink(MINIMA), fontsize=10)
    axes.text(1.0, 0.1, f"one level set, L = {level:.2f}", fontsize=10)
    along = torch.linspace(plain[0][0], moved[0][0], 60)
    axes.annotate(
        "",
        moved[0],
        (float(along[-8]), product / float(along[-8])),
        arrowprops={"arrowstyle": "-|>", "color": AFTER, "lw": 2.2},
    )
    axes.plot(along[:-4], product / along[:-4], color=AFTER, linewidth=2.6, linestyle=(0, (2, 1)))
    for path, colour in ((plain, BEFORE), (moved, AFTER)):
        axes.plot(*path[0], "o", color=colour, markersize=7)
        axes.annotate(
            "", path[1], path[0], arrowprops={"arrowstyle": "->", "color": colour, "lw": 2, "shrinkA": 0, "shrinkB": 0}
        )
    axes.annotate("w", plain[0], (-14, -6), textcoords="offset points", color=BEFORE, fontsize=12)
    axes.annotate("g·w", moved[0], (-6, -18), textcoords="offset points", color=AFTER, fontsize=12)
    axes.text(1.1, 0.36, "teleport", color=AFTER, fontsize=10)
    axes.annotate("step", plain[1], (-4, 6), textcoords="offset points", color=BEFORE, fontsize=10)
    axes.annotate("step", moved[1], (6, -2), textcoords="offset points", color=AFTER, fontsize=10)
    axes.set(xlim=(0.2, 2.75), ylim=(0, 1.4), xlabel="u", ylabel="v", aspect="equal")
    axes.set_title("the network x ↦ u v x", fontsize=11)


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description="Draw the picture of the idea.")
    parser.add_argument("--out", type=Path, default=Path("runs/explanation"), help="folder for the-idea.png")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "the-idea.png", draw())


if __name__ == "__main__":
    main()
