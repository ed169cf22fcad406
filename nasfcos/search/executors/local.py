"""Trials in worker processes of this machine."""

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
from ..status import SILENT
from .base import Task
from .pool import Pool, Worker

logger = logging.getLogger(__name__)

# Seconds for a process that was killed to be gone.
END_WAIT = 10.0


@dataclass(eq=False)
class _Process(Worker):
    process: Any = None
    pipe: Any = None


class LocalExecutor(Pool):
    """Runs trials in worker processes of this machine.

    The CPU cores are divided among the workers, GPUs given to them in turn. A worker that dies is
    replaced; workers of a main process that is gone end within moments, whatever they are at.

    Args:
        task: what runs; pickled for the workers.
        workers: how many. 0: one for each GPU, or where there is none, for each core.
        gpus: as CUDA_VISIBLE_DEVICES names them.
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
        # When it starts it lets SIGINT through again, which `_start` keeps from the workers.
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
        # Libraries read the environment when they are loaded, before a worker's own first line.
        with _environment(environment), _no_interrupt():
            process.start()
        theirs.close()
        return _Process(place, process=process, pipe=ours)

    def _give(self, worker: _Process, job: TrialJob) -> None:
        _send(worker.pipe, job)

    def _news(self, seconds: float) -> list[tuple[_Process, str, Any]]:
        workers = {worker.pipe: worker for worker in self._workers.values()}
        ready = wait(list(workers), timeout=min(seconds, SILENT))
        if not ready and seconds > SILENT:
            logger.warning(
                "no worker has had anything to tell for %s: %s. Should one hang, kill its process: "
                "its trial is tried again. SEARCH.TRIAL_TIMEOUT, where it is set, does so",
                format_duration(SILENT),
                ", ".join(map(_whereabouts, self._workers.values())),
            )
        news = []
        for pipe in ready:
            try:
                news.append((workers[pipe], *pipe.recv()))
            except (EOFError, OSError):
                process = workers[pipe].process
                process.join(timeout=5)
                news.append((workers[pipe], "lost", _how_it_ended(process.exitcode)))
        return news

    def _end(self, worker: _Process) -> None:
        worker.process.kill()
        worker.process.join(timeout=END_WAIT)
        if worker.process.is_alive():  # inside a driver, or at a file of a server that is gone
            logger.warning("process %d cannot be killed at the moment", worker.process.pid)
        worker.pipe.close()


def _whereabouts(worker: _Process) -> str:
    idle = "idle" if worker.ready else "starting"
    what = idle if worker.job is None else f"trial {worker.job.index}"
    return f"{what} in process {worker.process.pid}"


def _work(pipe: Connection, task: bytes, threads: int) -> None:
    """The main function of a worker process.

    Tells ("ready", None) when it has started, ("result", result) of each job, and ("error", text)
    when the task raises.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    jobs: queue.SimpleQueue[TrialJob] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, jobs), daemon=True).start()
    try:
        torch.set_num_threads(threads)
        ready_task = pickle.loads(task)
        ready_task.open()
        _send(pipe, ("ready", None))
        while True:
            _send(pipe, ("result", ready_task.run(jobs.get())))
    except DeviceLost as error:
        sys.exit(f"worker: {error}")  # a new one takes its place
    except Exception:
        _send(pipe, ("error", traceback.format_exc()))


def _receive(pipe: Connection, jobs: queue.SimpleQueue[TrialJob]) -> None:
    """Take jobs from the main process; end this one, in the middle of a trial, when it is gone."""
    while True:
        try:
            jobs.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(1)


def _send(pipe: Connection, message: object) -> None:
    """Send, or not: who waits on the other end sees that it is closed."""
    try:
        pipe.send(message)
    except (BrokenPipeError, ConnectionResetError):
        pass


def _how_it_ended(code: int | None) -> str:
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
    """Processes started in the block do not receive SIGINT; this one receives it after it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
