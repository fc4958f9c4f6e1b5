"""Ordinary situations that nobody tuned for, beside Adam with a guessed rate.

python benchmarks/field.py --data-root DATA --baseline runs/adam.json --json results/benchmarks/field.json
python benchmarks/field.py --only "BatchNorm" "LSTM, adding" --method sgd:0.1
python benchmarks/field.py --redraw results/benchmarks/field.json   # print and draw it again
python benchmarks/field.py --list

Situations are those of ``field_situations.py``. Adam is the better, by held-out loss, of the rates 1e-3 and 1e-2;
its runs are kept in the file of ``--baseline`` and made again where the situation has changed. Costs are comparable if
no other program ran and both arms are new. Without MNIST, Fashion-MNIST or CIFAR-10 some are skipped.

A situation is *fine* if the best held-out loss is at most 1.05 of Adam's; and the training loss at the end is at most
1.1 of Adam's, or below a thousandth (of the first loss, where that is below 1), or the held-out loss at the end is no
higher than Adam's. It is *wild* if both are more than twice Adam's, or a run ended not finite. Losses of a row are
geometric means over the seeds. After a change of the data only later held-out losses count.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from common import environment, save  # noqa: E402
from field_figure import drawn  # noqa: E402
from field_situations import SITUATIONS, Run, Situation  # noqa: E402

import metatele  # noqa: E402
from metatele.command_line import OneLineParser, run_program, whole_number  # noqa: E402
from metatele.data.sets import ROOT_VARIABLE  # noqa: E402
from metatele.errors import ConfigError, DataError  # noqa: E402
from metatele.files import write_atomically  # noqa: E402

Factory = Callable[..., torch.optim.Optimizer]
Result = dict[str, Any]

RATES = (1e-3, 1e-2)  # of Adam
LOOKS = 25  # held-out losses over a run, beside those at steps 1, 2, 4, …
TRAINING_ROWS = 2000  # that the training loss is of
SETTLED = 10  # steps before those that are timed
HELD_OUT, TRAINING, SOLVED, WILD = 1.05, 1.1, 1e-3, 2.0  # bounds of *fine* and *wild*
SMALLEST = 1e-30  # loss in a logarithm
PARTS = ("train", "held_out_best", "held_out_end")


# --- one run


def run_situation(situation: Situation, seed: int, factory: Factory) -> Result:
    """Train one network, and see how it does on held-out data.

    Args:
        situation: What is trained.
        seed: Of weights, data and batches.
        factory: Makes the optimizer of a model. It gets the settings that a situation has, ``weight_decay`` (what a
            step takes off, at its own rate) and ``params`` (groups), if its signature takes any.

    Returns:
        ``train``, the loss at the end on at most 2000 training rows; ``held_out_best`` and ``held_out_end``; ``curve``,
        held-out losses by step; ``start``, the first of them; ``steps``; ``ms_per_step``, forward and backward
        included; ``finite``. Losses that are not finite are infinite. The network is evaluated in ``eval`` mode.
    """
    run = situation.make(seed)
    torch.manual_seed(seed)  # of dropout
    optimizer = factory(run.model, **taken(factory, run.settings))
    for group, factor in zip(optimizer.param_groups, run.factors, strict=False):
        group["lr"] *= factor
    scheduler = _scheduler(run, optimizer)
    looks = {2**k for k in range(12)} | {round(k * run.steps / LOOKS) for k in range(1, LOOKS + 1)}
    curve, seconds = [[0, loss_of(run, run.data.held_out)]], 0.0
    batches = run.batches()
    for step in range(run.steps):
        if step in run.at:
            run.at[step](run)
        parts = [next(batches) for _ in range(run.accumulate)]
        began = time.perf_counter()
        optimizer.zero_grad()
        for x, y in parts:
            (run.loss(run.model(x), y) / run.accumulate).backward()
        if run.clip is not None:
            nn.utils.clip_grad_norm_(run.model.parameters(), run.clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        seconds += (step >= SETTLED) * (time.perf_counter() - began)
        if step + 1 in looks:
            curve.append([step + 1, loss_of(run, run.data.held_out)])
    train = loss_of(run, (run.data.train[0][:TRAINING_ROWS], run.data.train[1][:TRAINING_ROWS]))
    counted = [loss for step, loss in curve if step > run.count_from]
    return {
        "train": train,
        "held_out_best": min(counted),
        "held_out_end": counted[-1],
        "curve": curve,
        "start": curve[0][1],
        "steps": run.steps,
        "ms_per_step": 1e3 * seconds / max(run.steps - SETTLED, 1),
        "finite": all(map(math.isfinite, (train, *counted))),
    }


def taken(factory: Factory, settings: dict[str, Any]) -> dict[str, Any]:
    """Those settings that a factory has parameters for."""
    has = inspect.signature(factory).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in has.values())
    return {name: value for name, value in settings.items() if anything or name in has}


def _scheduler(run: Run, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler | None:
    if run.schedule is None:
        return None
    if run.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.steps)
    highest = [float(group["lr"]) for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, total_steps=run.steps + 1, cycle_momentum=False)


@torch.no_grad()
def loss_of(run: Run, pair: tuple[Tensor, Tensor]) -> float:
    """The mean loss in ``eval`` mode; infinite where it is not finite."""
    run.model.eval()
    loss = float(run.loss(run.model(pair[0]), pair[1]))
    run.model.train()
    return loss if math.isfinite(loss) else math.inf


# --- methods


def adam(model: nn.Module, lr: float, params: Any = None, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """Adam, whose weight decay is decoupled where a situation has one."""
    parameters = model.parameters() if params is None else params
    if weight_decay:
        return torch.optim.AdamW(parameters, lr, weight_decay=weight_decay / lr)
    return torch.optim.Adam(parameters, lr)


def sgd(model: nn.Module, lr: float, params: Any = None, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """Momentum 0.9."""
    parameters = model.parameters() if params is None else params
    return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=weight_decay / lr)


def learned(model: nn.Module, checkpoint: str | None = None, **settings: Any) -> torch.optim.Optimizer:
    """Ours, as a user calls it."""
    return metatele.LearnedOptimizer(model, checkpoint, **settings)


def method(text: str) -> Factory:
    """The factory that ``--method`` names.

    Raises:
        ConfigError: Neither an optimizer with its rate nor a checkpoint.
    """
    name, _, rate = text.partition(":")
    if name in ("adam", "sgd"):
        try:
            return partial({"adam": adam, "sgd": sgd}[name], lr=float(rate or 1e-3))
        except ValueError:
            raise ConfigError(f"--method {name} takes a rate, as in {name}:0.01, got {text!r}") from None
    if text == "ours":
        return learned
    if not Path(text).is_dir():
        from metatele.named import NAMED

        if text not in NAMED:
            names = ", ".join(("ours", *NAMED))
            raise ConfigError(f"--method must be {names}, adam:RATE, sgd:RATE or a checkpoint's folder, got {text!r}")
    return partial(learned, checkpoint=text)


# --- many runs


def job(task: tuple[str, int, str]) -> tuple[tuple[str, int, str], Result]:
    """One run by names, with what it warned of; an error becomes ``{"error": …}``, missing data ``{"skipped": …}``."""
    torch.set_num_threads(1)
    name, seed, text = task
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("default")
            result = run_situation(SITUATIONS[name], seed, method(text))
    except DataError as error:
        return task, {"skipped": str(error)}
    except Exception as error:  # whatever an optimizer says to a user is what this table is about
        return task, {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return task, {**result, "warnings": sorted({str(w.message) for w in said if w.category is UserWarning})}


def run_all(tasks: Sequence[tuple[str, int, str]], processes: int) -> Iterable[tuple[tuple[str, int, str], Result]]:
    """Results as they come."""
    if processes == 1:
        yield from map(job, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(job, tasks)


class Baseline:
    """Adam's results, kept in a file.

    Args:
        path: Read if it is there.

    Raises:
        ConfigError: The file is not one of these.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.results = path, {}
        if path is not None and path.exists():
            self.results = read(path, "runs")

    def known(self, task: tuple[str, int, str], ours: Result) -> bool:
        """Whether there is a run of the same situation: as many steps, from the same first loss."""
        found = self.results.get("|".join(map(str, task)))
        if found is None or found["start"] is None:
            return False
        if "steps" not in ours:
            return True
        return found["steps"] == ours["steps"] and math.isclose(found["start"], ours["start"], rel_tol=1e-3)

    def add(self, task: tuple[str, int, str], result: Result) -> None:
        """Keep a run, without its curve."""
        self.results["|".join(map(str, task))] = {k: v for k, v in result.items() if k != "curve"}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps({"runs": finite(self.results)}, indent=0).encode())


