"""How far the loss rises between two networks that were trained apart, before and after their units are matched.

python benchmarks/rebasin.py --data-root DATA --json results/benchmarks/rebasin.json
python benchmarks/rebasin.py --table results/benchmarks/rebasin.json   # table and figure again

Pairs of networks of one architecture differ in their start and in the order of their batches. ``loss_barrier`` goes
along the line between their weights in 11 points: as they were trained; after one of them had its units put in a random
order, hidden units, channels, streams and heads alike, which is the control; after ``match_``. The barrier is what the
held-out loss at a point has above the line through the losses at both ends. Networks with batch norm have their
statistics gathered anew at every point. About a quarter of an hour on one core; what the file of ``--json`` holds
already is not done again.

Flags: --seeds (pairs), --kinds (of networks), --json, --table, --data-root (folder with MNIST, Fashion-MNIST and
tinyshakespeare/input.txt).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from breadth_tasks import CONTEXT, GPT  # noqa: E402
from common import environment, save  # noqa: E402

from metatele.data import load_images  # noqa: E402
from metatele.figures import COLOURS, SIZE, WIDTH, png, subplots, title  # noqa: E402
from metatele.symmetry.exact import act_, random_element  # noqa: E402
from metatele.symmetry.find import find_symmetries  # noqa: E402
from metatele.teleport import loss_barrier, match_  # noqa: E402

POINTS, HELD_OUT = 11, 1000
ARMS = {"as trained": "before", "random order": "control", "matched": "matched", "order alone": "order"}


class Block(nn.Module):
    """Two convolutions beside the residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.inner = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.outer = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.relu(x + self.outer(self.second(F.relu(self.inner(self.first(x))))))


