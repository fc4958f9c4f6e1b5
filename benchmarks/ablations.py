"""What each part of the general family is worth: switched off, on problems that meta-training never sees.

python benchmarks/ablations.py --json results/benchmarks/ablations.json --runs runs/ablations --workers 2
python benchmarks/ablations.py --redraw results/benchmarks/ablations.json     # the table again

Two groups. In the first, the checkpoint is what it is and a part is switched off in use: the spectral exponent that the
controller sets is 0 (whitened) or 1 (equal singular values) everywhere, or the controller does not see noise. In the
second, the meta-training is short and is done without a part: without held-out loss in the score, without batches that
never repeat, without noise in what the controller sees. All are run on the same problems of the stream "validation",
beside Adam with the better of two rates, and compared with the first of their group, problem by problem.

What is finished is in the JSON and in the run folders, and is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from common import environment, save  # noqa: E402

from metatele import checkpoint  # noqa: E402
from metatele.command_line import whole_number  # noqa: E402
from metatele.config import EvolutionTrainingConfig, GeneralRunConfig, ModulesConfig, preset, to_dict  # noqa: E402
from metatele.learned.general.controller import Controls, Sight  # noqa: E402
from metatele.learned.general.optimizer import GeneralOptimizer  # noqa: E402
from metatele.named import named_checkpoint  # noqa: E402
from metatele.optim.learned import LearnedOptimizer  # noqa: E402
from metatele.tasks.modules import Modules  # noqa: E402
from metatele.training.inner import (  # noqa: E402
    REFERENCE_RATES,
    Outcome,
    adam,
    better,
    fine,
    from_plain,
    plain,
    run,
    score,
)
from metatele.training.run import train_once  # noqa: E402
from metatele.training.workers import Lost, Workers  # noqa: E402

SEED, STREAM = 0, "validation"  # of the problems, as meta-training validates on them
IN_USE, TRAINED = "in use", "meta-trained"


@dataclass(frozen=True)
class Variant:
    """A row.

    Attributes:
        title: What is switched off.
        group: ``IN_USE`` or ``TRAINED``; the first of a group is what the others are compared with.
        spectral: The exponent in place of the controller's.
        blind: Senses that are hidden from the controller.
        training: Fields of the run that differ.
    """

    title: str
    group: str
    spectral: float | None = None
    blind: tuple[str, ...] = ()
    training: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "checkpoint": Variant("the checkpoint", IN_USE),
    "whitened": Variant("spectral exponent 0", IN_USE, spectral=0.0),
    "msign": Variant("spectral exponent 1", IN_USE, spectral=1.0),
    "unseen-noise": Variant("noise is not seen", IN_USE, blind=("noise",)),
    "trained": Variant("a short meta-training", TRAINED),
    "no-held-out": Variant(
        "no held-out loss in the score",
        TRAINED,
        training={"held_best_weight": 0.0, "harm_weight": 0.0, "held_end_weight": 0.0},
    ),
    "no-fresh": Variant("no batches that never repeat", TRAINED, training={"fresh_share": 0.0}),
    "trained-blind": Variant("noise is not seen", TRAINED, training={"blind": ("noise",)}),
}


class Fixed(nn.Module):
    """A controller whose spectral exponent is one number.

    Args:
        controller: What sets the rest.
        spectral: That number.
    """

    def __init__(self, controller: nn.Module, spectral: float) -> None:
        super().__init__()
        self.controller, self.spectral = controller, spectral

    def forward(self, sight: Sight) -> Controls:
        """What is set."""
        found: Controls = self.controller(sight)
        return found._replace(spectral=torch.full_like(found.spectral, self.spectral))


def meta_of(folder: str, variant: Variant) -> nn.Module:
    """The optimizer of a checkpoint with what is switched off in use."""
    loaded = checkpoint.load(folder)
    meta: Any = loaded.optimizer
    if variant.blind:
        blind = GeneralOptimizer(replace(loaded.method, blind=variant.blind))
        blind.load_state_dict(meta.state_dict())
        meta = blind.requires_grad_(False)
    if variant.spectral is not None:
        meta.controller = Fixed(meta.controller, variant.spectral)
    return meta


def worker(task: ModulesConfig, folder: str, variant: Variant | None) -> Callable[[int], list[float | None]]:
    """What gives the outcome of a problem's run, as :func:`metatele.training.inner.plain`; Adam's without variant."""
    modules = Modules(task)
    meta = None if variant is None else meta_of(folder, variant)

    def work(index: int) -> list[float | None]:
        problem = modules.sample(SEED, STREAM, index)
        if meta is None:
            return plain(better([run(problem, adam(rate)) for rate in REFERENCE_RATES]))
        return plain(run(problem, partial(_learned, meta)))

    return work


def _learned(meta: Any, model: nn.Module, total_steps: int | None) -> torch.optim.Optimizer:
    return LearnedOptimizer(model, meta, total_steps=total_steps)


def outcomes(task: ModulesConfig, folder: str, variant: Variant | None, count: int, workers: int) -> list[Any]:
    """Plain outcomes of all problems; ``None`` for one that was lost."""
    with Workers(workers, worker, (task, folder, variant), 120.0) as pool:
        found = pool.answers(range(count))
    for one in found:
        if isinstance(one, Lost):
            print(f"lost: {one.reason}", file=sys.stderr)
    return [None if isinstance(one, Lost) else one for one in found]


def configured(variant: Variant, args: argparse.Namespace) -> GeneralRunConfig:
    """The short meta-training of a variant; the same number of generations for each."""
    settings: dict[str, Any] = {
        "generations": args.generations,
        "minutes": 0.0,
        "meta_seeds": args.meta_seeds,
        "workers": args.workers,
        "references": str(args.runs / "adam.json"),
        "validation_problems": 4,  # the last weights are taken, whatever they score
        "validation_every": args.generations,
        **_task_of(args),
        **variant.training,
    }
    if args.pairs:
        settings["pairs"] = args.pairs
    found = preset("general", **settings)
    assert isinstance(found, GeneralRunConfig)
    return found


def _task_of(args: argparse.Namespace) -> dict[str, Any]:
    return {"budget_ms": args.budget_ms} if args.budget_ms else {}


def measured(variant: Variant, args: argparse.Namespace, task: ModulesConfig, name: str) -> dict[str, Any]:
    """A row: outcomes of the published weights, and of each evolution's own where it was trained."""
    begin_s, folder = time.perf_counter(), args.checkpoint
    seeds: list[Path] = []
    if variant.group == TRAINED:
        folder = args.runs / name
        train_once(configured(variant, args), folder)
        seeds = sorted((folder / "seeds").glob("*")) if args.meta_seeds > 1 else []
    plain_variant = replace(variant, training={})
    row = {"outcomes": outcomes(task, str(folder), plain_variant, args.problems, args.workers)}
    row["seeds"] = [outcomes(task, str(seed), plain_variant, args.problems, args.workers) for seed in seeds]
    return {**asdict(variant), **row, "seconds": time.perf_counter() - begin_s}