def measure(names: Sequence[str], seeds: range, text: str, processes: int, baseline: Baseline) -> dict[str, Any]:
    """Rows of all situations, and which were skipped."""
    ours: dict[tuple[str, int], Result] = {}
    for done, ((name, seed, _), result) in enumerate(
        run_all([(n, s, text) for n, s in itertools.product(names, seeds)], processes), 1
    ):
        ours[name, seed] = result
        _progress(done, len(names) * len(seeds), text)
    skipped = {name: ours[name, seeds[0]]["skipped"] for name in names if "skipped" in ours[name, seeds[0]]}
    rated = [f"adam:{lr}" for lr in RATES]
    wanted = [(n, s, a) for n, s, a in itertools.product(names, seeds, rated) if n not in skipped]
    missing = [task for task in wanted if not baseline.known(task, ours[task[0], task[1]])]
    for done, (task, result) in enumerate(run_all(missing, processes), 1):
        if "error" in result:
            raise ConfigError(f"Adam failed in {task[0]!r}: {result['error']}")
        baseline.add(task, result)
        _progress(done, len(missing), "Adam")
    rows = []
    for name in (n for n in names if n not in skipped):
        arms = {lr: [baseline.results[f"{name}|{s}|adam:{lr}"] for s in seeds] for lr in RATES}
        rows.append(row(name, [ours[name, s] for s in seeds], arms))
    return {"rows": rows, "summary": summary(rows), "skipped": skipped}


