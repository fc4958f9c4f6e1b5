"""Does a balance make weights easier to round to 8 and 4 bits?

python benchmarks/quantise.py --data-root DATA --json results/benchmarks/quantise.json   # minutes; resumable
python benchmarks/quantise.py --json results/benchmarks/quantise.json --redraw           # table and figure

Networks are trained with Adam. All matrices, kernels and embeddings are then rounded to nearest, symmetrically, with
one step for each output channel (a row) or one for the whole tensor; vectors stay. Each network is rounded at four
points of its orbit, where it computes the same: as it was trained, or at a random point (``randomize_``, condition
100), and at either after ``balance_``. What is told is how far the held-out loss rises, and how much accuracy is lost.
Scales chosen before rounding are known as cross-layer equalisation (Nagel et al. 2019, Section 4.1); a balance also
chooses bases where they are free.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from breadth_runs import CHUNK, loss_on  # noqa: E402
from breadth_tasks import TASKS, Arrays, Headed, Pair, Split, Task, _images, class_loss, mlp  # noqa: E402
from jobs import Row, Runs, Study, main  # noqa: E402
from short_runs import finite, interval, number, run_steps, shown  # noqa: E402

import metatele  # noqa: E402
from metatele.figures import COLOURS, SIZE, WIDTH, png, subplots, title  # noqa: E402

CONDITION = 100.0
BITS, STEPS_FOR = (8, 4), ("channel", "tensor")
POINTS = ("trained", "trained, balanced", "random", "random, balanced")


class Flat(nn.Module):
    """Images as vectors, or with one channel."""

    def __init__(self, inner: nn.Module, flat: bool) -> None:
        super().__init__()
        self.inner, self.flat = inner, flat

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.inner(x.flatten(1) if self.flat else x.unsqueeze(1))


def cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.ReLU()]
    return Headed(nn.Sequential(*layers, nn.Flatten()), nn.Linear(32 * 16, 10))


def _task(title: str, steps: int, make: Callable[[], nn.Module], split: Callable[[Arrays], Split]) -> Task:
    return Task(title, steps, make, split, class_loss, 10)


MADE: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: Flat(mlp((784, 256, 256, 10), nn.ReLU), True),
    "CNN": lambda: Flat(cnn(), False),
}
KINDS: dict[str, Task] = {
    f"{name}, {data}": _task(f"{name}, {words}", 600, make, _images(data, 64))
    for name, make in MADE.items()
    for data, words in (("mnist", "MNIST"), ("fashion", "Fashion-MNIST"))
} | {"GPT": _task("GPT 2 x 64, characters", 400, TASKS["gpt"].model, TASKS["gpt"].split)}


@dataclass(frozen=True)
class Job:
    """A trained network."""

    kind: str
    seed: int


@torch.no_grad()
def rounded(model: nn.Module, bits: int, each: str) -> nn.Module:
    """A copy with its matrices on a grid: ``W ← s round(W / s)``, ``s = max |W| / (2^(bits - 1) - 1)``.

    Args:
        model: Stays.
        bits: Of a weight.
        each: What has a step of its own: ``"channel"`` (a row) or ``"tensor"``.
    """
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        if p.ndim < 2:
            continue
        size = p.abs().flatten(1).amax(1) if each == "channel" else p.abs().amax()[None]
        step = (size / (2 ** (bits - 1) - 1)).clamp_min(torch.finfo(p.dtype).tiny)
        step = step.view(-1, *[1] * (p.ndim - 1))
        p.copy_((p / step).round() * step)
    return twin


@torch.no_grad()
def accuracy(model: nn.Module, samples: Pair) -> float:
    """Share of the held-out samples, or characters, that are named right."""
    total = 0.0
    for x, y in zip(*(s.split(CHUNK) for s in samples), strict=True):
        total += float((model(x).argmax(-1) == y).double().mean()) * len(x)
    return total / len(samples[0])


def trained(job: Job, arrays: Arrays, steps: int = 0) -> Row:
    """A network at four points of its orbit, as it is and rounded."""
    task = KINDS[job.kind]
    split, random = task.split(arrays), torch.Generator().manual_seed(job.seed)
    torch.manual_seed(job.seed)
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3 if job.kind == "GPT" else 1e-3)
    ended = run_steps(task, split, model, optimizer, steps or task.steps, random)
    x = split.subset[0][:4]
    points = {"trained": model, "random": copy.deepcopy(model)}
    metatele.randomize_(points["random"], x, condition=CONDITION, seed=job.seed)
    for name in ("trained", "random"):
        points[f"{name}, balanced"] = copy.deepcopy(points[name])
        metatele.balance_(points[f"{name}, balanced"], x)
    losses, accuracies = {}, {}
    for name in POINTS:
        points[name].eval()
        for key, there in {
            name: points[name],
            **{f"{name}; {b} bits, {e}": rounded(points[name], b, e) for b in BITS for e in STEPS_FOR},
        }.items():
            losses[key] = finite(loss_on(task, there, split.held_out))
            accuracies[key] = accuracy(there.eval(), split.held_out)
    return {**asdict(job), "losses": losses, "accuracies": accuracies, "seconds": ended.steps_s}


def missing(runs: Runs[Job], seeds: int) -> list[Job]:
    """All, the longest first."""
    jobs = [Job(kind, seed) for kind in reversed(KINDS) for seed in range(seeds)]
    return [job for job in jobs if job not in runs.rows]


def result(runs: Runs[Job]) -> Row:
    """A row for each network, number of bits, step and point: rises and what balance takes off them."""
    rows = []
    for kind in KINDS:
        own = sorted((row for job, row in runs.rows.items() if job.kind == kind), key=lambda row: row["seed"])
        if len(own) < 2:
            continue
        for bits in BITS:
            for each in STEPS_FOR:
                rises: dict[str, list[float]] = {}
                lost: dict[str, list[float]] = {}
                for name in POINTS:
                    key = f"{name}; {bits} bits, {each}"
                    rises[name] = [number(r["losses"][key]) - number(r["losses"][name]) for r in own]
                    lost[name] = [r["accuracies"][name] - r["accuracies"][key] for r in own]
                for start in ("trained", "random"):
                    pair = start, f"{start}, balanced"
                    less = [b - a for a, b in zip(*(rises[name] for name in pair), strict=True)]
                    row = {"kind": kind, "bits": bits, "step": each, "start": start, "seeds": [r["seed"] for r in own]}
                    for name, key in zip(pair, ("as it is", "balanced"), strict=True):
                        row[key] = [finite(v) for v in rises[name]]
                        row[f"accuracy lost, {key}"] = sum(lost[name]) / len(own)
                    rows.append({**row, "difference": interval(less)})
    return {"rows": rows, "condition": CONDITION}


def table(doc: Row) -> str:
    """Rises before and after a balance, their difference, and accuracies lost."""
    head = ("network", "bits", "a step for each", "point", "loss rises by", "balanced", "difference")
    head = (*head, "accuracy lost", "balanced")
    lines = ["| " + " | ".join(head) + " |", "|:--|--:|:--|:--|" + "--:|" * 5]
    for r in doc["rows"]:
        cells = [KINDS[r["kind"]].title, str(r["bits"]), r["step"], r["start"]]
        cells += [f"{sum(map(number, r[key])) / len(r[key]):.4f}" for key in ("as it is", "balanced")]
        cells.append(shown(r["difference"], 4))
        cells += [f"{100 * r[f'accuracy lost, {key}']:.1f} %" for key in ("as it is", "balanced")]
        lines.append("| " + " | ".join(cells) + " |")
    for start in ("trained", "random"):
        found = [r["difference"] for r in doc["rows"] if r["start"] == start and r["difference"] is not None]
        less, more = sum(d["high"] < 0 for d in found), sum(d["low"] > 0 for d in found)
        count = f"a balance lowers the rise in {less} and raises it in {more} of {len(found)} rows"
        lines += ["", f"From {start} points, {count}, with intervals that leave out 0."]
    return "\n".join(lines)


def drawn(doc: Row) -> bytes:
    """Rises at four points, a panel for each number of bits and step."""
    figure, grid = subplots(2, 2, figsize=(WIDTH, 6.4), layout="constrained", sharex=True)
    panels = [(bits, each) for bits in BITS for each in STEPS_FOR]
    known = [kind for kind in KINDS if any(r["kind"] == kind for r in doc["rows"])]
    styles = (
        ("trained", "as it is", COLOURS[5], "o"),
        ("trained", "balanced", COLOURS[1], "o"),
        ("random", "as it is", COLOURS[0], "s"),
        ("random", "balanced", COLOURS[2], "s"),
    )
    for axes, (bits, each) in zip(grid.flat, panels, strict=True):
        for n, (start, key, colour, marker) in enumerate(styles):
            for at, kind in enumerate(known):
                wanted = (kind, bits, each, start)
                rows = [r for r in doc["rows"] if (r["kind"], r["bits"], r["step"], r["start"]) == wanted]
                values = [v for r in rows for v in r[key] if v is not None]
                label = f"{start}, {key}" if not at else None
                axes.plot([at + 0.15 * (n - 1.5)] * len(values), values, marker, color=colour, ms=4, label=label)
        axes.set_yscale("symlog", linthresh=1e-3 if bits == 8 else 1e-2)
        axes.axhline(0, color="0.7", linewidth=0.8)
        title(axes, f"{bits} bits, a step for each {each}")
        axes.set_xticks(range(len(known)), [kind.replace(", ", "\n") for kind in known], fontsize=SIZE)
    for axes in grid[:, 0]:
        axes.set_ylabel("rise of the held-out loss")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=SIZE)
    return png(figure)


STUDY = Study(
    Job,
    trained,
    missing,
    seconds=lambda job: 40.0 if job.kind == "GPT" else 20.0,
    part=lambda job: (job.kind, "quantise"),
    result=result,
    table=table,
    drawn=drawn,
)

if __name__ == "__main__":
    main(STUDY, __doc__)
