"""Time of meta-training until the held-out loss at step 29 is as low as a target.

python benchmarks/time_to_quality.py --seeds 3 --json results/benchmarks/time_to_quality.json

For each method, a preset of this package beside the naive loop (tests/naive.py) in the same run: one trajectory at a
time in windows of 10 steps, an update of Adam after each, memory carried from window to window. The naive loop has
the learned optimizer, objective, clipping and learning rates, held constant, of each of ``--naive-presets``: ``paper``
is all of what the paper does; ``quick`` are this package's settings, so that the loops alone are compared.

The loss is the mean over 64 held-out trajectories, the same for every method and seed and those of ``eval_meta.py``.
The clock of a run starts with its construction and stands still in evaluations; neither the import of torch nor the
first use of its kernels counts, nor a run folder, which is not written. Looks are ``--check-seconds`` of training
apart, later 5 % of the time so far, and a time is that of the first look at which the loss was low enough: rounded
up by as much. The naive loop stops at ``--naive-seconds``; where it had not reached a target by then, its time and the
ratio are lower bounds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from common import environment, save  # noqa: E402
from naive import NaiveLearner, NaiveLSTM, torch_gate_order  # noqa: E402

from metatele.command_line import whole_number  # noqa: E402
from metatele.config import PRESETS, RunConfig, preset  # noqa: E402
from metatele.learned import MetaOptimizer, StackedLSTM  # noqa: E402
from metatele.tasks import Problems, Regression  # noqa: E402
from metatele.training.curves import learned_curves  # noqa: E402
from metatele.training.flat import FlatTrainer  # noqa: E402
from metatele.unroll import window_loss  # noqa: E402

STEP, TRAJECTORIES, HELD_OUT_SEED = 29, 64, 1
WINDOW = 10
PACKAGE = "package"
SPACING = 0.05  # between two looks, as a part of the time so far


class Loop(Protocol):
    """A meta-training run.

    Attributes:
        steps: Trajectory-steps done.
    """

    steps: int

    @property
    def finished(self) -> bool:
        """Whether it has come to its end."""

    def advance(self) -> None:
        """One meta-update."""

    def learned(self) -> MetaOptimizer:
        """What it has learned so far, in float32."""


class Package:
    """The package's own loop."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.trainer, self.config, self.device = FlatTrainer(config, device), config, device
        self.steps = 0

    @property
    def finished(self) -> bool:
        """After the preset's number of updates: its learning rates decay towards it."""
        return self.trainer.finished

    def advance(self) -> None:
        """A window of a batch."""
        c = self.config.training
        self.steps += c.batch * c.windows[self.trainer.update % len(c.windows)]
        self.trainer.step()

    def learned(self) -> MetaOptimizer:
        """As a loaded checkpoint computes."""
        copy = MetaOptimizer(self.config.method, self.config.task).to(self.device)
        copy.load_state_dict(self.trainer.evaluated.state_dict())
        return copy


