"""Do teleports along exact symmetries help a CNN and a small GPT, beside tuned optimizers without them?

python benchmarks/modules.py --data-root DATA --json results/benchmarks/modules.json   # an hour on one core; resumable
python benchmarks/modules.py --json results/benchmarks/modules.json --redraw           # table and figure again

Three moves, each at the start or before every 50th step: ``ascend_``, which raises the gradient norm on the next batch
(the optimizer's memories are kept); ``balance_`` (they are carried along); and, as a control, a random move in the same
spaces that changes the weights by as much as an ascent would there (kept). Rates are tuned without moves, on another
seed, by the held-out loss at the end; with moves, a run has the best of that rate and the two beside it, on the same
seed. All have warm-up and decay. The table has differences to no move with the same seed.

Time is a run's steps and moves over its steps alone. A random move's has that of the ascent that measures its size.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from breadth_runs import loss_on  # noqa: E402
from breadth_tasks import TASKS, Arrays, Task  # noqa: E402
from jobs import TUNED_ON, Row, Runs, Study, beside, climbed, main  # noqa: E402
from peers import FlatMuon  # noqa: E402
from short_runs import OPTIMIZERS, finite, interval, number, run_steps, shown  # noqa: E402

import metatele  # noqa: E402
from metatele.figures import COLOURS, SIZE, WIDTH, png, subplots, title  # noqa: E402
from metatele.network.spaces import Space  # noqa: E402
from metatele.optim.along import carry_along_  # noqa: E402
from metatele.symmetry.exact import act_, element_of  # noqa: E402
from metatele.teleport.modules import ascend_  # noqa: E402

NETWORKS = ("gpt", "cnn")
CHOSEN = ("SGD", "momentum", "Adam", "Muon")
NONE = "none"
ARMS = tuple(f"{move}, {when}" for move in ("ascent", "balance", "random") for when in ("start", "every 50"))
STEPS, EVERY = 200, 50


@dataclass(frozen=True)
class Job:
    """One run."""

    network: str
    optimizer: str
    arm: str
    seed: int
    lr: float


# --- moves


def memories(optimizer: torch.optim.Optimizer) -> Any:
    """An optimizer whose memories are shaped like the model's parameters: of Muon's matrices those of kernels."""
    if not isinstance(optimizer, FlatMuon):
        return optimizer
    state = dict(optimizer.adamw.state)
    for p, flat in optimizer.pairs:
        inner = optimizer.muon.state.get(flat, {}) if optimizer.muon is not None else {}
        state[p] = {k: v.view_as(p) if v.shape == flat.shape else v for k, v in inner.items()}
    return SimpleNamespace(state=state)


def random_tangent(space: Space, random: torch.Generator) -> Tensor:
    """A direction in a group's algebra, with normal entries."""
    shapes = {"GL": (space.k, space.k), "O": (space.k, space.k), "phase": (space.k, 2)}
    t = torch.randn(shapes.get(space.group, (space.k,)), generator=random, dtype=torch.float64)
    if space.group == "O":
        t = (t - t.mT) / 2
        if space.centred:
            centre = torch.eye(space.k, dtype=t.dtype) - 1 / space.k
            t = centre @ t @ centre
    return t


def named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters' data."""
    return {name: p.data for name, p in model.named_parameters()}


