"""``metatele demo``: a small network trained by the learned optimizer and, beside it, by Adam at two rates."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from metatele.command_line import OneLineParser, add_threads_flag, chosen_threads, make_folder, whole_number
from metatele.extras import is_there

if TYPE_CHECKING:
    from torch import Tensor

_BATCH = 64
_MEASURED = "docs/field.md and docs/breadth.md"
_NAMES = ("LearnedOptimizer", "Adam, rate 1e-3", "Adam, rate 1e-2")
_ROWS, _COLUMNS, _BAR = 12, 60, 24  # of the plot in letters; letters of a bar


@dataclass
class Runner:
    """A network, its optimizer, and what was measured so far."""

    name: str
    model: Any
    optimizer: Any
    steps: list[int] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of training alone
    spent_s: float = 0.0


def parser() -> argparse.ArgumentParser:
    """Flags of the demonstration."""
    p = OneLineParser(
        prog="demo",
        description="Train a small CNN on handwritten digits three times: with LearnedOptimizer, which has no rate to "
        "choose, and with Adam at 1e-3 and at 1e-2. Without scikit-learn the images are made up; without matplotlib "
        "the curves are drawn in letters. About 12 seconds.",
        allow_abbrev=False,
    )
    p.add_argument("--out", metavar="FOLDER", default="runs/demo", help="of curves and figure (default runs/demo)")
    p.add_argument("--epochs", type=whole_number(1), default=10, metavar="N", help="of training (default 10)")
    p.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help="of everything random (default 0)")
    add_threads_flag(p)
    p.add_argument("--open", action="store_true", help="show the figure, where there is a display")
    return p


def main(arguments: Sequence[str]) -> None:
    """Parse, train side by side, print the table, name the figure."""
    args = parser().parse_args(arguments)
    out = Path(args.out)
    make_folder(out)

    import torch

    from metatele.files import write_atomically
    from metatele.training.report import markdown

    if threads := chosen_threads(args.threads, small=True):
        torch.set_num_threads(threads)
    what, data = images(args.seed)
    steps = args.epochs * math.ceil(len(data[0]) / _BATCH)
    print(f"{what}; a CNN of two convolutions, batches of {_BATCH}, {steps} steps", flush=True)
    runners = race(data, args.epochs, args.seed, Display(_NAMES, steps, sys.stdout).show)
    print("\n" + markdown(table(runners)), end="")
    # On the digits, seed 0, four images are four fifths of the loss; Adam at 1e-2 ends lower on two of six seeds.
    print(f"One run on {len(data[2])} held-out images: the order can change with --seed ({_MEASURED} measure it).")
    curves = [{k: getattr(r, k) for k in ("name", "steps", "held_out", "accuracy", "seconds")} for r in runners]
    found = json.dumps({"data": what, "seed": args.seed, "curves": curves}) + "\n"
    write_atomically(out / "curves.json", found.encode())
    if not is_there("matplotlib"):
        print("\n" + in_letters(runners) + f"\ncurves: {out / 'curves.json'}")
        return
    picture = out / "loss.png"
    write_atomically(picture, figure(runners, what))
    print(f"figure: {picture}")
    if args.open and not opened(picture):
        print("there is no display to open it on")


def images(seed: int) -> tuple[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """What the images are, and those to train on with their classes, then those held out with theirs."""
    import torch

    if is_there("sklearn"):
        from metatele.data import load_images

        d = load_images("digits")
        shown = [x.view(-1, 1, 8, 8) for x in (d.train_images, d.test_images)]
        return "scikit-learn's digits", (shown[0], d.train_labels, shown[1], d.test_labels)
    random = torch.Generator().manual_seed(seed)
    # Ten smooth shapes, each shifted by up to a pixel and under noise.
    shapes = torch.nn.functional.interpolate(torch.rand(10, 1, 4, 4, generator=random), size=10, mode="bilinear")
    labels = torch.randint(10, (1797,), generator=random)
    shifts = torch.randint(3, (1797, 2), generator=random).tolist()
    cut = [shapes[c, :, a : a + 8, b : b + 8] for c, (a, b) in zip(labels.tolist(), shifts, strict=True)]
    x = torch.stack(cut) + 0.3 * torch.randn(1797, 1, 8, 8, generator=random)
    return "made-up images, as scikit-learn is not installed", (x[:1437], labels[:1437], x[1437:], labels[1437:])


def network(seed: int) -> Any:
    """A small CNN for 8x8 images and ten classes; the same start for every optimizer."""
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)),
        )


def race(
    data: tuple[Tensor, Tensor, Tensor, Tensor], epochs: int, seed: int, show: Callable[[list[Runner]], None]
) -> list[Runner]:
    """Train three networks of one start on the same batches, epoch by epoch in turn.

    Args:
        data: Images and classes to train on, then those held out.
        epochs: Of each.
        seed: Of the start and of the batches.
        show: Is called with the runners when one has been measured.
    """
    import torch
    from torch import nn

    import metatele

    x, y, held_x, held_y = data
    loss = nn.functional.cross_entropy
    models = [network(seed) for _ in _NAMES]
    rates = [torch.optim.Adam(m.parameters(), lr=lr) for m, lr in zip(models[1:], (1e-3, 1e-2), strict=True)]
    optimizers = [metatele.LearnedOptimizer(models[0]), *rates]
    runners = [Runner(*parts) for parts in zip(_NAMES, models, optimizers, strict=True)]

    def measure(runner: Runner, steps: int) -> None:
        with torch.no_grad():
            outputs = runner.model(held_x)
        runner.steps.append(steps)
        runner.held_out.append(float(loss(outputs, held_y)))
        runner.accuracy.append(float((outputs.argmax(1) == held_y).float().mean()))
        runner.seconds.append(runner.spent_s)
        show(runners)

    for runner in runners:
        measure(runner, 0)
    random, done = torch.Generator().manual_seed(seed), 0
    for _ in range(epochs):
        batches = torch.randperm(len(x), generator=random).split(_BATCH)
        done += len(batches)
        for runner in runners:
            began_s = time.perf_counter()
            for batch in batches:
                runner.optimizer.zero_grad()
                loss(runner.model(x[batch]), y[batch]).backward()
                runner.optimizer.step()
            runner.spent_s += time.perf_counter() - began_s
            measure(runner, done)
    return runners


class Display:
    """Progress: a line for each runner, drawn over itself on a terminal; elsewhere a plain line now and then.

    Args:
        names: Of the runners.
        steps: Of each, at the end.
        stream: Where it goes.
    """

    def __init__(self, names: Sequence[str], steps: int, stream: TextIO) -> None:
        self.steps, self.stream = steps, stream
        self.live = stream.isatty() and os.environ.get("TERM") != "dumb"
        self.width = max(map(len, names))
        self._drawn = 0
        self._next = 0.25
        try:
            "█·".encode(stream.encoding or "ascii")
            self.full, self.empty = "█", "·"
        except UnicodeEncodeError:
            self.full, self.empty = "#", "."

    def show(self, runners: list[Runner]) -> None:
        """Say how far they are; everywhere else than on a terminal at each quarter."""
        if self.live:
            lines = [self._line(runner) for runner in runners]
            up = f"\x1b[{self._drawn}F" if self._drawn else ""
            self.stream.write(up + "".join(f"\x1b[2K{line}\n" for line in lines))
            self._drawn = len(lines)
        else:
            slowest = min(r.steps[-1] if r.steps else 0 for r in runners)
            if slowest < self._next * self.steps:
                return
            while self._next * self.steps <= slowest:
                self._next += 0.25
            said = "; ".join(f"{r.name} {r.held_out[-1]:.3f}" for r in runners)
            self.stream.write(f"step {slowest} of {self.steps}, held-out loss: {said}\n")
        self.stream.flush()

    def _line(self, runner: Runner) -> str:
        done = runner.steps[-1] if runner.steps else 0
        full = round(_BAR * done / self.steps)
        bar = self.full * full + self.empty * (_BAR - full)
        if not runner.steps:
            return f"{runner.name:{self.width}} {bar}"
        measured = f"held-out loss {runner.held_out[-1]:6.3f}  accuracy {100 * runner.accuracy[-1]:5.1f} %"
        return f"{runner.name:{self.width}} {bar} {measured}"


def table(runners: Sequence[Runner]) -> list[list[str]]:
    """What each ended at, with a head."""
    ends = ([r.name, f"{r.held_out[-1]:.3f}", f"{100 * r.accuracy[-1]:.1f} %", f"{r.spent_s:.1f}"] for r in runners)
    return [["optimizer", "held-out loss", "accuracy", "seconds of training"], *ends]


def figure(runners: Sequence[Runner], what: str) -> bytes:
    """A PNG: held-out loss against steps, and against seconds."""
    from metatele import figures

    drawn, panels = figures.subplots(1, 2, figsize=(figures.WIDTH, 3.6), layout="constrained", sharey=True)
    places = (0, 1, figures.MOST_LINES - 1)
    for axes, abscissa in zip(panels, ("steps", "seconds"), strict=True):
        for runner, place in zip(runners, places, strict=True):
            axes.plot(getattr(runner, abscissa), runner.held_out, label=runner.name, **figures.line_style(place))
        axes.set_xlabel(f"{abscissa} of training")
        axes.set_xlim(left=0)
    figures.loss_axes(*panels)
    panels[0].margins(x=0)
    panels[0].set_ylabel("held-out loss")
    figures.title(drawn, f"{what}, a small CNN")
    figures.label_lines(panels[1])
    return figures.png(drawn)


def in_letters(runners: Sequence[Runner]) -> str:
    """The curves as text: held-out loss, on a logarithmic scale, against steps."""
    logs = [[math.log(max(v, 1e-12)) if math.isfinite(v) else math.nan for v in r.held_out] for r in runners]
    known = [v for curve in logs for v in curve if math.isfinite(v)] or [0.0]
    low, span = min(known), max(max(known) - min(known), 1e-9)
    grid = [[" "] * _COLUMNS for _ in range(_ROWS)]
    marks = ("*", "o", "x")
    last = max(max(r.steps) for r in runners) or 1
    for runner, curve, mark in reversed(list(zip(runners, logs, marks, strict=True))):
        for step, value in zip(runner.steps, curve, strict=True):
            if math.isfinite(value):
                row = _ROWS - 1 - round((_ROWS - 1) * (value - low) / span)
                grid[row][round((_COLUMNS - 1) * step / last)] = mark
    ticks = {0: math.exp(low + span), _ROWS - 1: math.exp(low)}
    lines = [f"{ticks[i]:8.3f} |" if i in ticks else f"{'':8} |" for i in range(_ROWS)]
    body = [line + "".join(cells) for line, cells in zip(lines, grid, strict=True)]
    named = ", ".join(f"{mark} {runner.name}" for mark, runner in zip(marks, runners, strict=True))
    foot = f"{'':8} +{'-' * _COLUMNS}\n{'':10}0{'steps':>{_COLUMNS // 2}}{last:>{_COLUMNS - _COLUMNS // 2 - 1}}"
    return f"held-out loss: {named}\n" + "\n".join(body) + "\n" + foot


def opened(picture: Path) -> bool:
    """Show a picture with the system's viewer; whether there is one, and a display for it."""
    if sys.platform == "win32":
        os.startfile(picture)
        return True
    if sys.platform != "darwin" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    viewer = "open" if sys.platform == "darwin" else "xdg-open"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        subprocess.Popen([viewer, str(picture)], **quiet)  # type: ignore[call-overload]
    except OSError:
        return False
    return True
