"""The executor that runs trials in worker processes of this machine."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from ...engine.distributed import available_cores
from ...engine.metrics import format_duration
from ..records import DeviceLost, TrialJob
from .base import Task, WorkerLost
from .pool import Message, Pool, Ready, TaskError, Worker

logger = logging.getLogger(__name__)

END_WAIT = 10.0
"""Seconds that a killed process may take to be gone."""

SILENT = 15 * 60
"""Seconds without a message from any worker after which a warning is logged."""


@dataclass(eq=False)
class _Process(Worker):
    process: Any = None
    pipe: Any = None


class LocalExecutor(Pool):
    """Runs trials in worker processes of this machine.

    The CPU cores are divided among the workers, the GPUs assigned to them in turn. A worker that
    dies is replaced. If the main process is gone, its workers end at once, even within a trial.

    Args:
        task: task that the workers run; pickled for them.
        workers: number of workers. 0: one per GPU, or one per core without GPUs.
        gpus: names of the GPUs, as in CUDA_VISIBLE_DEVICES.
        timeout: seconds that a trial may take.
    """

    def __init__(
        self,
        task: Task,
        workers: int = 0,
        gpus: Sequence[str] = (),
        timeout: float = math.inf,
    ) -> None:
        super().__init__(workers or len(gpus) or available_cores(), timeout)
        self._gpus = tuple(gpus)
        self._task = pickle.dumps(task)
        self._threads = max(1, available_cores() // self._count)
        # Starting it unblocks SIGINT, so it must not happen within `_start`, which blocks SIGINT.
        resource_tracker.ensure_running()
        self._start_missing()

    def _start(self, place: int) -> _Process:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_work,
            args=(theirs, self._task, self._threads),
            name=f"trial worker {place}",
            daemon=True,
        )
        environment = {"OMP_NUM_THREADS": str(self._threads)}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[place % len(self._gpus)]
        # Libraries read the environment when they are imported, before `_work` begins.
        with _environment(environment), _no_interrupt():
            process.start()
        theirs.close()
        return _Process(place, process=process, pipe=ours)

    def _give(self, worker: _Process, job: TrialJob) -> None:
        _send(worker.pipe, job)

    def _receive(self, seconds: float) -> list[tuple[_Process, Message]]:
        workers = {worker.pipe: worker for worker in self._workers.values()}
        ready = wait(list(workers), timeout=min(seconds, SILENT))
        if not ready and seconds > SILENT:
            logger.warning(
                "no worker has had anything to tell for %s: %s. Should one hang, kill its process: "
                "its trial is tried again. SEARCH.TRIAL_TIMEOUT, where it is set, does so",
                format_duration(SILENT),
                ", ".join(map(_whereabouts, self._workers.values())),
            )
        messages: list[tuple[_Process, Message]] = []
        for pipe in ready:
            worker = workers[pipe]
            try:
                messages.append((worker, pipe.recv()))
            except (EOFError, OSError):
                worker.process.join(timeout=5)
                messages.append((worker, WorkerLost(_how_it_ended(worker.process.exitcode))))
        return messages

    def _end(self, worker: _Process) -> None:
        worker.process.kill()
        worker.process.join(timeout=END_WAIT)
        if worker.process.is_alive():  # stuck in a driver or in a network file system
            logger.warning("process %d cannot be killed at the moment", worker.process.pid)
        worker.pipe.close()


def _whereabouts(worker: _Process) -> str:
    """What a worker does, and its process id, for the log."""
    idle = "idle" if worker.ready else "starting"
    what = idle if worker.job is None else f"trial {worker.job.index}"
    return f"{what} in process {worker.process.pid}"


def _work(pipe: Connection, task: bytes, threads: int) -> None:
    """The main function of a worker process, which sends a `Message` for each event."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    jobs: queue.SimpleQueue[TrialJob] = queue.SimpleQueue()
    threading.Thread(target=_receive_jobs, args=(pipe, jobs), daemon=True).start()
    try:
        torch.set_num_threads(threads)
        ready_task = pickle.loads(task)
        ready_task.open()
        _send(pipe, Ready())
        while True:
            _send(pipe, ready_task.run(jobs.get()))
    except DeviceLost as error:
        sys.exit(f"worker: {error}")  # a new worker replaces this one
    except Exception:
        _send(pipe, TaskError(traceback.format_exc()))


def _receive_jobs(pipe: Connection, jobs: queue.SimpleQueue[TrialJob]) -> None:
    """Queue the jobs of the main process; when that is gone, end this process, even in a trial."""
    while True:
        try:
            jobs.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(1)


def _send(pipe: Connection, message: object) -> None:
    """Send unless the other end is gone; who waits for a message there notices by itself."""
    try:
        pipe.send(message)
    except (BrokenPipeError, ConnectionResetError):
        pass


def _how_it_ended(code: int | None) -> str:
    """The exit code of a process in words; None: it has not ended."""
    if code is None:
        return "it closed its connection"
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (by the system, when memory runs out)" if name == "SIGKILL" else ""
    return f"killed by {name}{hint}"


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables within the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Block SIGINT: processes started in the block never receive it, this one does at its end."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
