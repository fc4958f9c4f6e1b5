"""Cost of one trajectory-step of meta-training (unroll, backward, clipping, Adam).

python benchmarks/meta_training.py --json results/benchmarks/meta_training.json

In one run, so that ratios hold on a noisy machine: the naive one-trajectory loop (tests/naive.py),
this package at several batches in float32 and bf16, and the matrix products alone: what the same
LSTM products, forward and backward, take at that batch when nothing else is done.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from common import environment, save  # noqa: E402
from naive import NaiveLearner  # noqa: E402

from metatele.config import preset  # noqa: E402
from metatele.metaopt import MetaOptimizer  # noqa: E402
from metatele.tasks import Regression  # noqa: E402
from metatele.training.trainer import MetaTrainer  # noqa: E402

UNROLL = 10


def seconds(*runs: Callable[[], object], repeats: int) -> list[float]:
    """Median wall-clock of each of several runs, taken in turns after a warm-up.

    Turns, so that a slow minute of the machine hits all of them alike.
    """
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 2):
        for run, kept in zip(runs, times, strict=True):
            begin = time.perf_counter()
            run()
            if repeat >= 2:
                kept.append(time.perf_counter() - begin)
    return [statistics.median(kept) for kept in times]


def naive_ms(repeats: int) -> float:
    """One window of the naive loop: unroll, backward, Adam; with the cheapest group element, I + T."""
    config = preset("paper", parametrisation="first-order")
    learner = NaiveLearner(MetaOptimizer(config.method, config.task))
    adam = torch.optim.Adam(learner.parameters(), lr=1e-4)
    problem = Regression(config.task).sample(0, "train", [0])

    def window() -> None:
        _, losses = learner.run(problem.initial[0], problem.inputs[0], problem.targets[0], UNROLL)
        adam.zero_grad()
        torch.stack(losses).sum().backward()
        adam.step()

    return 1e3 * seconds(window, repeats=repeats)[0] / UNROLL


def training_window(batch: int, precision: str, device: str) -> Callable[[], object]:
    """The package's own training step."""
    config = preset("paper", batch=batch, precision=precision, unroll=UNROLL, horizon=100, trajectories=10**9, clip=1.0)
    return MetaTrainer(config, device).step


def products_window(batch: int, precision: str, device: str) -> tuple[Callable[[], object], int]:
    """The window's matrix products alone, and their number of floating-point operations."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    config = preset("paper")
    optimizer = MetaOptimizer(config.method, config.task)
    jobs: list[tuple[Callable[[], object], int]] = []
    flops = 0
    for lstm in optimizer.lstms:
        for layer, weight in enumerate([*lstm.weights, lstm.head_weight]):
            w = weight.detach().to(device, dtype)
            x = torch.randn(batch, w.shape[1], device=device).to(dtype)
            g = torch.randn(batch, w.shape[0], device=device).to(dtype)
            xs, gs = x.repeat(UNROLL, 1), g.repeat(UNROLL, 1)
            part = w[:, -lstm.hidden :] if layer == 0 else w  # the gradient input is a constant
            jobs.append((lambda x=x, w=w: x @ w.t(), UNROLL))
            jobs.append((lambda g=g, part=part: g @ part, UNROLL))
            jobs.append((lambda xs=xs, gs=gs: gs.t() @ xs, 1))
            flops += 2 * batch * UNROLL * (2 * w.numel() + part.numel())

    def window() -> None:
        for job, times in jobs:
            for _ in range(times):
                job()
        if device != "cpu":
            torch.cuda.synchronize()

    return window, flops


def main() -> None:
    """Print the table; write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    naive = naive_ms(args.repeats)
    print(f"naive, batch 1: {naive:.2f} ms per trajectory-step")
    print(
        f"{'precision':>9} {'batch':>5} {'ms/step':>8} {'naive/ours':>10} {'products':>9} {'GFLOP/s':>8} {'share':>6}"
    )
    rows = []
    for precision in ("float32", "bf16"):
        for batch in args.batches:
            alone, flops = products_window(batch, precision, args.device)
            spent, needed = seconds(training_window(batch, precision, args.device), alone, repeats=args.repeats)
            ms, products = (1e3 * t / (UNROLL * batch) for t in (spent, needed))
            rate = flops / needed / 1e9
            rows.append(
                {
                    "precision": precision,
                    "batch": batch,
                    "ms_per_trajectory_step": ms,
                    "products_ms_per_trajectory_step": products,
                    "products_gflops": rate,
                    "share_of_product_rate": products / ms,
                    "naive_over_ours": naive / ms,
                }
            )
            share = f"{products / ms:>6.2f}"
            print(f"{precision:>9} {batch:>5} {ms:>8.4f} {naive / ms:>10.1f} {products:>9.4f} {rate:>8.0f} {share}")
    again = naive_ms(args.repeats)
    print(f"naive, measured again at the end: {again:.2f} ms")
    result = {
        "naive_ms_per_trajectory_step": naive,
        "naive_ms_again_at_the_end": again,
        "rows": rows,
        "environment": environment(device=args.device),
    }
    save(args.json, result)


if __name__ == "__main__":
    main()
