"""Ten real tasks, none of them in meta-training: the learned optimizer beside tuned peers.

python benchmarks/breadth.py --json results/benchmarks/breadth.json --data-root DATA --tune   # hours; resumable
python benchmarks/breadth.py --json results/benchmarks/breadth.json --redraw                  # table and figure again

Every finished run is appended to FILE.raw.jsonl beside the JSON at once; a repeated call does what is missing. Peers
are tuned on other seeds than the shown ones: the rate on the series 1, 2, 5, 10, …, five values and more while the
best is at an edge, then weight decay 0.1 beside 0 at the best rate; the lowest held-out loss at the end wins.
``--pack FILE`` writes all data the tasks need into one file, and ``--data FILE`` reads it on another machine.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from breadth_runs import Job, trained  # noqa: E402
from breadth_summary import drawn, summary, table  # noqa: E402
from breadth_tasks import TASKS, Arrays, gathered, packed, unpacked  # noqa: E402
from jobs import Runs, pool_of, where, with_data  # noqa: E402
from jobs import work as all_work  # noqa: E402
from peers import METHODS, OURS, neighbour  # noqa: E402

SHOWN, TUNED_ON = (0, 1, 2), (1000,)  # seeds
MOST_RATES = 12


# --- what is there, and what is missing


class Raw(Runs[Job]):
    """Finished runs, in memory and as lines of a file that only grows."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Job)

    def drop(self, methods: Sequence[str]) -> None:
        """Forget all runs of some methods."""
        from metatele.files import write_atomically

        self.rows = {job: row for job, row in self.rows.items() if job.method not in methods}
        write_atomically(self.path, "".join(json.dumps(r) + "\n" for r in self.rows.values()).encode())


def end(row: dict[str, Any]) -> float:
    """Held-out loss at the end; infinite for a run that did not get there."""
    return math.inf if row["held_out"][-1] is None else row["held_out"][-1]


def tuned(task: str, method: str, raw: Raw) -> tuple[list[Job], Job | None]:
    """The runs that the choice of settings waits for, or the chosen settings.

    The search goes on beyond the first five rates while the best is the lowest or the highest of them.
    """
    rest_lr = 0.0
    if METHODS[method].after:
        missing, first = tuned(task, METHODS[method].after, raw)
        if first is None:
            return missing, None
        rest_lr = first.lr
    rates = list(METHODS[method].rates)
    if not rates:
        return [], Job(task, method, 0)

    def jobs(lr: float, weight_decay: float) -> list[Job]:
        return [Job(task, method, seed, lr, weight_decay, rest_lr) for seed in TUNED_ON]

    def score(lr: float, weight_decay: float) -> float:
        return statistics.fmean(end(raw.rows[job]) for job in jobs(lr, weight_decay))

    while True:
        missing = [job for lr in rates for job in jobs(lr, 0.0) if job not in raw.rows]
        if missing:
            return missing, None
        best = min(rates, key=lambda lr: score(lr, 0.0))
        side = -1 if best == rates[0] else 1 if best == rates[-1] else 0
        more = neighbour(best, side) if side and len(rates) < MOST_RATES else None
        if more is None:
            break
        rates = sorted([*rates, more])
    missing = [job for job in jobs(best, 0.1) if job not in raw.rows]
    if missing:
        return missing, None
    weight_decay = min((0.0, 0.1), key=lambda w: score(best, w))
    return [], Job(task, method, 0, best, weight_decay, rest_lr)


def missing(tasks: Sequence[str], methods: Sequence[str], seeds: Sequence[int], tune: bool, raw: Raw) -> list[Job]:
    """Runs that can begin now, the longest first."""
    found: dict[Job, None] = {}
    for task in sorted(tasks, key=lambda name: -TASKS[name].seconds):
        for method in methods:
            waits, chosen = tuned(task, method, raw)
            if chosen is not None:
                waits = [Job(**{**asdict(chosen), "seed": seed}) for seed in seeds]
            elif not tune:
                waits = []
            found.update(dict.fromkeys(job for job in waits if job not in raw.rows))
    return list(found)


# --- many runs


def _run(job: Job, arrays: Arrays) -> dict[str, Any]:
    return trained(job, arrays, beside=job.seed not in TUNED_ON and job.method != "adamw")


def _run_with_data(job: Job) -> dict[str, Any]:
    return with_data(_run, job)


