"""Where trials run: in this process, in worker processes of this machine, or on a Ray cluster.

An executor computes ``task.run(job)`` and nothing else: what is proposed, recorded and learnt is
the business of the one main process. So a worker holds nothing that could be lost with it but the
trial it is at, and that one is reported as lost, to be tried again.

A task answers for the trouble of its trials by results that say so. What it raises is trouble of
the whole search (a cache that is gone, a mistake in the code), and ends it.
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
