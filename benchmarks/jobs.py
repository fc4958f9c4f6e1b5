"""Runs of a study in several processes: what is there, what is missing, what may begin; and a study's command line.

A run is described by a frozen dataclass, its job, and leaves one row that repeats the job's fields. Finished rows are
appended to FILE.raw.jsonl at once, so that a call that was killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from breadth_tasks import Arrays, gathered, unpacked
from peers import UnavailableError

from metatele.command_line import whole_number

J = TypeVar("J")
Row = dict[str, Any]
TUNED_ON = 1000  # the seed that settings are chosen on
SERIES = tuple(round(m * 10.0**e, 9) for e in range(-6, 3) for m in (1.0, 3.0))
MOST_RATES = 8


class Runs(Generic[J]):
    """Finished runs, in memory and as lines of a file that only grows.

    Args:
        path: The file.
        kind: The dataclass of jobs.
    """

    def __init__(self, path: Path, kind: type[J]) -> None:
        self.path, self.kind = path, kind
        self.rows: dict[J, Row] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # what a killed run left behind
                    continue
                self.rows.setdefault(self.job_of(row), row)

    def job_of(self, row: Row) -> J:
        """What identifies a row."""
        return self.kind(**{f.name: row[f.name] for f in fields(self.kind)})  # type: ignore[arg-type]

    def add(self, row: Row) -> None:
        """Append one run."""
        self.rows[self.job_of(row)] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        broken = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * broken + json.dumps(row) + "\n")


def climbed(
    runs: Runs[J], job_at: Callable[[float], J], rates: Sequence[float], score: Callable[[Row], float]
) -> tuple[list[J], float]:
    """The runs that the choice of a rate waits for, and the best rate so far.

    Three rates or more, next to each other in the series 1, 3, 10, …; while the best of them is the lowest or the
    highest, the next one is tried, up to eight.

    Args:
        runs: What is there.
        job_at: The run at a rate.
        rates: The first ones, in ascending order.
        score: Of a row; the lowest wins.
    """
    tried = list(rates)
    while True:
        missing = [job for job in map(job_at, tried) if job not in runs.rows]
        if missing:
            return missing, math.nan
        best = min(tried, key=lambda lr: score(runs.rows[job_at(lr)]))
        side = -1 if best == tried[0] else 1 if best == tried[-1] else 0
        more = beside(best, side)
        if not side or more == best or len(tried) >= MOST_RATES:
            return [], best
        tried = sorted([*tried, more])


def beside(rate: float, side: int) -> float:
    """The next rate of the series 1, 3, 10, … below (-1) or above (1); the rate itself at the series' end.

    Example:
        >>> beside(0.03, 1), beside(0.01, -1)
        (0.1, 0.003)
    """
    place = min(range(len(SERIES)), key=lambda i: abs(SERIES[i] / rate - 1)) + side
    return SERIES[min(max(place, 0), len(SERIES) - 1)]


class Here:
    """The interface of a pool, in this process."""

    def submit(self, run: Callable[..., Row], *given: Any) -> Future[Row]:
        """Run at once."""
        future: Future[Row] = Future()
        try:
            future.set_result(run(*given))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self) -> None:
        """Nothing to stop."""


_data: Arrays = {}


def _begin(arrays: Arrays, threads: int) -> None:
    global _data
    _data = arrays
    torch.set_num_threads(threads)


def with_data(run: Callable[[J, Arrays], Row], job: J) -> Row:
    """A run with the data that its process was given."""
    return run(job, _data)


def pool_of(processes: int, arrays: Arrays, threads: int = 1) -> Any:
    """Where runs are submitted; every process has the data."""
    if processes == 1:
        _begin(arrays, threads)
        return Here()
    return ProcessPoolExecutor(processes, get_context("spawn"), _begin, (arrays, threads))


def work(
    pool: Any,
    processes: int,
    runs: Runs[J],
    jobs: Callable[[], list[J]],
    limit_s: float,
    run: Callable[[J], Row],
    seconds: Callable[[J], float],
    part: Callable[[J], tuple[str, str]],
    told: Callable[[J, Row], str],
) -> Iterator[str]:
    """Do what is missing until nothing is or the time is over; a line for each run.

    Args:
        pool: Where runs are submitted.
        processes: Runs at a time.
        runs: Where results go, and what ``jobs`` looks at.
        jobs: Runs that can begin now; asked again after every result, since choices depend on them.
        limit_s: No run begins that would probably end later.
        run: What is submitted.
        seconds: That a job takes at most, probably.
        part: Where and with what a job works: after an error, other jobs of the same part are left out.
        told: The line for a finished run.
    """
    begin, refused = time.monotonic(), set[tuple[str, str]]()
    running: dict[Future[Row], J] = {}
    while True:
        for job in jobs():
            if len(running) >= processes:
                break
            late = time.monotonic() - begin + seconds(job) > limit_s
            known = {part(job), ("", part(job)[1])} & refused
            if job not in running.values() and not known and not late:
                running[pool.submit(run, job)] = job
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job, error = running.pop(future), future.exception()
            if error is None:
                runs.add(future.result())
                yield told(job, future.result())
                continue
            place, what = part(job)
            everywhere = isinstance(error, UnavailableError) and error.everywhere
            if ((wide := "" if everywhere else place), what) not in refused:
                reason = error.reason if isinstance(error, UnavailableError) else repr(error)
                yield f"left out: {what} on {'every task' if everywhere else place}: {reason}"
            refused.add((wide, what))


@dataclass(frozen=True)
class Study(Generic[J]):
    """What a study is, apart from how its runs are spread over processes and time.

    Attributes:
        kind: The dataclass of its jobs.
        run: Makes the row of a job; a function of a module, so that other processes find it.
        missing: Runs that can begin now, of what is there and of so many seeds.
        seconds: That a job takes on one core, roughly.
        part: See :func:`work`.
        result: What the JSON holds, of the rows.
        table: In Markdown, of the result.
        drawn: The figure as a PNG, of the result.
    """

    kind: type[J]
    run: Callable[[J, Arrays], Row]
    missing: Callable[[Runs[J], int], list[J]]
    seconds: Callable[[J], float]
    part: Callable[[J], tuple[str, str]]
    result: Callable[[Runs[J]], Row]
    table: Callable[[Row], str]
    drawn: Callable[[Row], bytes]


class Bound:
    """A study's run with the data of the process it is in; goes to other processes by its function's name."""

    def __init__(self, run: Callable[[J, Arrays], Row]) -> None:
        self.run = run

    def __call__(self, job: Any) -> Row:
        """The row of a job."""
        return with_data(self.run, job)


def flags(description: str | None, seeds: int) -> argparse.ArgumentParser:
    """What every study's command line has beside where its results go."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data-root", type=Path, metavar="DATA", help="folder of MNIST, Fashion-MNIST, CIFAR-10, text")
    p.add_argument("--data", type=Path, metavar="FILE", help="what breadth.py --pack wrote, in place of --data-root")
    p.add_argument("--seeds", type=whole_number(1), default=seeds, metavar="N", help=f"(default {seeds})")
    p.add_argument("--processes", type=whole_number(1), default=1, metavar="N", help="runs at a time (default 1)")
    p.add_argument("--limit-s", type=float, default=math.inf, metavar="S", help="begin nothing that ends later")
    p.add_argument("--redraw", action="store_true", help="no runs: JSON, table and figure from the raw file")
    return p


