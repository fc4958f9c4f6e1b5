"""Twelve kinds of small full-batch least squares, through the optimizers that users get, beside Adam and others.

python benchmarks/full_batch.py --json results/benchmarks/full_batch.json
python benchmarks/full_batch.py --redraw results/benchmarks/full_batch.json     # the table again

The kinds are those of docs/transfer.md, "In the laboratory": the first problems of the same stream. Each problem is an
``nn.Sequential`` that is trained as a user would, by ``LearnedOptimizer(model)`` (the default), by
``LearnedOptimizer(model, "transfer")``, by Adam with the better of two guessed rates by the loss at the last step, and
by Levenberg-Marquardt in float64, where the Jacobian is small enough. Losses are means over problems.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from common import environment, save  # noqa: E402
from levenberg import LevenbergMarquardt  # noqa: E402

import metatele  # noqa: E402
from metatele.command_line import whole_number  # noqa: E402
from metatele.perceptron.activations import LeakyReLU, ReLU, SiLU, Tanh  # noqa: E402
from metatele.perceptron.losses import SquaredError  # noqa: E402
from metatele.tasks import Fitting  # noqa: E402
from metatele.tasks.held_out import REGRESSIONS  # noqa: E402

DEFAULT, TRANSFER, ADAM, MARQUARDT = "default", "transfer", "Adam", "Levenberg-Marquardt"
METHODS = (DEFAULT, TRANSFER, ADAM, MARQUARDT)
RATES = (1e-3, 1e-2)
STEPS = (10, 30, 100, 300)  # that are shown
# From which share of the other's loss on one is called worse.
FACTOR = 10.0
_MODULES: dict[type, Callable[[Any], nn.Module]] = {
    LeakyReLU: lambda a: nn.LeakyReLU(a.slope),
    ReLU: lambda _: nn.ReLU(),
    SiLU: lambda _: nn.SiLU(),
    Tanh: lambda _: nn.Tanh(),
}


def network(problem: Fitting) -> nn.Sequential:
    """The one network of a problem, as a user has it."""
    weights, layers = problem.mlp.unflatten(problem.initial[0]), list[nn.Module]()
    for number, matrix in enumerate(weights.matrices):
        bias = weights.biases[number]
        layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None)
        with torch.no_grad():
            layer.weight.copy_(matrix)
            if bias is not None:
                layer.bias.copy_(bias)
        layers.append(layer)
        if number < len(problem.mlp.activations):
            activation = problem.mlp.activations[number]
            layers.append(_MODULES[type(activation)](activation))
    return nn.Sequential(*layers)


def loss_of(problem: Fitting, outputs: Tensor, targets: Tensor) -> Tensor:
    """The problem's loss of outputs ``[n, o]``."""
    if isinstance(problem.loss, SquaredError):
        return 0.5 * (outputs - targets).square().sum()
    return F.mse_loss(outputs, targets)


def learned(problem: Fitting, steps: int, make: Callable[[nn.Module], torch.optim.Optimizer]) -> Iterator[float]:
    """Losses before each step and after the last one."""
    model, x, y = network(problem), problem.inputs[0].T.contiguous(), problem.targets[0].T.contiguous()
    optimizer = make(model)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(problem, model(x), y)
        loss.backward()
        optimizer.step()
        yield loss.item()
    yield float(loss_of(problem, model(x), y).detach())


def marquardt(problem: Fitting, steps: int) -> Iterator[float]:
    """The same of Levenberg-Marquardt, in float64."""
    model = network(problem).double()
    x, y = (t[0].T.contiguous().double() for t in (problem.inputs, problem.targets))
    solver = LevenbergMarquardt(model, x, y)
    share = 0.5 if isinstance(problem.loss, SquaredError) else 1 / y.numel()
    yield share * float(solver.residuals.square().sum())
    for _ in range(steps):
        yield share * solver.step()


def curve(method: str, problem: Fitting, steps: int, rate: float = 0.0) -> tuple[list[float], float]:
    """Losses by step and ms a step."""
    makers: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
        DEFAULT: metatele.LearnedOptimizer,
        TRANSFER: lambda model: metatele.LearnedOptimizer(model, "transfer"),
        ADAM: lambda model: torch.optim.Adam(model.parameters(), rate),
    }
    begin_s = time.perf_counter()
    losses = list(marquardt(problem, steps) if method == MARQUARDT else learned(problem, steps, makers[method]))
    return losses, 1e3 * (time.perf_counter() - begin_s) / steps


