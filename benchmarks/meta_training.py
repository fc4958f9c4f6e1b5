"""Cost of one trajectory-step of meta-training (unroll, backward, clipping, Adam).

python benchmarks/meta_training.py --json results/benchmarks/meta_training.json
python benchmarks/meta_training.py --device cuda --json results/benchmarks/meta_training_cuda.json
python benchmarks/meta_training.py --table results/benchmarks/meta_training*.json

In one run, so that ratios hold on a noisy machine: the naive one-trajectory loop (tests/naive.py) on the same device,
this package at several batches in float32, tf32 (on a GPU) and bf16, and the matrix products alone: what the same
LSTM products, forward and backward, take at that batch when nothing else is done. Peak is the best rate of a large
square product of that dtype, measured too. On a GPU windows are CUDA graphs unless --no-graph.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from common import environment, save  # noqa: E402
from naive import NaiveLearner  # noqa: E402

from metatele.config import preset  # noqa: E402
from metatele.learned import MetaOptimizer  # noqa: E402
from metatele.tasks import Regression  # noqa: E402
from metatele.training.flat import FlatTrainer  # noqa: E402

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


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


@contextmanager
def rounded(precision: str) -> Iterator[None]:
    """Products of float32 as that precision says."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def peak_gflops(precision: str, device: str, size: int = 2048, repeats: int = 9) -> float:
    """Best rate of a square product."""
    size = size if device == "cpu" else 4 * size
    a = torch.randn(size, size, device=device).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    best = math.inf
    with rounded(precision):
        for _ in range(repeats + 2):
            wait(device)
            begin = time.perf_counter()
            a @ a
            wait(device)
            best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best / 1e9


def naive_ms(repeats: int, device: str = "cpu") -> float:
    """One window of the naive loop: unroll, backward, Adam; with the cheapest group element, I + T."""
    config = preset("paper", parametrisation="first-order")
    learner = NaiveLearner(MetaOptimizer(config.method, config.task).to(device))
    adam = torch.optim.Adam(learner.parameters(), lr=1e-4)
    problem = Regression(config.task).sample(0, "train", [0]).to(device)

    def window() -> None:
        _, losses = learner.run(problem.initial[0], problem.inputs[0], problem.targets[0], UNROLL)
        adam.zero_grad()
        torch.stack(losses).sum().backward()
        adam.step()
        wait(device)

    return 1e3 * seconds(window, repeats=repeats)[0] / UNROLL


def training_window(batch: int, precision: str, device: str, **changes: object) -> Callable[[], object]:
    """The package's own training step; it ends with numbers on the CPU, so nothing is left to wait for."""
    settings = {"unroll": UNROLL, "horizon": 100, "trajectories": 10**9, "clip": 1.0, **changes}
    return FlatTrainer(preset("paper", batch=batch, precision=precision, **settings), device).step


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
        with rounded(precision):
            for job, times in jobs:
                for _ in range(times):
                    job()
        wait(device)

    return window, flops


def table(files: Sequence[Path]) -> None:
    """The table of docs/speed.md, from stored results."""
    print("| machine | precision | batch | ms per trajectory-step | naive / ours | of products alone | of peak |")
    print("|:--|:--|--:|--:|--:|--:|--:|")
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        where = found["environment"]
        machine = f"{where['threads']} threads, {where['capability']}" if where["device"] == "cpu" else where["device"]
        both = (found["naive_ms_per_trajectory_step"], found["naive_ms_again_at_the_end"])
        for row in found["rows"]:
            ms = row["ms_per_trajectory_step"]
            cells = [
                machine,
                row["precision"],
                row["batch"],
                f"{ms:.4f}",
                f"{min(both) / ms:.1f} to {max(both) / ms:.1f}",
            ]
            cells += [f"{100 * row[share]:.0f} %" for share in ("share_of_product_rate", "share_of_peak")]
            print("| " + " | ".join(map(str, cells)) + " |")


def main() -> None:
    """Print the table; write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", help="default 1 16 64 256; on a GPU to 8192")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-graph", action="store_true", help="on a GPU, launch every kernel")
    parser.add_argument(
        "--table", type=Path, nargs="+", metavar="FILE", help="measure nothing; the table of docs/speed.md from these"
    )
    args = parser.parse_args()
    if args.table:
        table(args.table)
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    gpu = args.device != "cpu"
    batches = args.batches or ([1, 64, 256, 1024, 4096, 8192] if gpu else [1, 16, 64, 256])
    naive = naive_ms(args.repeats, args.device)
    print(f"naive, batch 1: {naive:.2f} ms per trajectory-step")
    titles = ("precision", "batch", "ms/step", "naive/ours", "products", "GFLOP/s", "of products", "of peak")
    print(" ".join(f"{title:>11}" for title in titles))
    rows, peaks = [], {}
    for precision in ("float32", "tf32", "bf16") if gpu else ("float32", "bf16"):
        peaks[precision] = peak_gflops(precision, args.device)
        for batch in batches:
            alone, flops = products_window(batch, precision, args.device)
            window = training_window(batch, precision, args.device, graph=gpu and not args.no_graph)
            gc.collect()  # the last window's CUDA graph; freed while the next one is captured, it would spoil that
            spent, needed = seconds(window, alone, repeats=args.repeats)
            ms, products = (1e3 * t / (UNROLL * batch) for t in (spent, needed))
            rows.append(
                {
                    "precision": precision,
                    "batch": batch,
                    "ms_per_trajectory_step": ms,
                    "products_ms_per_trajectory_step": products,
                    "products_gflops": flops / needed / 1e9,
                    "share_of_product_rate": products / ms,
                    "share_of_peak": flops / spent / 1e9 / peaks[precision],
                    "naive_over_ours": naive / ms,
                }
            )
            numbers = (f"{ms:.4f}", f"{naive / ms:.1f}", f"{products:.4f}", f"{flops / needed / 1e9:.0f}")
            shares = (f"{products / ms:.2f}", f"{rows[-1]['share_of_peak']:.2f}")
            print(" ".join(f"{cell:>11}" for cell in (precision, batch, *numbers, *shares)), flush=True)
    again = naive_ms(args.repeats, args.device)
    print(f"naive, measured again at the end: {again:.2f} ms")
    result = {
        "naive_ms_per_trajectory_step": naive,
        "naive_ms_again_at_the_end": again,
        "peak_gflops": peaks,
        "rows": rows,
        "environment": environment(device=args.device),
    }
    save(args.json, result)


if __name__ == "__main__":
    main()