def mlp(width: int = 256) -> nn.Module:
    hidden = (nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


def cnn(width: int = 64) -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in ((1, width // 2), (width // 2, width), (width, width)):
        layers += [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * 16, 10))


def resnet(width: int = 32) -> nn.Module:
    stem = (nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*stem, Block(width), Block(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


@dataclass(frozen=True)
class Kind:
    """A network and its training.

    Attributes:
        title: In the table.
        make: The network.
        epochs: Of Adam, with a rate that falls to zero.
        samples: That it is trained on.
        lr: The first rate.
        batch: Samples of a step.
    """

    title: str
    make: Callable[[], nn.Module]
    epochs: int
    samples: int
    lr: float = 1e-3
    batch: int = 100


KINDS = {
    "mlp": Kind("MLP 784-256-256-10", mlp, 3, 30_000),
    "cnn": Kind("CNN, 32-64-64 channels", cnn, 3, 10_000),
    "resnet": Kind("ResNet, 32 channels, batch norm", resnet, 2, 10_000),
    "gpt": Kind("GPT, 2 layers of 64, 4 heads", GPT, 1, 9_600, 3e-3, 32),
}
SETS = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "text": "tinyshakespeare"}
RUNS = [*((kind, name) for kind in ("mlp", "cnn", "resnet") for name in ("mnist", "fashion-mnist")), ("gpt", "text")]
Pair = tuple[Tensor, Tensor]


def pairs_of(name: str, root: Path) -> tuple[Pair, Pair]:
    """Training and held-out samples."""
    if name == "text":
        codes = np.frombuffer((root / "tinyshakespeare" / "input.txt").read_bytes(), dtype=np.uint8)
        text = torch.from_numpy(np.searchsorted(np.unique(codes), codes))
        windows = text[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
        end = len(text) * 9 // 10
        begins = torch.randint(end - CONTEXT - 1, (9_600,), generator=torch.Generator().manual_seed(0))
        train = text[begins[:, None] + torch.arange(CONTEXT + 1)]
        held = windows[-100:]
        return (train[:, :-1], train[:, 1:]), (held[:, :-1], held[:, 1:])
    images = load_images(name, root)
    x, held = ((t.view(-1, 1, 28, 28) - 0.3) / 0.3 for t in (images.train_images, images.test_images))
    return (x, images.train_labels), (held[:HELD_OUT], images.test_labels[:HELD_OUT])


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def trained(kind: Kind, data: Pair, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model, (x, y) = kind.make(), (t[: kind.samples] for t in data)
    optimizer = torch.optim.Adam(model.parameters(), kind.lr)
    batch = kind.batch
    steps = kind.epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(kind.epochs):
        for rows in torch.randperm(len(x))[: len(x) // batch * batch].view(-1, batch):
            optimizer.zero_grad()
            loss_of(model, x[rows], y[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def shuffled_(model: nn.Module, x: Tensor, seed: int) -> None:
    """Put the units of all spaces in a random order. Running statistics stay, as they are gathered anew."""
    random, own = torch.Generator().manual_seed(seed), dict(model.named_parameters())
    for space in find_symmetries(copy.deepcopy(model).train(), x).spaces:
        if space.group == "perm":
            act_(space, random_element(space, 1.0, random), own)


def measured(kind: str, name: str, seed: int, data: tuple[Pair, Pair]) -> dict[str, Any]:
    """A row: losses on the line of each arm."""
    about, (train, held) = KINDS[kind], data
    begun = time.perf_counter()
    a, b = (trained(about, train, 2 * seed + n) for n in range(2))
    seconds = time.perf_counter() - begun
    few = train[0][:8]
    arms = {"before": a, "control": copy.deepcopy(a), "matched": copy.deepcopy(a), "order": copy.deepcopy(a)}
    shuffled_(arms["control"], few, seed)
    begun = time.perf_counter()
    report = match_(arms["matched"], b, few, seed=seed)
    row: dict[str, Any] = {"kind": kind, "set": name, "seed": seed, "seconds_of_training": seconds}
    row["seconds_of_matching"] = time.perf_counter() - begun
    match_(arms["order"], b, few, seed=seed, scales=False)
    row |= {"similarity": report.similarity, "moved": report.moved, "drift": report.drift, "sweeps": report.sweeps}
    batches = [train[0][n : n + 250] for n in range(0, 1000, 250)]
    for arm, model in arms.items():
        few_points = arm in ("control", "order")
        line = loss_barrier(model, b, lambda m: loss_of(m, *held), 3 if few_points else POINTS, refresh=batches)
        row[arm] = {"losses": line.losses, "midpoint": line.midpoint, "barrier": line.barrier}
    return row


def table(result: dict[str, Any]) -> str:
    """Means over pairs, with the standard deviation."""
    lines = [
        "| network | data | pairs | loss at the ends | midpoint barrier as trained | random order | matched "
        "| matched, order alone | as trained / matched |",
        "|:--|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for kind, name in RUNS:
        rows = [row for row in result["rows"] if (row["kind"], row["set"]) == (kind, name)]
        if not rows:
            continue
        cells = [KINDS[kind].title, SETS[name], str(len(rows))]
        cells.append(
            f"{statistics.fmean(x for r in rows for x in (r['before']['losses'][0], r['before']['losses'][-1])):.3f}"
        )
        middle = {arm: [row[arm]["midpoint"] for row in rows] for arm in ARMS.values()}
        for arm in ("before", "control", "matched", "order"):
            spread = f" ± {statistics.stdev(middle[arm]):.3f}" if len(rows) > 1 else ""
            cells.append(f"{statistics.fmean(middle[arm]):.3f}{spread}")
        ratio = statistics.fmean(middle["before"]) / max(statistics.fmean(middle["matched"]), 1e-9)
        cells.append(f"{ratio:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def drawn(result: dict[str, Any]) -> bytes:
    """A panel for each network: mean loss on the line between two of a pair, from the lowest pair to the highest."""
    runs = [run for run in RUNS if any((row["kind"], row["set"]) == run for row in result["rows"])]
    columns = (len(runs) + 1) // 2
    figure, grid = subplots(2, columns, figsize=(WIDTH, 5.2), squeeze=False, layout="constrained")
    for axes in grid.flat[len(runs) :]:
        axes.axis("off")
    for axes, (kind, name) in zip(grid.flat, runs, strict=False):
        rows = [row for row in result["rows"] if (row["kind"], row["set"]) == (kind, name)]
        for arm, colour, dash in (("before", COLOURS[5], "--"), ("matched", COLOURS[0], "-")):
            losses = np.array([row[arm]["losses"] for row in rows])
            at = np.linspace(0, 1, losses.shape[1])
            axes.fill_between(at, losses.min(0), losses.max(0), color=colour, alpha=0.15, linewidth=0)
            axes.plot(at, losses.mean(0), color=colour, linestyle=dash)
        title(axes, f"{KINDS[kind].title.partition(',')[0]}\n{SETS[name]}")
        axes.set_xlabel("t")
        axes.set_ylim(bottom=0)
    looks = {"as trained": (COLOURS[5], "--"), "matched": (COLOURS[0], "-")}
    lines = [grid[0, 0].plot([], [], color=colour, linestyle=dash)[0] for colour, dash in looks.values()]
    figure.legend(lines, looks, loc="outside lower center", ncols=2, frameon=False, fontsize=SIZE)
    for axes in grid[:, 0]:
        axes.set_ylabel("held-out loss")
    return png(figure)


def written(path: Path, result: dict[str, Any]) -> None:
    """Table and figure beside the numbers."""
    path.with_suffix(".md").write_text(table(result) + "\n", encoding="utf-8")
    path.with_suffix(".png").write_bytes(drawn(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--data-root", type=Path, default=ROOT / "data")
    given = parser.parse_args()
    if given.table:
        result = json.loads(given.table.read_text(encoding="utf-8"))
        written(given.table, result)
        print(table(result))
        return
    torch.set_num_threads(1)
    result = {"rows": [], "environment": environment()}
    if given.json and given.json.exists():
        result = json.loads(given.json.read_text(encoding="utf-8"))
    done = {(row["kind"], row["set"], row["seed"]) for row in result["rows"]}
    data = {name: pairs_of(name, given.data_root) for name in dict.fromkeys(name for _, name in RUNS)}
    for kind, name in RUNS:
        for seed in range(given.seeds):
            if (kind, name, seed) in done or kind not in given.kinds:
                continue
            result["rows"].append(row := measured(kind, name, seed, data[name]))
            middle = ", ".join(f"{title} {row[arm]['midpoint']:.3f}" for title, arm in ARMS.items())
            print(f"{kind}, {name}, pair {seed}: {middle}", file=sys.stderr, flush=True)
            save(given.json, result)
    if given.json:
        written(given.json, result)
    print(table(result))


if __name__ == "__main__":
    main()
