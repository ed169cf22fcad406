"""What an executor is, and the simplest one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from ...config import ConfigError
from ..records import TrialJob, TrialResult


class Task(Protocol):
    """What an executor runs; picklable."""

    def open(self) -> None:
        """Make ready what trials have in common, before the first one."""

    def run(self, job: TrialJob) -> TrialResult:
        """Try an architecture. A trial that fails gives a result that says so."""


@dataclass(frozen=True)
class WorkerLost:
    """Instead of a result: the worker died in the middle of the trial.

    Attributes:
        reason: how, in words.
    """

    reason: str


class ExecutorError(ConfigError):
    """Trials cannot be run where SEARCH.EXECUTOR wants them; the message says why."""


class Executor(ABC):
    """Runs trials. `InlineExecutor`, `LocalExecutor` and `RayExecutor` are the three.

    To be closed after use, or used in a ``with`` block.
    """

    @abstractmethod
    def run(self, jobs: Iterable[TrialJob]) -> Iterator[tuple[TrialJob, TrialResult | WorkerLost]]:
        """Run jobs, and give out each with its outcome as soon as it is there.

        A job is taken from `jobs` only when a worker is free for it. One run at a time; leaving
        the iterator before its end ends the trials that are running.

        Raises:
            ExecutorError: the task raised in a worker, or workers do not come to run trials.
        """

    @abstractmethod
    def close(self) -> None:
        """End the workers, and the trials they are at."""

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class InlineExecutor(Executor):
    """Runs trials in this process, one after the other. What `task` raises is raised here."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def run(self, jobs: Iterable[TrialJob]) -> Iterator[tuple[TrialJob, TrialResult | WorkerLost]]:
        self.task.open()
        for job in jobs:
            yield job, self.task.run(job)

    def close(self) -> None:
        pass
