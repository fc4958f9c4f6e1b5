"""``metatele evaluate`` and ``eval_meta.py``: held-out curves of checkpoints beside tuned standard optimizers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from metatele.command_line import (
    OneLineParser,
    add_threads_flag,
    chosen_threads,
    device_named,
    make_folder,
    whole_number,
)
from metatele.errors import MetateleError
from metatele.extras import require_modules

# Up to so many trajectories of the paper's task a second thread saves little time on an idle machine and costs some
# on a busy one: 256 of them took 36 s with one thread and 47 s with two, 64 took 28 s and 46 s.
_ONE_THREAD_SUFFICES = 256


def parser() -> argparse.ArgumentParser:
    """Flags of the evaluation."""
    p = OneLineParser(
        prog="eval_meta.py",
        description="Evaluate run or checkpoint folders on held-out trajectories, beside GD and tuned "
        "SGD, Momentum, Adam and L-BFGS; writes curves.json, table.csv, table.md and loss.png.",
        allow_abbrev=False,
    )
    p.add_argument(
        "checkpoints",
        nargs="+",
        metavar="FOLDER",
        help="run folders, checkpoint folders, or names of published checkpoints",
    )
    p.add_argument("--trajectories", type=whole_number(1), default=64, metavar="N", help="held-out (default 64)")
    p.add_argument("--steps", type=whole_number(1), default=100, metavar="N", help="of each (default 100)")
    p.add_argument("--seed", type=whole_number(0), default=1, metavar="N", help="of the trajectories (default 1)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    add_threads_flag(p)
    p.add_argument("--out", required=True, metavar="FOLDER", help="where the results go")
    return p


def main(arguments: Sequence[str]) -> None:
    """Parse, evaluate, print the table and where the figure lies."""
    args = parser().parse_args(arguments)
    require_modules("an evaluation's figure", "matplotlib")
    out = Path(args.out)
    device = device_named(args.device)
    made = make_folder(out)

    import torch

    from metatele.training.evaluation import evaluate
    from metatele.training.report import document, write

    if threads := chosen_threads(args.threads, args.trajectories <= _ONE_THREAD_SUFFICES):
        torch.set_num_threads(threads)
    try:
        curves, task = evaluate(args.checkpoints, args.trajectories, args.steps, args.seed, device)
    except MetateleError:
        if made:
            out.rmdir()
        raise
    print(write(document(curves, task, args.seed, str(device)), out), end="")
    print(f"figure: {out / 'loss.png'}")
