"""The executor that runs trials on a Ray cluster."""

from __future__ import annotations

import logging
import math
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...config import ConfigError
from ...engine.distributed import available_cores
from ..records import DeviceLost, TrialJob, TrialResult
from .base import ExecutorError, Task, WorkerLost
from .pool import Message, Pool, Ready, TaskError, Worker

logger = logging.getLogger(__name__)

START_WARNING_PERIOD = 60.0
"""Seconds between warnings that no worker has started."""


@dataclass(eq=False)
class _Actor(Worker):
    handle: Any = None
    answer: Any = None


class RayExecutor(Pool):
    """Runs trials on the Ray cluster at RAY_ADDRESS, or else on one made of this machine's cores.

    Each worker is an actor with a fixed share of the cluster. If one is lost, perhaps with its
    machine, another is started wherever there is room. ``nasfcos`` must be installed on all
    machines.

    Args:
        task: task that the workers run; pickled for them.
        workers: number of workers, among which all CPUs (and GPUs) are shared out. 0: one per GPU
            of the cluster, or one per CPU if it has no GPUs. Machines that join the cluster are
            used from the next batch on.
        use_gpus: whether to use the GPUs of the cluster.
        folders: directories that the task reads; each worker checks that it finds them.
        timeout: seconds that a trial may take.

    Raises:
        ConfigError: Ray is not installed.
        ExecutorError: no cluster answers at RAY_ADDRESS.
    """

    def __init__(
        self,
        task: Task,
        workers: int = 0,
        use_gpus: bool = True,
        folders: Sequence[Path] = (),
        timeout: float = math.inf,
    ) -> None:
        # Ray installs a SIGTERM handler that exits; how the search ends is not for Ray to decide.
        with _signal_handlers_kept():
            self._ray = _import_ray()
            self._is_ours = not self._ray.is_initialized()
            if self._is_ours:
                _connect(self._ray, use_gpus)
        self._asked, self._use_gpus = workers, use_gpus
        self._task = pickle.dumps(task)
        self._folders = [str(Path(folder).resolve()) for folder in folders]
        super().__init__(self._share_out()[0], timeout)
        self._start_missing()

    def run(self, jobs: Iterable[TrialJob]) -> Iterator[tuple[TrialJob, TrialResult | WorkerLost]]:
        self._count = self._share_out()[0]
        yield from super().run(jobs)

    def close(self) -> None:
        super().close()
        if self._is_ours:
            self._ray.shutdown()

    def _share_out(self) -> tuple[int, float, float]:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return share_out(
            [int(node.get("CPU", 0)) for node in nodes],
            [int(node.get("GPU", 0)) if self._use_gpus else 0 for node in nodes],
            self._asked,
        )

    def _start(self, place: int) -> _Actor:
        _, cpus, gpus = self._share_out()
        remote = self._ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)(
            _RemoteWorker
        )
        handle = remote.remote()
        threads = max(1, int(cpus))
        answer = handle.start.remote(self._task, threads, self._folders)
        return _Actor(place, handle=handle, answer=answer)

    def _give(self, worker: _Actor, job: TrialJob) -> None:
        worker.answer = worker.handle.run.remote(job)

    def _receive(self, seconds: float) -> list[tuple[_Actor, Message]]:
        errors = self._ray.exceptions
        waiting = {w.answer: w for w in self._workers.values() if w.answer is not None}
        self._ray.wait(list(waiting), num_returns=1, timeout=min(seconds, START_WARNING_PERIOD))
        # `wait` gave one answer at most; any other may be there as well.
        answers, _ = self._ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        if not answers and not any(worker.ready for worker in self._workers.values()):
            _, cpus, gpus = self._share_out()
            logger.warning(
                "no worker has started on the cluster yet: one needs %g CPUs and %g GPUs, and free "
                "are %s; each then opens the caches",
                cpus, gpus, self._ray.available_resources(),
            )  # fmt: skip
        messages: list[tuple[_Actor, Message]] = []
        for answer in answers:
            worker = waiting[answer]
            worker.answer = None
            try:
                result = self._ray.get(answer)
            except errors.RayTaskError as error:
                ours = isinstance(error.cause, ConfigError)
                messages.append((worker, TaskError(str(error.cause if ours else error))))
            except errors.RayError as error:
                messages.append((worker, WorkerLost(_one_line(error))))
            else:
                messages.append((worker, Ready() if worker.job is None else result))
        return messages

    def _end(self, worker: _Actor) -> None:
        self._ray.kill(worker.handle)


class _RemoteWorker:
    """The class of the actors."""

    def start(self, task: bytes, threads: int, folders: Sequence[str]) -> None:
        torch.set_num_threads(threads)
        missing = [folder for folder in folders if not Path(folder).is_dir()]
        if missing:
            raise ExecutorError(
                f"the machine {socket.gethostname()} does not have {', '.join(missing)}; with "
                "SEARCH.EXECUTOR ray all machines must find the caches at the same path: name "
                "a folder on shared storage by SEARCH.CACHE.FOLDER"
            )
        self.task = pickle.loads(task)
        self.task.open()

    def run(self, job: TrialJob) -> TrialResult:
        try:
            return self.task.run(job)
        except DeviceLost as error:
            sys.exit(f"worker: {error}")


def share_out(
    cpus: Sequence[int], gpus: Sequence[int], workers: int = 0
) -> tuple[int, float, float]:
    """Divide a cluster among workers.

    Args:
        cpus, gpus: number of CPUs and GPUs of each machine.
        workers: number of workers; 0: one per GPU, or one per CPU if there are no GPUs.

    Returns:
        The number of workers, and the number of CPUs and GPUs of each: the largest with which all
        of them can run at the same time, a fraction of one if there are more workers than devices.
    """
    per_gpu = math.ceil(workers / sum(gpus)) if workers and sum(gpus) else 1
    workers = workers or sum(gpus) or sum(cpus) or 1
    gpu = 1 / per_gpu if sum(gpus) else 0.0
    for cpu in range(max(cpus, default=0), 0, -1):
        room = sum(
            min(c // cpu, g * per_gpu if sum(gpus) else c) for c, g in zip(cpus, gpus, strict=True)
        )
        if room >= workers:
            return workers, float(cpu), gpu
    # A worker with a GPU can only use the CPUs of that machine.
    if sum(gpus):
        shares = [c / (g * per_gpu) for c, g in zip(cpus, gpus, strict=True) if g]
        return workers, math.floor(100 * min(shares)) / 100, gpu
    return workers, math.floor(100 * sum(cpus) / workers) / 100, gpu


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "SEARCH.EXECUTOR ray needs Ray, which is not installed: pip install 'nasfcos[ray]'"
        ) from error
    return ray


def _connect(ray: Any, use_gpus: bool) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ExecutorError(f"no Ray cluster at RAY_ADDRESS {address}: {error}") from error
        return
    ray.init(
        address="local",
        num_cpus=available_cores(),
        num_gpus=None if use_gpus else 0,
        include_dashboard=False,
        object_store_memory=2**27,  # bytes; jobs and results are small
        **quiet,
    )


def _one_line(error: Exception) -> str:
    """The message of a Ray error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Restore the handlers of SIGTERM and SIGINT at the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