def work(
    pool: Any,
    processes: int,
    raw: Raw,
    jobs: Callable[[], list[Job]],
    limit_s: float,
    run: Callable[[Job], dict[str, Any]] = _run_with_data,
) -> Iterator[str]:
    """Do what is missing until nothing is or the time is over; a line for each run. See :func:`jobs.work`."""

    def told(job: Job, row: dict[str, Any]) -> str:
        what = f"{job.task}, {METHODS[job.method].title}, seed {job.seed}, {job.settings or 'as it comes'}"
        return f"{what}: {row['train_end']} / {end(row):.6g}, {row['ms_per_step']} ms {row['failed']}"

    return all_work(
        *(pool, processes, raw, jobs, limit_s, run),
        seconds=lambda job: 2 * TASKS[job.task].seconds,
        part=lambda job: (job.task, METHODS[job.method].title),
        told=told,
    )


def result(raw: Raw) -> dict[str, Any]:
    """What the JSON holds: shown runs at the chosen settings, how these were found, and the summary."""
    rows, tuning = [], []
    for task in TASKS:
        for method in METHODS:
            chosen = tuned(task, method, raw)[1]
            for job, row in raw.rows.items():
                if (job.task, job.method) != (task, method):
                    continue
                if job.seed in TUNED_ON:
                    tuning.append({**asdict(job), "held_out": row["held_out"][-1]})
                elif chosen is not None and job == Job(**{**asdict(chosen), "seed": job.seed}):
                    left = ("lr", "weight_decay", "rest_lr")
                    rows.append({k: v for k, v in row.items() if k not in left})
    return {"rows": rows, "tuning": tuning, "summary": summary(rows)}


def parsed() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", type=Path, metavar="FILE", help="raw runs, table and figure go beside it")
    p.add_argument("--data-root", type=Path, metavar="DATA", help="folder of MNIST, Fashion-MNIST, CIFAR-10, text")
    p.add_argument("--data", type=Path, metavar="FILE", help="what --pack wrote, in place of --data-root")
    p.add_argument("--pack", type=Path, metavar="FILE", help="write the data of --data-root there, and end")
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    p.add_argument("--seeds", type=int, nargs="+", default=list(SHOWN), metavar="N", help="of the shown runs")
    p.add_argument("--tune", action="store_true", help="also the runs that choose settings (else: what is chosen)")
    p.add_argument("--redo", nargs="+", choices=METHODS, default=[], metavar="METHOD", help="forget their runs first")
    p.add_argument("--processes", type=int, default=1, metavar="N", help="runs at a time (default 1)")
    p.add_argument("--threads", type=int, default=1, metavar="N", help="of each run (default 1)")
    p.add_argument("--limit-s", type=float, default=math.inf, metavar="S", help="begin nothing that ends later")
    p.add_argument("--redraw", action="store_true", help="no runs: table, figure and JSON from the raw file")
    args = p.parse_args()
    if args.pack is None and args.json is None:
        p.error("--json FILE says where results go")
    if set(args.seeds) & set(TUNED_ON):
        p.error(f"--seeds: {TUNED_ON} is what settings are chosen on")
    if not args.redraw and (args.data_root is None) == (args.data is None):
        p.error("one of --data-root and --data says where the data are")
    return args


def main() -> None:
    """Run what is missing; print the table; write JSON and figure."""
    args = parsed()
    if not args.redraw:
        arrays = unpacked(args.data) if args.data else gathered(args.data_root)
        if args.pack:
            packed(args.pack, arrays)
            return
    raw = Raw(args.json.with_suffix(".raw.jsonl"))
    if args.redo:
        raw.drop(args.redo)
    if not args.redraw:
        pool = pool_of(args.processes, arrays, args.threads)

        def jobs() -> list[Job]:
            return missing(args.tasks, args.methods, args.seeds, args.tune, raw)

        for line in work(pool, args.processes, raw, jobs, args.limit_s):
            print(line, file=sys.stderr, flush=True)
        pool.shutdown()
        open_ones = [m for m in args.methods for t in args.tasks if m not in OURS and tuned(t, m, raw)[1] is None]
        print(f"{len(jobs())} runs could begin now; {len(open_ones)} settings are not chosen yet", file=sys.stderr)
    found = result(raw)
    print(table(found["summary"]))
    found["environment"] = where()
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    args.json.with_suffix(".md").write_text(table(found["summary"]) + "\n", encoding="utf-8")
    try:
        args.json.with_suffix(".png").write_bytes(drawn(found["summary"]))
    except ImportError as error:
        print(f"no figure: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