def arrays_of(p: argparse.ArgumentParser, given: argparse.Namespace) -> Arrays:
    """The data that the flags name."""
    if (given.data_root is None) == (given.data is None):
        p.error("one of --data-root and --data says where the data are")
    return unpacked(given.data) if given.data else gathered(given.data_root)


def brief(row: Row) -> str:
    """A row in a line, without what is long."""
    short = {k: v for k, v in row.items() if not isinstance(v, (list, dict))}
    return str({k: round(v, 4) if isinstance(v, float) else v for k, v in short.items()})


def main(study: Study[J], description: str | None, seeds: int = 5, arguments: Sequence[str] | None = None) -> None:
    """Parse, run what is missing; write JSON, table and figure, print the table."""
    p = flags(description, seeds)
    p.add_argument("--json", type=Path, required=True, metavar="FILE", help="raw runs, table and figure go beside it")
    given = p.parse_args(arguments)
    runs = Runs(given.json.with_suffix(".raw.jsonl"), study.kind)
    if given.redraw:
        if not runs.rows:
            p.error(f"there are no runs in {runs.path}")
        write(study, runs, given.json, None)
        return
    pool = pool_of(given.processes, arrays_of(p, given))

    def jobs() -> list[J]:
        return study.missing(runs, given.seeds)

    many = (runs, jobs, given.limit_s, Bound(study.run), study.seconds, study.part, lambda _, row: brief(row))
    for line in work(pool, given.processes, *many):
        print(line, file=sys.stderr, flush=True)
    pool.shutdown()
    print(f"{len(jobs())} runs could begin now", file=sys.stderr)
    write(study, runs, given.json, given.processes)


def write(study: Study[J], runs: Runs[J], path: Path, processes: int | None) -> None:
    """JSON, table and figure of what is there; without a number of processes, where it ran stays as it is stored."""
    made = {**where(), "processes": processes}
    if processes is None and path.is_file():
        made = json.loads(path.read_text(encoding="utf-8"))["environment"]
    result = study.result(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result, "environment": made}, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(study.table(result) + "\n", encoding="utf-8")
    path.with_suffix(".png").write_bytes(study.drawn(result))
    print(study.table(result))


def where() -> dict[str, Any]:
    """Machine and versions, as far as what is installed can tell."""
    try:
        from common import environment

        return environment()
    except ImportError:  # a bare machine, without what checkpoints need
        import metatele

        known = {"metatele": metatele.__version__, "torch": torch.__version__, "python": platform.python_version()}
        return {**known, "machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