def change(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """``‖θ' - θ‖ / ‖θ‖`` over all parameters."""
    moved = sum(float((after[n] - t).double().square().sum()) for n, t in before.items())
    return math.sqrt(moved / sum(float(t.double().square().sum()) for t in before.values()))


@torch.no_grad()
def random_move_(model: nn.Module, spaces: Sequence[Space], size: float, random: torch.Generator) -> float:
    """Act by ``exp(sT)`` with a random T on all spaces, s so that the weights change by ``size``, relative.

    Returns:
        The change, which is ``size`` to 1 %.
    """
    own = named(model)
    before = {n: t.clone() for n, t in own.items()}
    tangents = [random_tangent(space, random) for space in spaces]
    low, high, done = 0.0, 1.0, 0.0
    for _ in range(40 if size > 0 else 0):
        s = (low + high) / 2
        for n, t in before.items():
            own[n].copy_(t)
        for space, t in zip(spaces, tangents, strict=True):
            act_(space, element_of(space, s * t), own)
        done = change(before, own)
        if abs(done - size) <= 0.01 * size:
            break
        low, high = (s, high) if done < size else (low, s)
    return done


class Moves:
    """What an arm does before some steps, and what came of it.

    Args:
        arm: One of ``ARMS``.
        task: For its loss.
        model: What moves.
        optimizer: Whose memories go along.
        seed: Of random moves.
    """

    def __init__(self, arm: str, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        self.move, self.when = arm.split(", ")
        self.task, self.model, self.optimizer = task, model, optimizer
        self.random = torch.Generator().manual_seed(seed + 1)
        self.found: metatele.Symmetries | None = None
        self.gains: list[float] = []
        self.changes: list[float] = []
        self.drifts: list[float] = []

    def __call__(self, step: int, x: Tensor, y: Tensor) -> None:
        """Move, if it is time."""
        if step if self.when == "start" else step % EVERY:
            return
        if self.found is None:
            self.found = metatele.find_symmetries(self.model, x[:4])
        before = {n: t.clone() for n, t in named(self.model).items()}
        if self.move == "balance":
            report = metatele.balance_(self.model, x[:4], found=self.found)
            carry_along_(memories(self.optimizer), self.model, report)
            self.drifts.append(report.drift)
        elif self.move == "ascent":
            raised = ascend_(self.model, self.found.spaces, lambda: self.task.loss(self.model(x), y))
            self.gains.append(raised.objective_after / raised.objective_before)
            self.drifts.append(raised.drift)
        else:
            twin = copy.deepcopy(self.model)
            ascend_(twin, self.found.spaces, lambda: self.task.loss(twin(x), y))
            spaces = [space for space in self.found.spaces if space.group != "perm"]
            random_move_(self.model, spaces, change(before, named(twin)), self.random)
        self.changes.append(change(before, named(self.model)))


# --- runs


def trained(job: Job, arrays: Arrays, steps: int = STEPS) -> Row:
    """Losses at the end, seconds, and what the moves did."""
    task = TASKS[job.network]
    split, random = task.split(arrays), torch.Generator().manual_seed(job.seed)
    torch.manual_seed(job.seed)
    model = task.model()
    optimizer = OPTIMIZERS[job.optimizer][0](model, job.lr)
    moves = None if job.arm == NONE else Moves(job.arm, task, model, optimizer, job.seed)
    ended = run_steps(task, split, model, optimizer, steps, random, moves)
    ends = {
        name: finite(loss_on(task, model, samples)) if ended.finite else None
        for name, samples in (("train", split.subset), ("held_out", split.held_out))
    }
    told = {} if moves is None else {"gains": moves.gains, "changes": moves.changes, "drifts": moves.drifts}
    return {**asdict(job), **ends, "steps_s": ended.steps_s, "moves_s": ended.moves_s, **told}


def _held_out(row: Row) -> float:
    return number(row["held_out"])


def best_of(runs: Runs[Job], network: str, optimizer: str) -> tuple[list[Job], dict[str, float]]:
    """The runs that the choice of rates waits for, and the rate of each arm that has one."""

    def at(lr: float, arm: str = NONE) -> Job:
        return Job(network, optimizer, arm, TUNED_ON, lr)

    waits, usual = climbed(runs, at, OPTIMIZERS[optimizer][1], _held_out)
    if waits:
        return waits, {}
    missing, best = [], {NONE: usual}
    rates = [beside(usual, -1), usual, beside(usual, 1)]
    for arm in ARMS:
        waits = [at(lr, arm) for lr in rates if at(lr, arm) not in runs.rows]
        missing += waits
        if not waits:
            best[arm] = min(rates, key=lambda lr, arm=arm: _held_out(runs.rows[at(lr, arm)]))
    return missing, best


def missing(runs: Runs[Job], seeds: int) -> list[Job]:
    """What can begin now: of the choice of rates, then of the shown runs, seed by seed."""
    first, later = [], []
    for network in NETWORKS:
        for optimizer in CHOSEN:
            waits, best = best_of(runs, network, optimizer)
            first += waits
            later += [Job(network, optimizer, arm, n, lr) for n in range(seeds) for arm, lr in best.items()]
    return first + sorted((job for job in later if job not in runs.rows), key=lambda job: job.seed)


def result(runs: Runs[Job]) -> Row:
    """A row for each network, optimizer and arm, of the seeds, two or more, finished with it and without moves."""
    rows = []
    for network in NETWORKS:
        for optimizer in CHOSEN:
            best = best_of(runs, network, optimizer)[1]
            of = {
                (job.arm, job.seed): row
                for job, row in runs.rows.items()
                if (job.network, job.optimizer) == (network, optimizer)
                and job.seed != TUNED_ON
                and job.lr == best.get(job.arm)
            }
            for arm, lr in best.items():
                seeds = sorted(n for a, n in of if a == arm and (NONE, n) in of)
                if len(seeds) < 2:
                    continue
                row: Row = {"network": network, "optimizer": optimizer, "arm": arm, "lr": lr, "seeds": seeds}
                for what in ("held_out", "train"):
                    ends = [number(of[arm, n][what]) for n in seeds]
                    row[what] = [finite(end) for end in ends]
                    if arm != NONE:
                        less = [number(of[NONE, n][what]) for n in seeds]
                        row[f"{what}_above"] = interval([a - b for a, b in zip(ends, less, strict=True)])
                steps, moves = (sum(of[arm, n][k] for n in seeds) for k in ("steps_s", "moves_s"))
                row["time_ratio"] = 1 + moves / steps
                for name in ("gains", "changes", "drifts"):
                    values = [v for n in seeds for v in of[arm, n].get(name, [])]
                    row[name] = {"median": sorted(values)[len(values) // 2], "most": max(values)} if values else None
                rows.append(row)
    return {"rows": rows, "steps": STEPS, "every": EVERY}


def verdict(above: Row | None) -> str:
    """Where an interval lies; of runs that diverge there is none."""
    if above is None:
        return "none"
    return "better" if above["high"] < 0 else "worse" if above["low"] > 0 else "same"


def table(doc: Row) -> str:
    """Differences to no move, and what a move costs and does."""
    head = (
        "network",
        "optimizer",
        "move",
        "seeds",
        "rate",
        "held-out",
        "training",
        "time",
        "‖∇L‖² ×",
        "weights change",
    )
    lines = ["| " + " | ".join(head) + " |", "|:--|:--|:--|" + "--:|" * 7]
    for r in doc["rows"]:
        cells = [TASKS[r["network"]].title, r["optimizer"], r["arm"], str(len(r["seeds"])), f"{r['lr']:g}"]
        for what in ("held_out", "train"):
            ends = [number(end) for end in r[what]]
            cells.append(f"{sum(ends) / len(ends):.3f}" if r["arm"] == NONE else shown(r[f"{what}_above"]))
        cells.append(f"{r['time_ratio']:.2f}")
        cells += [f"{r[name]['median']:.2g}" if r[name] else "" for name in ("gains", "changes")]
        lines.append("| " + " | ".join(cells) + " |")
    for what, words in (("held_out", "Held-out"), ("train", "Training")):
        counts = []
        for move in ("ascent", "balance", "random"):
            found = [verdict(r[f"{what}_above"]) for r in doc["rows"] if r["arm"].startswith(move)]
            known = len(found) - found.count("none")
            counts.append(f"{move} {found.count('better')} better, {found.count('worse')} worse, of {known}")
        lines += ["", f"{words} loss, intervals that leave out 0: {'; '.join(counts)}."]
    return "\n".join(lines)


def drawn(doc: Row) -> bytes:
    """Held-out differences to no move."""
    rows = [r for r in doc["rows"] if r["arm"] != NONE]
    figure, axes = subplots(1, len(NETWORKS), figsize=(WIDTH, 3.6), squeeze=False, layout="constrained")
    colours = {"ascent": COLOURS[0], "balance": COLOURS[1], "random": COLOURS[5]}
    for axis, network in zip(axes[0], NETWORKS, strict=True):
        for n, arm in enumerate(ARMS):
            mine = [r for r in rows if r["network"] == network and r["arm"] == arm and r["held_out_above"] is not None]
            at = [CHOSEN.index(r["optimizer"]) + 0.12 * (n - 2.5) for r in mine]
            above = [r["held_out_above"] for r in mine]
            middle = [a["mean"] for a in above]
            spread = [[a["mean"] - a["low"] for a in above], [a["high"] - a["mean"] for a in above]]
            move, when = arm.split(", ")
            marker = "o" if when == "start" else "s"
            axis.errorbar(at, middle, spread, fmt=marker, color=colours[move], capsize=2, markersize=4, label=arm)
        axis.axhline(0, color="0.5", linewidth=0.8)
        axis.set_xticks(range(len(CHOSEN)), CHOSEN)
        title(axis, TASKS[network].title)
    axes[0][0].set_ylabel("held-out loss above that without moves")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=SIZE, columnspacing=1)
    return png(figure)


STUDY = Study(
    Job,
    trained,
    missing,
    seconds=lambda job: 20.0,
    part=lambda job: (job.network, f"{job.optimizer}, {job.arm}"),
    result=result,
    table=table,
    drawn=drawn,
)

if __name__ == "__main__":
    main(STUDY, __doc__)
