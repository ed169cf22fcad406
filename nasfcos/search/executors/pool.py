"""Executors whose trials run in workers."""

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

# Workers that may die in a row while they start, or with no trial finished in between.
MAX_START_FAILURES = 3
MAX_DEATHS = 12


@dataclass(eq=False)
class Worker:
    """A worker as the main process sees it.

    Attributes:
        place: its number; a worker that dies is replaced by one at the same place.
        ready: it has started.
        job: what it is at.
        deadline: when that must be done, by `time.monotonic`.
    """

    place: int
    ready: bool = False
    job: TrialJob | None = None
    deadline: float = math.inf


class Pool(Executor):
    """What executors with workers share: handing out jobs, and replacing workers that die.

    Args:
        count: of the workers.
        timeout: seconds that a trial may take; a worker that takes longer counts as dead.
    """

    def __init__(self, count: int, timeout: float) -> None:
        self._count = count
        self._timeout = timeout
        self._workers: dict[int, Any] = {}
        self._start_failures = 0
        # Of the workers that died since the last result, the trials they were at (or themselves).
        self._deaths: list[object] = []

    @abstractmethod
    def _start(self, place: int) -> Worker:
        """Start a worker; it need not be ready yet."""

    @abstractmethod
    def _give(self, worker: Any, job: TrialJob) -> None:
        """Send a job to a worker that is ready."""

    @abstractmethod
    def _news(self, seconds: float) -> list[tuple[Any, str, Any]]:
        """Wait until workers have something to tell, at most so long.

        Returns:
            (worker, "ready", anything), (worker, "result", `TrialResult`), (worker, "error", text)
            where the task raised, (worker, "lost", text) where the worker died.
        """

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
                # Only now: workers do not wait for what is done with the outcomes.
                yield from outcomes
                if not more and all(worker.job is None for worker in self._workers.values()):
                    return
                told = (self._outcome(*news) for news in self._all_news())
                outcomes = [outcome for outcome in told if outcome is not None]
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

    def _all_news(self) -> Iterator[tuple[Any, str, Any]]:
        """`_news`, and then of workers that are overdue that they are lost."""
        deadlines = [worker.deadline for worker in self._workers.values() if worker.job is not None]
        yield from self._news(max(0.0, min(deadlines, default=math.inf) - time.monotonic()))
        for worker in list(self._workers.values()):
            if worker.job is not None and worker.deadline <= time.monotonic():
                yield worker, "lost", f"it took longer than {format_duration(self._timeout)}"

    def _outcome(
        self, worker: Worker, kind: str, content: Any
    ) -> tuple[TrialJob, TrialResult | WorkerLost] | None:
        """Note what a worker told; gives what it means for the job it was at, if for any."""
        job = worker.job
        if kind == "ready":
            worker.ready = True
            self._start_failures = 0
            return None
        if kind == "result":
            worker.job = None
            self._deaths.clear()
            return job, content
        if kind == "error":
            where = "while it started" if job is None else f"in trial {job.index}"
            raise ExecutorError(f"a worker failed {where}: {content}")
        self._remove(worker)
        self._deaths.append(worker if job is None else job.index)
        if not worker.ready:
            self._start_failures += 1
            logger.warning("a worker died while it started: %s", content)
        for number, too_many, when in (
            (
                self._start_failures,
                self._start_failures >= MAX_START_FAILURES,
                "died while they started",
            ),
            (len(self._deaths), self._too_many_deaths(), "died before they finished a trial"),
        ):
            if too_many:
                raise ExecutorError(
                    f"{number} workers in a row {when}, the last one so: {content}. "
                    "SEARCH.EXECUTOR inline runs trials in this process and may show more; where "
                    "they only take long, raise SEARCH.TRIAL_TIMEOUT"
                )
        return None if job is None else (job, WorkerLost(content))

    def _too_many_deaths(self) -> bool:
        """Whether something else must be to blame than a few trials that kill their worker each
        time: these are tried again after all others, and so die in a row."""
        deaths, limit = len(self._deaths), max(MAX_DEATHS, 2 * self._count)
        most_differ = 2 * len(set(self._deaths)) > deaths
        return deaths >= (limit if most_differ else 3 * limit)
