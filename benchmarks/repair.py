"""Does it matter from which point of its orbit a network is trained, and does one balance mend it?

python benchmarks/repair.py --data-root DATA --json results/benchmarks/repair.json   # an hour on one core; resumable
python benchmarks/repair.py --json results/benchmarks/repair.json --redraw           # table and figure again

A char-GPT, a CNN and a residual CNN with BatchNorm begin as they were drawn (``good``), at a random point of the same
orbit (``bad``: matrices of condition 100, scales from 0.1 to 10, by ``randomize_``), or at that point after one
``balance_`` (``balanced``). All three compute the same. Every optimizer has the better of its rates on ``good`` and on
``bad``, chosen on another seed, and warm-up and decay; a balanced start has the rate of ``good``. What is told is the
training loss at the end, on fixed samples, less that of the good start with the same seed.

Every finished run is appended to FILE.raw.jsonl beside the JSON at once; a repeated call does what is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from breadth_runs import loss_on  # noqa: E402
from breadth_tasks import TASKS, Arrays, gathered, unpacked  # noqa: E402
from common import environment, save  # noqa: E402
from peers import METHODS, schedule  # noqa: E402

import metatele  # noqa: E402
from metatele.intervals import half_width  # noqa: E402

NETWORKS = ("gpt", "cnn", "resnet")
STARTS = ("good", "bad", "balanced")
TUNED_ON = 1000  # seed
STEPS = 200
CONDITION = 100.0

Make = Callable[[nn.Module, float], torch.optim.Optimizer]


def _peer(name: str) -> Make:
    def make(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return METHODS[name].make(model, STEPS, {"lr": lr, "weight_decay": 0.0, "rest_lr": 3e-3})

    return make


OPTIMIZERS: dict[str, tuple[Make, tuple[float, ...]]] = {
    "SGD": (lambda m, lr: torch.optim.SGD(m.parameters(), lr), (0.01, 0.03, 0.1, 0.3, 1.0)),
    "momentum": (lambda m, lr: torch.optim.SGD(m.parameters(), lr, momentum=0.9), (0.003, 0.01, 0.03, 0.1, 0.3)),
    "Adam": (lambda m, lr: torch.optim.Adam(m.parameters(), lr), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "AdamW": (lambda m, lr: torch.optim.AdamW(m.parameters(), lr, weight_decay=0.1), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "Muon": (_peer("muon"), (3e-3, 1e-2, 3e-2, 1e-1)),
    "SOAP": (_peer("soap"), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
}


@dataclass(frozen=True)
class Job:
    """One run."""

    network: str
    optimizer: str
    start: str
    seed: int
    lr: float


def started(job: Job, x: torch.Tensor) -> nn.Module:
    """The network where it begins."""
    torch.manual_seed(job.seed)
    model = TASKS[job.network].model()
    if job.start != "good":
        metatele.randomize_(model, x, condition=CONDITION, seed=job.seed)
    if job.start == "balanced":
        metatele.balance_(model, x)
    return model


def trained(job: Job, arrays: Arrays) -> dict[str, Any]:
    """Training loss before and after."""
    task = TASKS[job.network]
    split, random = task.split(arrays), torch.Generator().manual_seed(job.seed)
    model = started(job, split.subset[0][:4])
    optimizer = OPTIMIZERS[job.optimizer][0](model, job.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: schedule(min(t, STEPS - 1), STEPS))
    begin, last = loss_on(task, model, split.subset), math.nan
    for _ in range(STEPS):
        x, y = split.draw(random)
        optimizer.zero_grad()
        loss = task.loss(model(x), y)
        if not math.isfinite(last := loss.item()):
            break
        loss.backward()
        optimizer.step()
        scheduler.step()
    end = loss_on(task, model, split.subset) if math.isfinite(last) else math.inf
    end = end if math.isfinite(end) else math.inf
    return {**asdict(job), "begin": begin, "end": end if math.isfinite(end) else None}


class Runs:
    """Finished runs, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines]
        self.done = {Job(**{k: row[k] for k in Job.__dataclass_fields__}): row for row in rows}

    def loss(self, job: Job, arrays: Arrays) -> float:
        """Of a run, which is made if it is missing."""
        if job not in self.done:
            self.done[job] = trained(job, arrays)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.done[job]) + "\n")
            print(self.done[job], file=sys.stderr, flush=True)
        end = self.done[job]["end"]
        return math.inf if end is None else float(end)


