"""Meta-training on several processes, and its memory.

python benchmarks/scaling.py --json results/benchmarks/scaling.json

Processes: torchrun on this machine, one thread each, the preset ``paper`` at a fixed global batch; ms per
trajectory-step of the whole batch, and what is sent for each update. Memory: the largest resident (on a GPU, allocated)
memory of some updates beyond that before the first, by batch and length of the window, with and without ``--remat``;
each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]


def status_mb(name: str) -> float:
    """A line of /proc/self/status, in MB."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(text.split(f"{name}:")[1].split()[0]) / 1024


def work(settings: dict[str, Any], device: str, updates: int) -> dict[str, Any]:
    """Seconds of each update of the preset ``paper``, and memory, in this process: alone, or one that torchrun made."""
    import torch

    from metatele.config import preset
    from metatele.training.flat import FlatTrainer
    from metatele.training.processes import joined

    torch.set_num_threads(1)
    gpu, times = device != "cpu", []
    config = preset("paper", horizon=120, trajectories=10**9, clip=1.0, **settings)
    with joined() as processes:
        trainer = FlatTrainer(config, device, processes)
        before = status_mb("VmRSS")
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(updates):
            begin = time.perf_counter()
            trainer.step()
            times.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() / 2**20 if gpu else status_mb("VmHWM") - before
    size = sum(p.numel() for p in trainer.optimizer.parameters())
    return {"seconds": times, "peak_mb": peak, "sent_bytes": 4 * size, "first": processes.first}


def started(settings: dict[str, Any], device: str, updates: int, processes: int = 1) -> dict[str, Any]:
    """What the first of some new processes measured."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, "--work", json.dumps(settings)]
    command += ["--updates", str(updates), "--device", device]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise SystemExit(done.stderr)
    return next(found for found in map(json.loads, done.stdout.splitlines()) if found["first"])


def main() -> None:
    """Print the tables; write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 256], help="for the processes")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(work(json.loads(args.work), args.device, args.updates)), flush=True)
        return
    from common import environment, save

    scaling = []
    for batch in args.batches:
        for precision in ("float32", "bf16"):
            settings = {"batch": batch, "unroll": 10, "precision": precision}
            turns: dict[int, list[float]] = {n: [] for n in args.processes}
            sent = 0
            for _ in range(args.turns):  # in turns, so that a slow minute hits all alike
                for n in args.processes:
                    found = started(settings, args.device, args.updates, n)
                    sent = found["sent_bytes"]
                    turns[n].append(1e3 * statistics.median(found["seconds"][2:]) / (10 * batch))
            for n, all_ms in turns.items():
                ms, one = statistics.median(all_ms), statistics.median(turns[args.processes[0]])
                row = {"batch": batch, "precision": precision, "processes": n, "ms_per_trajectory_step": ms}
                scaling.append({**row, "range": [min(all_ms), max(all_ms)], "speedup": one / ms, "sent_bytes": sent})
                print(f"batch {batch:>4} {precision:>8} {n} processes: {ms:.4f} ms, {one / ms:.2f} times", flush=True)
    memory = []
    for batch, unroll in ((16, 10), (256, 10), (256, 20), (256, 40)):
        for remat in (False, True):
            settings = {"batch": batch, "unroll": unroll, "remat": remat}
            found = started(settings, args.device, 4)
            ms = 1e3 * min(found["seconds"]) / (unroll * batch)
            memory.append({**settings, "peak_mb": found["peak_mb"], "ms_per_trajectory_step": ms})
            print(f"batch {batch:>4} unroll {unroll:>3} remat {remat!s:>5}: {found['peak_mb']:.0f} MB, {ms:.3f} ms")
    save(args.json, {"scaling": scaling, "memory": memory, "environment": environment(device=args.device)})


if __name__ == "__main__":
    main()