def measured(kind: str, method: str, problems: Fitting, steps: int) -> dict[str, Any] | None:
    """A row: losses of every problem at the shown steps; ``None`` where the method does not apply."""
    shown = [0, *(at for at in STEPS if at <= steps)]
    found, spent, rates = [], [], []
    for number in range(len(problems)):
        problem = problems.part(slice(number, number + 1))
        try:
            runs = [(curve(method, problem, steps, rate), rate) for rate in (RATES if method == ADAM else (0.0,))]
        except ValueError:  # too large
            return None
        (losses, ms), rate = min(runs, key=lambda run: run[0][0][-1] if math.isfinite(run[0][0][-1]) else math.inf)
        found.append([losses[at] if math.isfinite(losses[at]) else None for at in shown])
        spent.append(ms)
        rates.append(rate)
    settings = {"rates": rates} if method == ADAM else {}
    ms_per_step = statistics.median(spent)
    return {"kind": kind, "method": method, "at": shown, "losses": found, "ms_per_step": ms_per_step, **settings}


def mean(row: dict[str, Any], step: int) -> float:
    """Mean loss of a row's problems at a step; infinite if one was lost."""
    values = [losses[row["at"].index(step)] for losses in row["losses"]]
    return math.inf if None in values else statistics.fmean(values)


def table(result: dict[str, Any], step: int) -> str:
    """Markdown: mean losses at a step."""
    rows = {(row["kind"], row["method"]): row for row in result["rows"]}
    lines = [f"| step {step} | {' | '.join(METHODS)} | default / transfer | Adam / default |"]
    lines.append("|:--|" + "--:|" * (len(METHODS) + 2))
    for kind in dict.fromkeys(row["kind"] for row in result["rows"]):
        means = {m: mean(rows[kind, m], step) if (kind, m) in rows else math.nan for m in METHODS}
        known = {m: f"{value:.2g}" if not math.isnan(value) else "" for m, value in means.items()}
        about, floor = REGRESSIONS[kind], 1e-30
        title = f"{about.title}, {'-'.join(map(str, about.mlp.widths))}, {about.samples} samples"
        ratios = [
            f"{max(means[a], floor) / max(means[b], floor):.2g}" if known[a] and known[b] else ""
            for a, b in ((DEFAULT, TRANSFER), (ADAM, DEFAULT))
        ]
        lines.append(f"| {title} | {' | '.join(known[m] for m in METHODS)} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def worse(result: dict[str, Any], step: int) -> list[str]:
    """Kinds on which the default's mean loss is more than ``FACTOR`` times that of ``transfer``."""
    rows = {(row["kind"], row["method"]): row for row in result["rows"]}
    kinds = [kind for kind, method in rows if method == DEFAULT and (kind, TRANSFER) in rows]
    return [k for k in kinds if mean(rows[k, DEFAULT], step) > FACTOR * mean(rows[k, TRANSFER], step)]


def shown_tables(result: dict[str, Any]) -> str:
    """All tables, and where the default loses."""
    steps = [at for at in STEPS if at <= result["steps"]]
    text = "\n\n".join(table(result, at) for at in steps)
    for at in steps:
        text += f"\n\nStep {at}, default more than {FACTOR:g} times transfer: {', '.join(worse(result, at)) or 'none'}."
    return text


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kinds", nargs="+", choices=list(REGRESSIONS), default=list(REGRESSIONS))
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    p.add_argument("--problems", type=whole_number(1), default=3, metavar="N", help="of each kind (default 3)")
    p.add_argument("--steps", type=whole_number(1), default=100, metavar="N", help="(default 100)")
    p.add_argument("--json", type=Path, metavar="FILE", help="raw losses; the table lies beside it")
    p.add_argument("--redraw", type=Path, metavar="FILE", help="print the tables of a stored result alone")
    return p.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    args = parsed(arguments)
    if args.redraw:
        print(shown_tables(json.loads(args.redraw.read_text("utf-8"))))
        return
    torch.set_num_threads(1)
    result: dict[str, Any] = {"steps": args.steps, "problems": args.problems, "rows": []}
    for kind in args.kinds:
        problems = REGRESSIONS[kind].sample(1, "evaluation", 64).part(slice(args.problems))
        for method in args.methods:
            row = measured(kind, method, problems, args.steps)
            if row is None:
                print(f"{kind}: {method} left out, too large", file=sys.stderr, flush=True)
                continue
            result["rows"].append(row)
            print(f"{kind}: {method} {mean(row, row['at'][-1]):.3g}", file=sys.stderr, flush=True)
    result["environment"] = environment()
    save(args.json, result)
    text = shown_tables(result)
    if args.json:
        args.json.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
