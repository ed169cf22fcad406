"""Where trials run: in this process, in worker processes of this machine, or on a Ray cluster.

An executor computes ``task.run(job)`` and nothing else: what is proposed, recorded and learnt is
the business of the one main process. So a worker holds nothing that could be lost with it but the
trial it is at, and that one is reported as lost, to be tried again.

A task answers for the trouble of its trials by results that say so. What it raises is trouble of
the whole search (a cache that is gone, a mistake in the code), and ends it.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import pickle
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import torch
from yacs.config import CfgNode

from ..config import ConfigError
from ..engine.distributed import available_cores
from ..engine.metrics import format_duration
from .records import DeviceLost, TrialJob, TrialResult
from .status import SILENT

logger = logging.getLogger(__name__)

# Workers that may die in a row while they start, or with no trial finished in between.
MAX_START_FAILURES = 3
MAX_DEATHS = 12

# Seconds between warnings that a cluster gives no room to any worker.
PATIENCE = 60.0


class Task(Protocol):
    """What an executor runs; picklable."""

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
        for job in jobs:
            yield job, self.task.run(job)

    def close(self) -> None:
        pass


def build_executor(cfg: CfgNode, task: Task) -> Executor:
    """The executor of SEARCH.EXECUTOR with SEARCH.WORKERS workers.

    A task for "ray" has the attributes `train` and `val`, its cache folders: they must be found
    on all machines. Unless MODEL.DEVICE is the CPU, GPUs are shared out; the task should then ask
    for "cuda" (or "auto"): a worker sees one GPU only.

    Raises:
        ConfigError: MODEL.DEVICE names a single GPU.
    """
    name, workers = cfg.SEARCH.EXECUTOR, cfg.SEARCH.WORKERS
    timeout = cfg.SEARCH.TRIAL_TIMEOUT or math.inf
    use_gpus = cfg.MODEL.DEVICE != "cpu"
    if name == "inline":
        return InlineExecutor(task)
    if use_gpus and cfg.MODEL.DEVICE not in ("auto", "cuda"):
        raise ConfigError(
            f"MODEL.DEVICE {cfg.MODEL.DEVICE} is one GPU, but SEARCH.EXECUTOR {name} shares the "
            "GPUs out: set it to auto, and choose GPUs by CUDA_VISIBLE_DEVICES"
        )
    if name == "local":
        return LocalExecutor(task, workers, visible_gpus() if use_gpus else (), timeout)
    return RayExecutor(task, workers, use_gpus, (task.train, task.val), timeout)


def visible_gpus() -> tuple[str, ...]:
    """The GPUs of this machine that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    names = [str(i) for i in range(count)] if chosen is None else chosen.split(",")
    return tuple(name.strip() for name in names[:count])


# -------------------------------------------------------------------------------------- workers
@dataclass(eq=False)
class _Worker:
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


class _Pool(Executor):
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
    def _start(self, place: int) -> _Worker:
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

    def _remove(self, worker: _Worker) -> None:
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
        self, worker: _Worker, kind: str, content: Any
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
                    "SEARCH.EXECUTOR inline runs trials in this process and may show more"
                )
        return None if job is None else (job, WorkerLost(content))

    def _too_many_deaths(self) -> bool:
        """Whether something else must be to blame than a few trials that kill their worker each
        time: these are tried again after all others, and so die in a row."""
        deaths, limit = len(self._deaths), max(MAX_DEATHS, 2 * self._count)
        most_differ = 2 * len(set(self._deaths)) > deaths
        return deaths >= (limit if most_differ else 3 * limit)


# ------------------------------------------------------------------------------ local processes
@dataclass(eq=False)
class _Process(_Worker):
    process: Any = None
    pipe: Any = None


class LocalExecutor(_Pool):
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
                "no worker has had anything to tell for %s: %s. Should one hang, kill its process; "
                "its trial is tried again. SEARCH.TRIAL_TIMEOUT does so by itself",
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
        worker.process.join()
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
        run = pickle.loads(task).run
        _send(pipe, ("ready", None))
        while True:
            _send(pipe, ("result", run(jobs.get())))
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


# ------------------------------------------------------------------------------------------ Ray
@dataclass(eq=False)
class _Actor(_Worker):
    handle: Any = None
    answer: Any = None


class RayExecutor(_Pool):
    """Runs trials on a Ray cluster: that of RAY_ADDRESS, or one of this machine's cores alone.

    Each worker is an actor with a fixed share of the cluster. When one is lost, with its machine
    perhaps, another is started wherever there is room. ``nasfcos`` must be installed on all
    machines.

    Args:
        task: what runs; pickled for the workers.
        workers: how many; they share out all CPUs (and GPUs). 0: one for each GPU of the cluster,
            or where there is none, for each CPU; a cluster that grows is used from the next
            batch on.
        use_gpus: whether to take GPUs where the cluster has some.
        folders: that the task reads; each worker makes sure that it has them.
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
        # Ray takes SIGTERM for itself, and exits; how a search ends is not Ray's to say.
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

    def _news(self, seconds: float) -> list[tuple[_Actor, str, Any]]:
        errors = self._ray.exceptions
        waiting = {w.answer: w for w in self._workers.values() if w.answer is not None}
        answers, _ = self._ray.wait(list(waiting), num_returns=1, timeout=min(seconds, PATIENCE))
        if not answers and not any(worker.ready for worker in self._workers.values()):
            _, cpus, gpus = self._share_out()
            logger.warning(
                "the cluster has no room for any worker yet: one needs %g CPUs and %g GPUs, and "
                "free are %s",
                cpus, gpus, self._ray.available_resources(),
            )  # fmt: skip
        news = []
        for answer in answers:
            worker = waiting[answer]
            worker.answer = None
            try:
                content = self._ray.get(answer)
            except errors.RayTaskError as error:
                ours = isinstance(error.cause, ExecutorError)
                news.append((worker, "error", str(error.cause if ours else error)))
            except errors.RayError as error:
                news.append((worker, "lost", _how_ray_tells(error)))
            else:
                news.append((worker, "result" if worker.job is not None else "ready", content))
        return news

    def _end(self, worker: _Actor) -> None:
        self._ray.kill(worker.handle)


class _RemoteWorker:
    """The actor."""

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
        cpus, gpus: of each machine.
        workers: how many; 0: one for each GPU, or where there is none, for each CPU.

    Returns:
        The number of workers, and the CPUs and GPUs of each: as many as let all of them run at
        the same time, a part of one where the workers are too many.
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
    # Workers with a GPU find no CPU but those of its machine.
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
        object_store_memory=2**27,  # jobs and results are small
        **quiet,
    )


def _how_ray_tells(error: Exception) -> str:
    """What a Ray error says, on a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
