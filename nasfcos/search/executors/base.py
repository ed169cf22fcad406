"""The interface of executors and tasks, and the simplest executor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...config import ConfigError
from ..records import TrialJob, TrialResult


class Task(Protocol):
    """What an executor runs; picklable.

    Attributes:
        train, val: cache directories that it reads, of meta-train and meta-val.
    """

    train: Path
    val: Path

    def open(self) -> None:
        """Prepare what all trials share. Called before the first one."""

    def run(self, job: TrialJob) -> TrialResult:
        """Run a trial. One that fails returns a result with the status `FAILED`."""


@dataclass(frozen=True)
class WorkerLost:
    """The outcome of a trial whose worker died, instead of a result.

    Attributes:
        reason: how the worker died, in words.
    """

    reason: str


class ExecutorError(ConfigError):
    """Trials cannot be run as SEARCH.EXECUTOR asks; the message says why."""


class Executor(ABC):
    """Runs trials: an `InlineExecutor`, `LocalExecutor` or `RayExecutor`.

    To be closed after use, or used in a ``with`` block.
    """

    @abstractmethod
    def run(self, jobs: Iterable[TrialJob]) -> Iterator[tuple[TrialJob, TrialResult | WorkerLost]]:
        """Run jobs, and yield each with its outcome as soon as it ends.

        A job is taken from `jobs` only when a worker is free for it. There can be one run at a
        time; closing the iterator early ends the trials that are running.

        Raises:
            ExecutorError: the task raised in a worker, or workers keep dying.
        """

    @abstractmethod
    def close(self) -> None:
        """End the workers and the trials that they run."""

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class InlineExecutor(Executor):
    """Runs trials in this process, one after the other. Exceptions of `task` propagate."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def run(self, jobs: Iterable[TrialJob]) -> Iterator[tuple[TrialJob, TrialResult | WorkerLost]]:
        self.task.open()
        for job in jobs:
            yield job, self.task.run(job)

    def close(self) -> None:
        pass
