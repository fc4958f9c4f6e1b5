"""Does it matter from which point of its orbit a network is trained, and does one balance mend it?

python benchmarks/repair.py --data-root DATA --json results/benchmarks/repair.json   # an hour on one core; resumable
python benchmarks/repair.py --json results/benchmarks/repair.json --redraw           # table and figure again

A char-GPT, a CNN and a residual CNN with BatchNorm begin as they were drawn (``good``), at a random point of the same
orbit (``bad``: matrices of condition 100, scales from 0.1 to 10, by ``randomize_``), or at that point after one
``balance_`` (``balanced``). All three compute the same. Every optimizer has its best rate for each of them, chosen on
another seed by the training loss at the end, and warm-up and decay. What is told is the training loss at the end, on
fixed samples, less that of the good start with the same seed.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from breadth_runs import loss_on  # noqa: E402
from breadth_tasks import TASKS, Arrays  # noqa: E402
from jobs import TUNED_ON, Row, Runs, Study, climbed, main  # noqa: E402
from short_runs import OPTIMIZERS, finite, interval, number, run_steps, shown  # noqa: E402

import metatele  # noqa: E402
from metatele.figures import COLOURS, SIZE, WIDTH, png, subplots, title  # noqa: E402

NETWORKS = ("gpt", "resnet", "cnn")
STARTS = ("good", "bad", "balanced")
STEPS = 200
CONDITION = 100.0
NEAR = 0.02  # of training loss: a balanced start above a good one by at most this, on average, is as good


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


def trained(job: Job, arrays: Arrays, steps: int = STEPS) -> Row:
    """Training loss before and after."""
    task = TASKS[job.network]
    split, random = task.split(arrays), torch.Generator().manual_seed(job.seed)
    model = started(job, split.subset[0][:4])
    optimizer = OPTIMIZERS[job.optimizer][0](model, job.lr)
    begin = loss_on(task, model, split.subset)
    ended = run_steps(task, split, model, optimizer, steps, random)
    end = loss_on(task, model, split.subset) if ended.finite else float("inf")
    return {**asdict(job), "begin": begin, "end": finite(end), "seconds": ended.steps_s}


def _end(row: Row) -> float:
    return number(row["end"])


def best_of(runs: Runs[Job], network: str, optimizer: str) -> tuple[list[Job], dict[str, float]]:
    """The runs that the choice of rates waits for, and the rates of each start."""
    missing, best = [], {}
    for start in STARTS:

        def at(lr: float, start: str = start) -> Job:
            return Job(network, optimizer, start, TUNED_ON, lr)

        waits, best[start] = climbed(runs, at, OPTIMIZERS[optimizer][1], _end)
        missing += waits
    return missing, best


def missing(runs: Runs[Job], seeds: int) -> list[Job]:
    """What can begin now: of the choice of rates, then of the shown runs, seed by seed."""
    first, later = [], []
    for network in NETWORKS:
        for optimizer in OPTIMIZERS:
            waits, best = best_of(runs, network, optimizer)
            first += waits
            if not waits:
                wanted = (Job(network, optimizer, s, n, best[s]) for n in range(seeds) for s in STARTS)
                later += [job for job in wanted if job not in runs.rows]
    return first + sorted(later, key=lambda job: job.seed)


def result(runs: Runs[Job]) -> Row:
    """A row for each network, optimizer and start, of the two or more seeds that are finished at all three."""
    rows = []
    for network in NETWORKS:
        for optimizer in OPTIMIZERS:
            waits, best = best_of(runs, network, optimizer)
            if waits:
                continue
            own = {job: r for job, r in runs.rows.items() if (job.network, job.optimizer) == (network, optimizer)}
            of = {(job.start, job.seed): _end(r) for job, r in own.items() if _shown(job, best)}
            seeds = [n for n in sorted({seed for _, seed in of}) if all((s, n) in of for s in STARTS)]
            if len(seeds) < 2:
                continue
            tried = {s: [job.lr for job in own if (job.start, job.seed) == (s, TUNED_ON)] for s in STARTS}
            for start in STARTS:
                ends = [of[start, n] for n in seeds]
                above = interval([end - of["good", n] for end, n in zip(ends, seeds, strict=True)])
                row = {"network": network, "optimizer": optimizer, "start": start, "lr": best[start], "seeds": seeds}
                rates = tried[start]
                row |= {"ends": [finite(end) for end in ends], "at_edge": best[start] in (min(rates), max(rates))}
                rows.append(row if start == "good" else {**row, "above": above})
    return {"rows": rows, "steps": STEPS, "condition": CONDITION, "near": NEAR}


def _shown(job: Job, best: dict[str, float]) -> bool:
    return job.seed != TUNED_ON and job.lr == best[job.start]


def mended(row: Row) -> bool:
    """Whether a start is as good as a good one: by at most ``NEAR`` above it, or by chance."""
    above = row.get("above")
    return above is not None and above["mean"] <= NEAR and above["low"] <= 0


def table(doc: Row) -> str:
    """Loss of the good start, and how far the others end above it."""
    lines = ["| network | optimizer | seeds | good | bad, above it | balanced, above it |", "|:--|:--|--:|--:|--:|--:|"]
    by = {(r["network"], r["optimizer"], r["start"]): r for r in doc["rows"]}
    pairs = list(dict.fromkeys((r["network"], r["optimizer"]) for r in doc["rows"]))
    for network, name in pairs:
        ends = [number(end) for end in by[network, name, "good"]["ends"]]
        cells = [TASKS[network].title, name, str(len(ends)), f"{sum(ends) / len(ends):.3f}"]
        cells += [shown(by[network, name, start]["above"]) for start in ("bad", "balanced")]
        lines.append("| " + " | ".join(cells) + " |")
    counts = [sum(mended(by[network, name, start]) for network, name in pairs) for start in ("bad", "balanced")]
    lines += [
        "",
        f"At most {NEAR} above the good start, with an interval that reaches 0 or below: {counts[0]} of {len(pairs)} "
        f"bad starts, {counts[1]} of {len(pairs)} balanced ones.",
    ]
    edges = [f"{TASKS[r['network']].title}, {r['optimizer']}, {r['start']}" for r in doc["rows"] if r["at_edge"]]
    if edges:
        lines += ["", f"The best rate is the lowest or highest of those tried: {'; '.join(edges)}."]
    return "\n".join(lines)


def drawn(doc: Row) -> bytes:
    """How far bad and balanced starts end above good ones."""
    rows = doc["rows"]
    networks = list(dict.fromkeys(r["network"] for r in rows)) or list(NETWORKS)
    figure, axes = subplots(1, len(networks), figsize=(WIDTH, 3.2), squeeze=False, layout="constrained")
    for axis, network in zip(axes[0], networks, strict=True):
        for shift, start, colour in ((-0.15, "bad", COLOURS[0]), (0.15, "balanced", COLOURS[1])):
            mine = [r for r in rows if r["network"] == network and r["start"] == start]
            known = [(n, r["above"]) for n, r in enumerate(mine) if r["above"] is not None]
            middle = [above["mean"] for _, above in known]
            spread = [[a["mean"] - a["low"] for _, a in known], [a["high"] - a["mean"] for _, a in known]]
            at = [n + shift for n, _ in known]
            marker = "s" if start == "bad" else "o"
            axis.errorbar(at, middle, spread, fmt=marker, color=colour, capsize=3, label=start)
            axis.set_xticks(range(len(mine)), [r["optimizer"] for r in mine], rotation=45, ha="right")
        axis.axhline(0, color="0.5", linewidth=0.8)
        title(axis, TASKS[network].title)
    axes[0][0].set_ylabel("training loss above\na good start's")
    axes[0][0].legend(frameon=False, fontsize=SIZE)
    return png(figure)


STUDY = Study(
    Job,
    trained,
    missing,
    seconds=lambda job: 20.0,
    part=lambda job: (job.network, job.optimizer),
    result=result,
    table=table,
    drawn=drawn,
)

if __name__ == "__main__":
    main(STUDY, __doc__)