def measured(runs: Runs, arrays: Arrays, networks: tuple[str, ...], seeds: int) -> list[dict[str, Any]]:
    """A row for each network, optimizer and start."""
    rows = []
    for network in networks:
        for name, (_, rates) in OPTIMIZERS.items():
            best = {
                start: min(rates, key=lambda lr, s=start: runs.loss(Job(network, name, s, TUNED_ON, lr), arrays))
                for start in ("good", "bad")
            }
            best["balanced"] = best["good"]
            ends = {
                start: [runs.loss(Job(network, name, start, seed, best[start]), arrays) for seed in range(seeds)]
                for start in STARTS
            }
            for start in STARTS:
                above = [a - b for a, b in zip(ends[start], ends["good"], strict=True)]
                row = {"network": network, "optimizer": name, "start": start, "lr": best[start], "ends": ends[start]}
                row["at_edge"] = best[start] in (rates[0], rates[-1])
                if start != "good" and all(map(math.isfinite, above)):
                    mean, half = sum(above) / len(above), half_width(above)
                    row["above"] = {"mean": mean, "low": mean - half, "high": mean + half}
                rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Loss of the good start, and how far the others end above it."""
    lines = ["| network | optimizer | good | bad, above it | balanced, above it |", "|---|---|---|---|---|"]
    by = {(r["network"], r["optimizer"], r["start"]): r for r in rows}
    for network, name in dict.fromkeys((r["network"], r["optimizer"]) for r in rows):
        cells = [TASKS[network].title, name]
        good = by[network, name, "good"]["ends"]
        cells.append(f"{sum(good) / len(good):.3f}")
        for start in ("bad", "balanced"):
            above = by[network, name, start].get("above")
            text = (
                "diverges" if above is None else f"{above['mean']:+.3f} ({above['low']:+.3f} to {above['high']:+.3f})"
            )
            cells.append(text)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def drawn(rows: list[dict[str, Any]], path: Path) -> None:
    """How far bad and balanced starts end above good ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    networks = list(dict.fromkeys(r["network"] for r in rows))
    figure, axes = plt.subplots(1, len(networks), figsize=(4 * len(networks), 3), squeeze=False, layout="constrained")
    for axis, network in zip(axes[0], networks, strict=True):
        for shift, start, colour in ((-0.15, "bad", "tab:red"), (0.15, "balanced", "tab:blue")):
            mine = [r for r in rows if r["network"] == network and r["start"] == start]
            known = [(n, r["above"]) for n, r in enumerate(mine) if "above" in r]
            middle = [above["mean"] for _, above in known]
            spread = [[a["mean"] - a["low"] for _, a in known], [a["high"] - a["mean"] for _, a in known]]
            at = [n + shift for n, _ in known]
            marker = "s" if start == "bad" else "o"
            axis.errorbar(at, middle, spread, fmt=marker, color=colour, capsize=3, label=start)
            axis.set_xticks(range(len(mine)), [r["optimizer"] for r in mine], rotation=45, ha="right")
        axis.axhline(0, color="0.5", linewidth=0.8)
        axis.set_title(TASKS[network].title, fontsize=10)
    axes[0][0].set_ylabel("training loss above a good start's")
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="what breadth.py --pack wrote, in place of --data-root"
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--redraw", action="store_true", help="no runs: table and figure from what is stored")
    given = parser.parse_args()
    if given.redraw:
        rows = json.loads(given.json.read_text(encoding="utf-8"))["rows"]
    else:
        torch.set_num_threads(1)
        arrays = unpacked(given.data) if given.data else gathered(given.data_root or ROOT / "data")
        given.json.parent.mkdir(parents=True, exist_ok=True)
        rows = measured(Runs(given.json.with_suffix(".raw.jsonl")), arrays, tuple(given.networks), given.seeds)
        save(given.json, {"rows": rows, "steps": STEPS, "condition": CONDITION, "environment": environment()})
    drawn(rows, given.json.with_suffix(".png"))
    given.json.with_suffix(".md").write_text(table(rows) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
