"""Executors run trials: in this process, in worker processes of this machine, or on a Ray cluster.

An executor computes ``task.run(job)`` and nothing else; proposing, recording and learning are left
to the one main process. So all that can be lost with a worker is the trial that it runs, which is
reported as lost and can be requeued.

A task turns the failure of a trial into a result with the status "failed". What it raises concerns
the whole search (a missing cache, a mistake in the code), and ends it.
"""

from .base import Executor, ExecutorError, InlineExecutor, Task, WorkerLost
from .build import build_executor, visible_gpus
from .cluster import RayExecutor, share_out
from .local import LocalExecutor

__all__ = [
    "Executor",
    "ExecutorError",
    "InlineExecutor",
    "LocalExecutor",
    "RayExecutor",
    "Task",
    "WorkerLost",
    "build_executor",
    "share_out",
    "visible_gpus",
]
