"""Builds the executor that a config asks for."""

from __future__ import annotations

import math
import os

import torch
from yacs.config import CfgNode

from ...config import ConfigError
from .base import Executor, InlineExecutor, Task
from .cluster import RayExecutor
from .local import LocalExecutor


def build_executor(cfg: CfgNode, task: Task) -> Executor:
    """The executor of SEARCH.EXECUTOR with SEARCH.WORKERS workers.

    Unless MODEL.DEVICE is the CPU, the GPUs are shared out among the workers. Each of them sees one
    GPU only, so the task should ask for "cuda" or "auto". For "ray", all machines must find the
    task's cache directories at the same paths.

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