def scores(found: list[Any], reference: list[Any]) -> list[float]:
    """Score of each problem beside Adam; NaN where a run was lost."""
    c = EvolutionTrainingConfig()
    return [
        math.nan if ours is None or theirs is None else score(from_plain(ours), from_plain(theirs), c)
        for ours, theirs in zip(found, reference, strict=True)
    ]


def summary(row: dict[str, Any], first: dict[str, Any], reference: list[Any]) -> dict[str, Any]:
    """Numbers of a row of the table."""
    c = EvolutionTrainingConfig()
    ours, base = scores(row["outcomes"], reference), scores(first["outcomes"], reference)
    known = [value for value in ours if not math.isnan(value)]
    differences = [a - b for a, b in zip(ours, base, strict=True) if not math.isnan(a - b)]
    pairs: list[tuple[Outcome, Outcome]] = [
        (from_plain(a), from_plain(b)) for a, b in zip(row["outcomes"], reference, strict=True) if a and b
    ]
    ratios = [a.best / max(b.best, 1e-30) for a, b in pairs if a.finite and b.finite]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else math.nan
    seeds = [statistics.fmean(v for v in scores(one, reference) if not math.isnan(v)) for one in row["seeds"]]
    return {
        "score": statistics.fmean(known) if known else math.nan,
        "difference": statistics.fmean(differences) if differences else math.nan,
        "difference_error": error,
        "fine": sum(fine(a, b, c) for a, b in pairs) / max(1, len(pairs)),
        "held_out_ratio": statistics.median(ratios) if ratios else math.nan,
        "not_finite": sum(not a.finite for a, _ in pairs),
        "seed_scores": seeds,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    rows, text = result["rows"], []
    for group in (IN_USE, TRAINED):
        names = [name for name in VARIANTS if name in rows and rows[name]["group"] == group]
        if not names:
            continue
        text.append(
            f"| {group} | score | more than the first | fine | held-out loss / Adam's | not finite | each seed |"
        )
        text.append("|:--|--:|--:|--:|--:|--:|:--|")
        for name in names:
            s = summary(rows[name], rows[names[0]], result["adam"])
            more = "" if name == names[0] else f"{s['difference']:+.3f} ± {s['difference_error']:.3f}"
            each = ", ".join(f"{value:.3f}" for value in s["seed_scores"])
            text.append(
                f"| {rows[name]['title']} | {s['score']:.3f} | {more} | {100 * s['fine']:.0f} % | "
                f"{s['held_out_ratio']:.3f} | {s['not_finite']} | {each} |"
            )
        text.append("")
    text.append("Lower scores are better, 0 is Adam. ± is the standard error over problems.")
    return "\n".join(text)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    p.add_argument(
        "--checkpoint", default=str(named_checkpoint("general")), metavar="FOLDER", help="of the first group"
    )
    p.add_argument("--problems", type=whole_number(1), default=96, metavar="N", help="(default 96)")
    p.add_argument("--generations", type=whole_number(1), default=24, metavar="N", help="of a short run (default 24)")
    p.add_argument("--meta-seeds", type=whole_number(1), default=2, metavar="N", help="of a short run (default 2)")
    p.add_argument("--pairs", type=whole_number(0), default=0, metavar="N", help="0: as in the preset (default)")
    p.add_argument("--budget-ms", type=float, default=0.0, metavar="MS", help="of a problem; 0: as in the preset")
    p.add_argument("--workers", type=whole_number(0), default=0, metavar="N", help="processes; 0: this one (default)")
    p.add_argument("--runs", type=Path, default=Path("runs/ablations"), metavar="FOLDER", help="of the short runs")
    p.add_argument("--json", type=Path, metavar="FILE", help="raw outcomes; the table lies beside it")
    p.add_argument("--redraw", type=Path, metavar="FILE", help="print the table of a stored result alone")
    args = p.parse_args(arguments)
    if not args.redraw and args.json is None:
        p.error("--json FILE says where results go")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing; write after each row."""
    args = parsed(arguments)
    if args.redraw:
        print(table(json.loads(args.redraw.read_text("utf-8"))))
        return
    torch.set_num_threads(1)
    task = preset("general", **_task_of(args)).task
    digest = json.loads((checkpoint.find(args.checkpoint) / checkpoint.CONFIG_NAME).read_text("utf-8"))["sha256"]
    settings = {
        "problems": args.problems,
        "checkpoint": digest,
        "task": to_dict(task),
        **{name: getattr(args, name) for name in ("generations", "meta_seeds", "pairs")},
    }
    settings = json.loads(json.dumps(settings))
    result: dict[str, Any] = {"settings": settings, "adam": None, "rows": {}}
    if args.json.exists():
        result = json.loads(args.json.read_text("utf-8"))
        if result["settings"] != settings:
            sys.exit(f"{args.json} is of other settings or another checkpoint; choose another --json")
    result["environment"] = environment(workers=args.workers)
    if result["adam"] is None:
        result["adam"] = outcomes(task, "", None, args.problems, args.workers)
        save(args.json, result)
    for name in args.variants:
        if name not in result["rows"]:
            result["rows"][name] = measured(VARIANTS[name], args, task, name)
            save(args.json, result)
            print(f"{name}: {result['rows'][name]['seconds']:.0f} s", file=sys.stderr, flush=True)
    text = table(result)
    args.json.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