def _progress(done: int, of: int, what: str) -> None:
    end = "\n" if done == of else "\r"
    print(f"{what}: {done} of {of} runs", end=end, file=sys.stderr, flush=True)


# --- judgement


def mean(values: Iterable[float | None]) -> float:
    """Geometric mean; infinite if one value is."""
    found = [math.inf if v is None else v for v in values]
    return math.exp(statistics.fmean(math.log(max(v, SMALLEST)) for v in found))


def over_seeds(runs: Sequence[Result]) -> Result:
    """Means, the cost's median, and the runs themselves."""
    return {
        **{part: mean(run[part] for run in runs) for part in PARTS},
        "ms_per_step": statistics.median(run["ms_per_step"] for run in runs),
        "finite": all(run["finite"] for run in runs),
        "per_seed": [{k: run[k] for k in (*PARTS, "ms_per_step", "finite")} for run in runs],
    }


def is_fine(ours: Result, other: Result, start: float) -> bool:
    """Whether nobody would have done better with the other."""
    ours, other = ({p: math.inf if r[p] is None else r[p] for p in PARTS} for r in (ours, other))
    if not ours["held_out_best"] <= HELD_OUT * other["held_out_best"]:
        return False
    solved = ours["train"] < SOLVED * min(1.0, start)
    learnt = ours["train"] <= TRAINING * other["train"]
    return solved or learnt or ours["held_out_end"] <= other["held_out_end"]


def row(name: str, ours: Sequence[Result], arms: dict[float, list[Result]]) -> Result:
    """One situation: its verdict and its numbers."""
    rated = {lr: over_seeds(runs) for lr, runs in arms.items()}
    lr = min(rated, key=lambda lr: rated[lr]["held_out_best"])
    result: Result = {"name": name, "fine": False, "fine_seeds": 0, "seeds": len(ours), "wild": False}
    result["adam"] = {**rated[lr], "lr": lr}
    errors = [run["error"] for run in ours if "error" in run]
    if errors:
        return {**result, "ours": None, "error": errors[0]}
    own = over_seeds(ours)
    start = mean(run["start"] for run in ours)
    result |= {"ours": own, "start": start, "fine": is_fine(own, rated[lr], start) and own["finite"]}
    pairs = zip(ours, arms[lr], strict=True)
    result["fine_seeds"] = sum(is_fine(a, b, a["start"]) and a["finite"] for a, b in pairs)
    result["warnings"] = sorted({w for run in ours for w in run.get("warnings", [])})
    for part in PARTS:
        lost = math.isinf(own[part])  # whatever became of Adam
        result[f"{part}_ratio"] = math.inf if lost else own[part] / max(rated[lr][part], SMALLEST)
    result["cost_ratio"] = own["ms_per_step"] / rated[lr]["ms_per_step"]
    result["wild"] = not own["finite"] or min(result["train_ratio"], result["held_out_best_ratio"]) > WILD
    return result


def summary(rows: Sequence[Result]) -> Result:
    """Counts over situations, and the median ratios to Adam."""
    run = [r for r in rows if r["ours"] is not None]
    return {
        "situations": len(rows),
        "fine": sum(r["fine"] for r in rows),
        "share_fine": sum(r["fine"] for r in rows) / max(len(rows), 1),
        "wild": sum(r["wild"] for r in rows),
        "not_finite": sum(not r["ours"]["finite"] for r in run),
        "refused": len(rows) - len(run),
        **{f"median_{k}": statistics.median(r[k] for r in run) if run else None for k in RATIOS},
    }