class Remembering(NaiveLSTM):
    """One that goes on where its last step ended, without history before this window."""

    def __init__(self, source: StackedLSTM) -> None:
        super().__init__(source)
        self.forget()

    def forget(self) -> None:
        """Begin a trajectory."""
        self.memory = super().initial_state()

    def initial_state(self) -> list[tuple[Tensor, Tensor]]:
        """Of a window."""
        return self.memory

    def forward(self, x: Tensor, state: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """A step, remembered."""
        output, new = super().forward(x, state)
        self.memory = [(h.detach(), c.detach()) for h, c in new]
        return output, new

    def write(self, target: StackedLSTM) -> None:
        """The inverse of the construction."""
        for cell, weight, bias in zip(self.cells, target.weights, target.biases, strict=True):
            assert isinstance(cell, nn.LSTMCell)
            weight.copy_(torch.cat([torch_gate_order(cell.weight_ih), torch_gate_order(cell.weight_hh)], 1))
            bias.copy_(torch_gate_order(cell.bias_ih + cell.bias_hh))  # exchanging two quarters is its own inverse
        target.head_weight.copy_(self.head.weight)
        target.head_bias.copy_(self.head.bias)


class Windowed(NaiveLearner):
    """The naive learner, whose trajectories go on from one window to the next."""

    local: Remembering
    teleport: Remembering | None

    def __init__(self, source: MetaOptimizer, device: torch.device) -> None:
        super().__init__(source)
        self.local = Remembering(source.local.lstm).to(device)
        self.teleport = None if source.teleport is None else Remembering(source.teleport.lstm).to(device)
        self.forget()

    def forget(self) -> None:
        """Begin a trajectory."""
        self.age, self.smallest = 0, [math.inf] * 2
        self.local.forget()
        if self.teleport is not None:
            self.teleport.forget()

    def cap(self, gradient: Tensor, smallest: list[float]) -> Tensor:
        """With the shortest gradients of the trajectory in place of the window's."""
        return super().cap(gradient, self.smallest)

    def group(self, output: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """With the trajectory's age in place of the window's."""
        return super().group(output, self.age + t)

    def window(self, w: Tensor, X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
        """Weights after a window, without history, and its losses."""
        w, losses = self.run(w, X, Y, WINDOW)
        self.age += WINDOW
        return w.detach(), torch.stack(losses)


class Naive:
    """The naive loop: a trajectory to its horizon, then the next one."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.target = MetaOptimizer(config.method, config.task, config.seed)
        self.learner = Windowed(self.target, device)
        c = config.training
        groups = [{"params": list(self.learner.local.parameters()), "lr": c.local_lr}]
        if self.learner.teleport is not None:
            groups.append({"params": list(self.learner.teleport.parameters()), "lr": c.teleport_lr})
        self.adam = torch.optim.Adam(groups)
        self.task = Regression(config.task)
        self.target.to(device)
        self.steps = self.started = 0
        self.begin()

    @property
    def finished(self) -> bool:
        """Never: it is stopped."""
        return False

    def begin(self) -> None:
        """The next trajectory."""
        problem = self.task.sample(self.config.seed, "train", [self.started]).to(self.device)
        self.X, self.Y, self.w = problem.inputs[0], problem.targets[0], problem.initial[0]
        self.started += 1
        self.learner.forget()

    def advance(self) -> None:
        """A window of one trajectory; one that is lost makes no update, and the next one begins."""
        c = self.config.training
        self.w, losses = self.learner.window(self.w, self.X, self.Y)
        self.steps += WINDOW
        self.adam.zero_grad()
        lost = not float(losses.detach().max()) < c.lost_loss
        if not lost:
            window_loss(losses[:, None], c.objective).backward()
            norm = torch.nn.utils.clip_grad_norm_(self.learner.parameters(), c.clip or math.inf)
            if bool(torch.isfinite(norm)):
                self.adam.step()
        if lost or self.learner.age >= c.horizon:
            self.begin()

    @torch.no_grad()
    def learned(self) -> MetaOptimizer:
        """Copied back into what was copied to begin with."""
        self.learner.local.write(self.target.local.lstm)
        if self.learner.teleport is not None and self.target.teleport is not None:
            self.learner.teleport.write(self.target.teleport.lstm)
        return self.target


class Run(NamedTuple):
    """What became of a meta-training.

    Attributes:
        checks: Training time in seconds and held-out loss at each look.
        reached: For each target the time of the first look at or below it; infinite if there was none.
        seconds: Training time in all.
        steps: Trajectory-steps in all.
    """

    checks: list[tuple[float, float]]
    reached: dict[float, float]
    seconds: float
    steps: int

    @property
    def best(self) -> float:
        """Least held-out loss seen."""
        return min((loss for _, loss in self.checks), default=math.inf)

    def to_json(self) -> dict[str, Any]:
        """What is not finite becomes ``null``."""
        return {
            "seconds_to": {f"{target:g}": _plain(value) for target, value in self.reached.items()},
            "best_loss": _plain(self.best),
            "training_seconds": self.seconds,
            "ms_per_trajectory_step": 1e3 * self.seconds / max(self.steps, 1),
            "checks": [(seconds, _plain(loss)) for seconds, loss in self.checks],
        }


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def now_s(device: torch.device) -> float:
    """The clock, after all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def held_out_loss(optimizer: MetaOptimizer, problems: Problems) -> float:
    """Mean loss at the step of the targets."""
    losses, _ = learned_curves(optimizer, problems, STEP)
    return float(losses[STEP].double().mean().nan_to_num(nan=math.inf))


def timed(make: Callable[[], Loop], problems: Problems, targets: Sequence[float], limit_s: float, gap_s: float) -> Run:
    """Train until all targets are reached, the run has ended or its time is over."""
    device = problems.inputs.device
    begin_s = now_s(device)
    loop = make()
    spent_s = now_s(device) - begin_s
    checks: list[tuple[float, float]] = []
    reached = dict.fromkeys(targets, math.inf)
    while math.inf in reached.values() and spent_s < limit_s and not loop.finished:
        due_s = min(limit_s, spent_s + max(gap_s, SPACING * spent_s))
        begin_s = now_s(device) - spent_s
        while spent_s < due_s and not loop.finished:
            loop.advance()
            spent_s = now_s(device) - begin_s
        loss = held_out_loss(loop.learned(), problems)
        checks.append((spent_s, loss))
        reached = {t: min(s, spent_s) if loss <= t else s for t, s in reached.items()}
    return Run(checks, reached, spent_s, loop.steps)


def bounded(run: Run, target: float) -> float:
    """Time to a target, or how long it was not reached."""
    return min(run.reached[target], run.seconds)


def own(runs: Sequence[Run], target: float) -> dict[str, Any]:
    """The package's columns of a row; ``null`` where a run did not reach the target."""
    times = [run.reached[target] for run in runs]
    return {
        "target": target,
        "seconds": _plain(statistics.median(times)),
        "seconds_range": [_plain(min(times)), _plain(max(times))],
        "best_loss": _plain(statistics.median(run.best for run in runs)),
    }


def beside(name: str, runs: Sequence[Run], target: float, seconds: float | None) -> dict[str, Any]:
    """The naive loop's columns; times and ratio are lower bounds if a run did not reach the target."""
    naive = statistics.median(bounded(run, target) for run in runs)
    return {
        "naive_preset": name,
        "naive_seconds": naive,
        "naive_reached": all(math.isfinite(run.reached[target]) for run in runs),
        "naive_best_loss": _plain(min(run.best for run in runs)),
        "naive_over_ours": None if seconds is None else naive / seconds,
    }


def compared(method: str, runs: dict[str, list[Run]], targets: Sequence[float]) -> list[dict[str, Any]]:
    """Rows of the table: for each target, one for each preset of the naive loop."""
    rows = []
    for target in targets:
        ours = {"method": method, **own(runs[PACKAGE], target)}
        others = [(name, done) for name, done in runs.items() if name != PACKAGE and done]
        rows += [{**ours, **beside(name, done, target, ours["seconds"])} for name, done in others] or [ours]
    return rows


def shown(row: dict[str, Any]) -> str:
    """A line of the table."""
    low, high = (f"{s:.2f}" if s is not None else "never" for s in row["seconds_range"])
    ours = f"{row['seconds']:.2f}" if row["seconds"] is not None else "never"
    line = f"{row['method']:<12} {row['target']:>7g} {ours:>12} {f'{low} to {high}':>16}"
    if "naive_preset" not in row:
        return line
    naive, ratio, best = row["naive_seconds"], row["naive_over_ours"], row["naive_best_loss"]
    theirs, bound = f"{naive:.2f}", ""
    if not row["naive_reached"]:
        theirs, bound = f"not reached in {naive:.0f} s (best {math.inf if best is None else best:.4g})", "> "
    return f"{line}  {row['naive_preset']:<6} {theirs:>36} {'' if ratio is None else f'{bound}{ratio:.1f}':>8}"


def warm_up(method: str, args: argparse.Namespace) -> None:
    """First uses of kernels and threads."""
    config = preset(args.preset, method)
    problems = Regression(config.task).sample(HELD_OUT_SEED, "validation", range(TRAJECTORIES))
    loops: list[tuple[Loop, torch.device]] = [(Package(config, args.device), args.device)]
    loops += [(Naive(preset(name, method), args.naive_device), args.naive_device) for name in args.naive_presets]
    for loop, device in loops:
        loop.advance()
        held_out_loss(loop.learned(), problems.to(device))


def measured(method: str, args: argparse.Namespace) -> dict[str, list[Run]]:
    """Runs of the package and, by its preset, of the naive loop, in turns."""
    runs: dict[str, list[Run]] = {name: [] for name in (PACKAGE, *args.naive_presets)}
    for seed in range(max(args.seeds, args.naive_seeds)):
        config = preset(args.preset, method, seed=seed)
        problems = Regression(config.task).sample(HELD_OUT_SEED, "evaluation", range(TRAJECTORIES))
        for name, done in runs.items():
            ours = name == PACKAGE
            if seed >= (args.seeds if ours else args.naive_seeds):
                continue
            device, limit_s = (args.device, args.seconds) if ours else (args.naive_device, args.naive_seconds)
            plain = config if ours else preset(name, method, seed=seed)
            make = partial(Package if ours else Naive, plain, device)
            done.append(timed(make, problems.to(device), args.targets, limit_s, args.check_seconds))
            report(f"{method}, {name if ours else f'naive {name}'}, seed {seed}", done[-1])
    return runs


def report(what: str, run: Run) -> None:
    """A line for whoever waits."""
    pace = 1e3 * run.seconds / max(run.steps, 1)
    print(
        f"{what}: best loss {run.best:.4g} in {run.seconds:.1f} s, {pace:.3f} ms per trajectory-step",
        file=sys.stderr,
        flush=True,
    )


def parsed() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=whole_number(1), default=3, metavar="N", help="of the package's runs (default 3)")
    p.add_argument("--targets", type=float, nargs="+", default=[18.8, 17.5], metavar="X", help="held-out mean losses")
    p.add_argument("--methods", nargs="+", default=["update-tele"], choices=("update", "update-tele"))
    p.add_argument("--preset", default="quick", choices=PRESETS, help="of the package's runs (default quick)")
    p.add_argument("--seconds", type=float, default=120, metavar="S", help="longest run of it (default 120)")
    p.add_argument("--naive-presets", nargs="+", default=["paper", "quick"], choices=PRESETS, help="of the naive loop")
    p.add_argument("--naive-seeds", type=whole_number(0), default=1, metavar="N", help="its runs with each (default 1)")
    p.add_argument("--naive-seconds", type=float, default=600, metavar="S", help="longest of them (default 600)")
    p.add_argument("--check-seconds", type=float, default=0.5, metavar="S", help="between looks (default 0.5)")
    p.add_argument("--threads", type=whole_number(1), metavar="N", help="CPU threads (default: torch's)")
    p.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu, cuda or cuda:N")
    p.add_argument("--naive-device", type=torch.device, default=torch.device("cpu"), help="(default cpu)")
    p.add_argument("--json", type=Path, metavar="FILE")
    return p.parse_args()


def main() -> None:
    """Print the table; write JSON."""
    args = parsed()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    for method in args.methods:
        warm_up(method, args)
        done = measured(method, args)
        rows += compared(method, done, args.targets)
        runs += [
            {"method": method, "loop": PACKAGE if name == PACKAGE else f"naive {name}", "seed": seed, **run.to_json()}
            for name, found in done.items()
            for seed, run in enumerate(found)
        ]
    print(
        f"{'method':<12} {'target':>7} {'seconds':>12} {'range':>16}  {'naive':<6} {'naive seconds':>36} {'ratio':>8}"
    )
    for row in rows:
        print(shown(row))
    names = ("preset", "seconds", "naive_seconds", "check_seconds")
    settings = {name: getattr(args, name) for name in names}
    where = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "cpu"
    devices = {"device": str(args.device), "device_name": where, "naive_device": str(args.naive_device)}
    save(args.json, {"step": STEP, **settings, "rows": rows, "runs": runs, "environment": environment(**devices)})


if __name__ == "__main__":
    main()
