"""Processes of one thread that work off a list of jobs; one that dies or hangs loses its job, and no more."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

# A function for one job, made in the process where it is called.
MakeWork = Callable[..., Callable[[Any], Any]]
_START_S = 120.0  # that a new process may take on a busy machine before its first answer


class Lost:
    """In place of what a job would have given.

    Attributes:
        reason: Why.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason


class Workers:
    """``count`` processes, or this one alone if 0.

    Answers do not depend on how many there are, where work depends on nothing but its job.

    Args:
        count: Processes.
        make: ``make(*arguments)`` gives what works off a job; both travel to new processes, so ``make`` must be a
            function of a module.
        arguments: For it.
        timeout_s: Time of a job after which its process is ended. Without processes none is.

    Example:
        >>> from functools import partial
        >>> with Workers(0, partial, (max, 3), 60.0) as workers:
        ...     workers.answers([2, 5])
        [3, 5]
    """

    def __init__(self, count: int, make: MakeWork, arguments: tuple[Any, ...], timeout_s: float) -> None:
        self.count, self.timeout_s = count, timeout_s
        self._make, self._arguments = make, arguments
        self._work: Callable[[Any], Any] | None = None
        self._running: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def answers(self, jobs: Sequence[Any]) -> list[Any]:
        """What each job gives, in order; :class:`Lost` for one that raised, or whose process died or took too long.

        Args:
            jobs: Plain values; the longest should come first.
        """
        if not self.count:
            if self._work is None:
                self._work = self._make(*self._arguments)
            return [_answer(self._work, job) for job in jobs]
        found: list[Any] = [None] * len(jobs)
        waiting = deque(range(len(jobs)))
        while len(self._running) < min(self.count, len(jobs)):
            self._running.append(_Worker(self._make, self._arguments, self.timeout_s))
        while waiting or any(worker.job is not None for worker in self._running):
            for worker in self._running:
                if waiting and worker.job is None and not worker.give(waiting[0], jobs[waiting[0]]):
                    continue
                if waiting and worker.job == waiting[0]:
                    waiting.popleft()
            busy = [worker for worker in self._running if worker.job is not None]
            remaining = min((worker.deadline_s for worker in busy), default=0.0) - time.monotonic()
            ready = wait([worker.connection for worker in busy], timeout=max(0.0, remaining))
            for worker in busy:
                late = worker.deadline_s <= time.monotonic()
                if worker.connection in ready or late:
                    assert worker.job is not None
                    job, answer = worker.job, worker.taken()
                    found[job] = answer
            self._running = [
                worker if worker.alive else _Worker(self._make, self._arguments, self.timeout_s)
                for worker in self._running
            ]
        return found

    def close(self) -> None:
        """End the processes."""
        for worker in self._running:
            worker.end()
        self._running = []


class _Worker:
    """One process and the job it has."""

    def __init__(self, make: MakeWork, arguments: tuple[Any, ...], timeout_s: float) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads that are not there
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.job: int | None = None
        self.alive, self.timeout_s, self.deadline_s = True, timeout_s, 0.0
        self._slack_s = _START_S

    def give(self, number: int, job: Any) -> bool:
        """Send a job; whether it could be."""
        try:
            self.connection.send(job)
        except OSError:  # it died between two jobs
            self.end()
            return False
        self.job, self.deadline_s = number, time.monotonic() + self.timeout_s + self._slack_s
        return True

    def taken(self) -> Any:
        """The answer that is ready, or what was lost."""
        self.job, self._slack_s = None, 0.0
        if not self.connection.poll():
            self.end()
            return Lost(f"took longer than {self.timeout_s:g} s")
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.end()
            return Lost("its process died")

    def end(self) -> None:
        """End the process."""
        self.alive = False
        with suppress(OSError):
            self.connection.close()
        self.process.kill()
        self.process.join()


def _answer(work: Callable[[Any], Any], job: Any) -> Any:
    try:
        return work(job)
    except Exception:  # whatever is wrong with one job must not end the others
        return Lost(traceback.format_exc(limit=-3))


def _serve(connection: Connection, make: MakeWork, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    work = make(*arguments)
    with suppress(EOFError, KeyboardInterrupt):  # the run has ended
        while True:
            connection.send(_answer(work, connection.recv()))
