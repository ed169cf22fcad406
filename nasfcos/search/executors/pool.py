"""The base class of executors with workers."""

from __future__ import annotations

import logging
import math
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ...engine.metrics import format_duration
from ..records import TrialJob, TrialResult
from .base import Executor, ExecutorError, WorkerLost

logger = logging.getLogger(__name__)

MAX_START_FAILURES = 3
"""Workers that may die in a row while they start."""

MAX_DEATHS = 12
"""Workers that may die in a row without a finished trial in between."""


@dataclass(frozen=True)
class Ready:
    """A worker has started, and can run jobs."""


@dataclass(frozen=True)
class TaskError:
    """The task raised in a worker.

    Attributes:
        error: the exception, in words.
    """

    error: str


Message = Ready | TrialResult | TaskError | WorkerLost
"""What the main process is told of a worker."""


@dataclass(eq=False)
class Worker:
    """A worker as the main process sees it.

    Attributes:
        place: its number; a worker that dies is replaced by one with the same number.
        ready: whether it has started.
        job: the job that it runs; None: it is idle.
        deadline: time by which the job must end, by `time.monotonic`.
    """

    place: int
    ready: bool = False
    job: TrialJob | None = None
    deadline: float = math.inf


class Pool(Executor):
    """Hands out jobs to workers, and replaces workers that die.

    Args:
        count: number of workers.
        timeout: seconds that a trial may take; a worker that takes longer counts as dead.
    """

    def __init__(self, count: int, timeout: float) -> None:
        self._count = count
        self._timeout = timeout
        self._workers: dict[int, Any] = {}
        self._start_failures = 0
        # For each worker that died since the last result: the index of its trial, or, if it had
        # none, the worker itself.
        self._deaths: list[object] = []

    @abstractmethod
    def _start(self, place: int) -> Worker:
        """Start a worker, without waiting until it is ready."""

    @abstractmethod
    def _give(self, worker: Any, job: TrialJob) -> None:
        """Send a job to a worker that is ready."""

    @abstractmethod
    def _receive(self, seconds: float) -> list[tuple[Any, Message]]:
        """Wait for messages of workers, `seconds` at most."""

    @abstractmethod
    def _end(self, worker: Any) -> None:
        """End a worker at once, dead or alive."""

    def run(self, jobs: Iterable[TrialJob]) -> Iterator[tuple[TrialJob, TrialResult | WorkerLost]]:
        jobs, more = iter(jobs), True
        outcomes: list[tuple[TrialJob, TrialResult | WorkerLost]] = []
        try:
            while True:
                self._start_missing()
                for worker in self._workers.values():
                    if more and worker.ready and worker.job is None:
                        worker.job = next(jobs, None)
                        more = worker.job is not None
                        if more:
                            worker.deadline = time.monotonic() + self._timeout
                            self._give(worker, worker.job)
                # After the jobs are handed out, so that no worker waits for the caller.
                yield from outcomes
                if not more and all(worker.job is None for worker in self._workers.values()):
                    return
                handled = (self._handle(*message) for message in self._messages())
                outcomes = [outcome for outcome in handled if outcome is not None]
        finally:
            for worker in list(self._workers.values()):
                if worker.job is not None:
                    self._remove(worker)

    def close(self) -> None:
        for worker in list(self._workers.values()):
            self._remove(worker)

    def _start_missing(self) -> None:
        for place in range(self._count):
            if place not in self._workers:
                self._workers[place] = self._start(place)

    def _remove(self, worker: Worker) -> None:
        del self._workers[worker.place]
        self._end(worker)

    def _messages(self) -> Iterator[tuple[Any, Message]]:
        """Messages of workers; then, for each that is overdue, that it is lost."""
        deadlines = [worker.deadline for worker in self._workers.values() if worker.job is not None]
        yield from self._receive(max(0.0, min(deadlines, default=math.inf) - time.monotonic()))
        for worker in list(self._workers.values()):
            if worker.job is not None and worker.deadline <= time.monotonic():
                yield worker, WorkerLost(f"it took longer than {format_duration(self._timeout)}")

    def _handle(
        self, worker: Worker, message: Message
    ) -> tuple[TrialJob, TrialResult | WorkerLost] | None:
        """Take note of a message, and return the outcome of the worker's job if it is one."""
        job = worker.job
        if isinstance(message, Ready):
            worker.ready = True
            self._start_failures = 0
            return None
        if isinstance(message, TrialResult):
            worker.job = None
            self._deaths.clear()
            return job, message
        if isinstance(message, TaskError):
            where = "while it started" if job is None else f"in trial {job.index}"
            raise ExecutorError(f"a worker failed {where}: {message.error}")
        self._remove(worker)
        self._deaths.append(worker if job is None else job.index)
        if not worker.ready:
            self._start_failures += 1
            logger.warning("a worker died while it started: %s", message.reason)
        if self._start_failures >= MAX_START_FAILURES:
            raise _deaths_error(self._start_failures, "while they started", message)
        if self._too_many_deaths():
            raise _deaths_error(len(self._deaths), "before they finished a trial", message)
        return None if job is None else (job, message)

    def _too_many_deaths(self) -> bool:
        """Whether the cause must be something else than a few trials that always kill their worker.

        Such trials are requeued behind all others, so at the end their workers die in a row.
        """
        deaths, limit = len(self._deaths), max(MAX_DEATHS, 2 * self._count)
        most_differ = 2 * len(set(self._deaths)) > deaths
        return deaths >= (limit if most_differ else 3 * limit)


def _deaths_error(number: int, when: str, last: WorkerLost) -> ExecutorError:
    return ExecutorError(
        f"{number} workers in a row died {when}, the last one so: {last.reason}. "
        "SEARCH.EXECUTOR inline runs trials in this process and may show more; if they "
        "only take long, raise SEARCH.TRIAL_TIMEOUT"
    )