HEADS = ("situation", "fine", "held-out", "Adam", "ratio", "train", "Adam", "end")
RATIOS = ("held_out_best_ratio", "train_ratio", "held_out_end_ratio", "cost_ratio")


# --- output


def finite(value: Any) -> Any:
    """The same without infinities, which JSON has not: they become ``None``."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path, part: str) -> Any:
    """A part of a JSON file.

    Raises:
        ConfigError: The file is missing, or holds something else.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))[part]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is not a file of this benchmark with {part!r}") from None


def number(value: float | None) -> str:
    """Three digits; what was not finite is ``inf``."""
    return f"{math.inf if value is None else value:.3g}"


def table(result: dict[str, Any]) -> None:
    """Print what is stored, the worst held-out ratio first."""

    def worst(r: Result) -> float:
        ratio = r.get("held_out_best_ratio")
        return -math.inf if ratio is None else -ratio

    print("{:36} {:>8} {:>9} {:>9} {:>7} {:>9} {:>9} {:>6} cost".format(*HEADS))
    for r in sorted(result["rows"], key=worst):
        a, o = r["adam"], r["ours"]
        if o is None:
            print(f"{r['name']:36} {'refused':>8} {r['error'][:100]}")
            continue
        verdict = "fine" if r["fine"] else "WILD" if r["wild"] else "no"
        cells = [o["held_out_best"], a["held_out_best"], r["held_out_best_ratio"], o["train"], a["train"]]
        best, adam_best, ratio, train, adam_train = map(number, cells)
        end = number(r["held_out_end_ratio"])
        print(
            f"{r['name']:36} {verdict + ' ' + str(r['fine_seeds']):>8} {best:>9} {adam_best:>9} {ratio:>7} {train:>9} "
            f"{adam_train:>9} {end:>6} {r['cost_ratio']:.1f}"
        )
    for name, reason in result["skipped"].items():
        print(f"{name:36} skipped: {reason}")
    s = result["summary"]
    ratios = ", ".join(f"{k.removesuffix('_ratio').replace('_', ' ')} {number(s[f'median_{k}'])}" for k in RATIOS)
    ratios = ratios if s["refused"] < s["situations"] else "nothing"
    print(
        f"fine {s['fine']} of {s['situations']}, wild {s['wild']}, not finite {s['not_finite']}, "
        f"refused {s['refused']}; median over Adam's: {ratios}"
    )


def main(arguments: Sequence[str]) -> None:
    """Measure, or read, and print."""
    p = OneLineParser("field.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--method", default="ours", help="ours, a checkpoint's name or folder, adam:RATE, sgd:RATE")
    p.add_argument("--only", nargs="+", metavar="NAME", help="these situations alone")
    p.add_argument("--seeds", type=whole_number(1), default=3)
    p.add_argument("--first-seed", type=whole_number(0), default=0, metavar="N")
    p.add_argument("--processes", type=whole_number(1, 256), default=1, help="of one thread each")
    p.add_argument("--data-root", type=Path, help="folder with the image sets; METATELE_DATA otherwise")
    p.add_argument("--baseline", type=Path, metavar="FILE", help="Adam's runs, read and added to")
    p.add_argument("--json", type=Path, metavar="FILE")
    p.add_argument("--redraw", type=Path, metavar="FILE", help="print and draw what it holds, measure nothing")
    p.add_argument("--list", action="store_true", help="print the situations' names")
    args = p.parse_args(arguments)
    if args.list:
        print("\n".join(SITUATIONS))
        return
    if args.redraw is not None:
        rows = read(args.redraw, "rows")
        table(json.loads(args.redraw.read_text(encoding="utf-8")))
        args.redraw.with_suffix(".png").write_bytes(drawn(rows))
        return
    if args.data_root is not None:
        os.environ[ROOT_VARIABLE] = str(args.data_root)  # for the other processes too
    names = args.only or list(SITUATIONS)
    if unknown := [name for name in names if name not in SITUATIONS]:
        raise ConfigError(f"--only: there is no situation {unknown[0]!r}; --list prints them")
    method(args.method)
    began = time.perf_counter()
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    result = measure(names, seeds, args.method, args.processes, Baseline(args.baseline))
    seconds = round(time.perf_counter() - began)
    of = environment(seeds=args.seeds, first_seed=args.first_seed, method=args.method, seconds=seconds)
    result = finite({**result, "environment": of})
    save(args.json, result)
    table(result)


if __name__ == "__main__":
    run_program(main, "field.py")
