"""Record a run of the learned optimizer and draw what its controller did.

    python docs/draw/a_real_run.py --out runs/recording      # the stored one: --out results/recording, 20 seconds
    python docs/draw/a_real_run.py --redraw results/recording/run.json --out runs/recording

The run: a small CNN on scikit-learn's digits, batches of 100, 540 steps, `total_steps` known, seed 0.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from small import small_png
from torch import nn

import metatele
from metatele.figures import ink, line_style, subplots
from metatele.files import write_atomically

BATCH, EVERY = 100, 5


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images and labels to train on, and held out."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:1437], order[1437:]
    return x[train], y[train], x[held_out], y[held_out]


def network() -> nn.Sequential:
    """Four layers with weights."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def record(steps: int) -> dict[str, Any]:
    """Train, and keep what was recorded."""
    torch.manual_seed(0)
    x, y, held_out, labels = data()
    model, loss_fn = network(), nn.functional.cross_entropy
    optimizer = metatele.LearnedOptimizer(model, total_steps=steps)
    begun, done = time.perf_counter(), 0
    with optimizer.record(every=EVERY) as recording:
        while done < steps:
            for batch in torch.randperm(len(x)).split(BATCH):
                optimizer.zero_grad()
                loss_fn(model(x[batch]), y[batch]).backward()
                optimizer.step()
                done += 1
                if done == steps:
                    break
    with torch.no_grad():
        outputs = model(held_out)
        ends = {
            "train": float(loss_fn(model(x), y)),
            "held_out": float(loss_fn(outputs, labels)),
            "accuracy": float((outputs.argmax(1) == labels).float().mean()),
        }
    run = {
        "steps": steps,
        "batch": BATCH,
        "seed": 0,
        "seconds": time.perf_counter() - begun,
        "torch": torch.__version__,
    }
    return {**run, **ends, "rows": recording.rows()}


def draw(rows: list[dict[str, Any]]) -> Any:
    """What it saw, what it set, and what came of it."""
    looks = [row for row in rows if "layers" in row]
    at = [row["step"] for row in looks]

    def layer(name: str) -> list[float]:
        return [median(numbers[name] for numbers in row["layers"].values()) for row in looks]

    figure, panels = subplots(2, 2, figsize=(8.6, 6.2), layout="constrained", sharex=True)
    (loss, length), (sees, sets) = panels
    lines(loss, [("", at, [row["loss"] for row in looks], (0, 0))], "Training loss, at looks")
    every, median_layer = [row["step"] for row in rows], "‖ΔW‖/‖W‖,\nmedian layer"
    steps = [("step length η", every, [row["length"] for row in rows], (130, 0.045))]
    steps.append((median_layer, at, layer("moved"), (45, 0.0018)))
    lines(length, steps, "Step length")
    seen = [("agreement of half batches", at, [row["seen"]["agreement"] for row in looks], (80, 0.5))]
    seen.append(("samples seen before", at, [row["seen"]["known"] for row in looks], (235, 0.82)))
    seen.append(("momentum over gradients, ρ", at, layer("momentum"), (120, -0.1)))
    lines(sees, seen, "What the controller sees")
    sees.set_yscale("linear")
    sees.set_ylim(-0.14, 1.03)
    numbers = [
        ("damping λ", at, layer("damping"), (250, 5.7)),
        ("spectral share r", at, layer("spectral"), (250, 1.05)),
    ]
    numbers.append(("exponent p", at, layer("exponent"), (250, 0.225)))
    numbers.append(("weight decay w", at, layer("decay"), (250, 0.1)))
    numbers.append(("gain of η", at, [row["controls"]["gain"] for row in looks], (250, 0.034)))
    lines(sets, numbers, "What it sets, alike for these four layers")
    sets.set_ylim(0.02, 10)
    for axes in panels[1]:
        axes.set_xlabel("step")
    return figure


def lines(axes: Any, drawn: list[tuple[str, list[int], list[float], tuple[float, float]]], title: str) -> None:
    """Lines, each with its name beside it."""
    for number, (name, at, values, place) in enumerate(drawn):
        line = axes.plot(at, values, **line_style(number))[0]
        axes.text(*place, name, color=ink(line.get_color()), fontsize=10)
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def rounded(value: Any) -> Any:
    """Numbers of five digits."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    """Record, or redraw."""
    parser = argparse.ArgumentParser(description="Record a run of the learned optimizer, and draw it.")
    parser.add_argument("--steps", type=int, default=540)
    parser.add_argument("--redraw", type=Path, help="a stored run to draw, without running")
    parser.add_argument("--out", type=Path, default=Path("runs/recording"), help="folder for run.json and run.png")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.redraw is None:
        run = rounded(record(given.steps))
        write_atomically(given.out / "run.json", (json.dumps(run) + "\n").encode())
    else:
        run = json.loads(given.redraw.read_text(encoding="utf-8"))
    write_atomically(given.out / "run.png", small_png(draw(run["rows"])))
    print(f"held-out loss {run['held_out']:.4f}, accuracy {run['accuracy']:.4f}, training loss {run['train']:.2e}")


if __name__ == "__main__":
    main()
