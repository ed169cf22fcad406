"""Jobs of several processes, one per GPU or share of the CPU cores.

The launcher (torchrun or ``python -m torch.distributed.launch``) describes the job in environment
variables. In a job of one process, all functions here work without communication. Tensors on GPUs
are sent by NCCL; tensors on the CPU and Python objects by gloo.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..config import ConfigError

logger = logging.getLogger(__name__)

# How long a process waits for the others. It is longer than one of them may take to evaluate a
# large data set, so that the others give up only when a process is gone.
TIMEOUT = timedelta(minutes=30)

# Keeps the process group of the last session alive. Otherwise, after an error, the destructor of
# DistributedDataParallel would destroy it while holding the GIL, which the group's threads may need
# to end: a deadlock (seen with gloo, in a process that had to end at once).
_group: dist.ProcessGroup | None = None


def rank() -> int:
    """Number of this process in the job, from 0. Process 0 writes files and the log."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes in the job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Number of processes of the job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def resolve_device(name: str) -> torch.device:
    """The device of this process for a value of MODEL.DEVICE.

    "auto" and "cuda" give each process on a machine a GPU of its own.

    Raises:
        ConfigError: the device does not exist, or the machine has fewer GPUs than processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"MODEL.DEVICE {name!r} is not among auto, cpu, cuda and cuda:N")
    if device.type == "cpu":
        return device
    gpus = torch.cuda.device_count()
    index = local_rank() if device.index is None else device.index
    if local_world_size() > 1 and device.index is not None:
        raise ConfigError(
            f"MODEL.DEVICE {name!r} would put {local_world_size()} processes on one GPU; "
            "use auto or cuda, and choose the GPUs by CUDA_VISIBLE_DEVICES"
        )
    if index >= gpus:
        raise ConfigError(
            f"MODEL.DEVICE {name!r}: this process needs GPU {index}, but there are {gpus}; "
            "start fewer processes or set MODEL.DEVICE cpu"
        )
    return torch.device("cuda", index)


@contextmanager
def session(device_name: str) -> Iterator[torch.device]:
    """Join the job that the launcher describes, if there is one, within the block.

    At the end of the block the processes wait for each other. If the block raises, this process
    leaves alone: the launcher ends the others, or their connection to it breaks.

    Yields:
        The device of this process.
    """
    device = resolve_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif local_world_size() > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        # By default, launchers give each process one thread; divide the cores instead.
        torch.set_num_threads(max(1, available_cores() // local_world_size()))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
        global _group
        _group = dist.group.WORLD
    try:
        yield device
    except BaseException:
        # The other processes may be in the middle of a collective: do not wait for them.
        if dist.is_initialized() and device.type != "cuda":
            dist.destroy_process_group()
        raise
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def available_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def barrier() -> None:
    """Wait until every process has called this."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))


def mean(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all processes; NaN and infinity in one of them are kept."""
    if world_size() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total / world_size()


def all_gather(item: Any) -> list[Any]:
    """The `item` of every process, in order of rank, on every process."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def gather(item: Any) -> list[Any] | None:
    """The `item` of every process, in order of rank, on process 0; None on the others."""
    if world_size() == 1:
        return [item]
    items = [None] * world_size() if rank() == 0 else None
    dist.gather_object(item, items)
    return items


def broadcast(item: Any) -> Any:
    """The `item` of process 0, on every process."""
    if world_size() == 1:
        return item
    items = [item]
    dist.broadcast_object_list(items, src=0)
    return items[0]


def is_lost_peer(error: Exception) -> bool:
    """Whether `error` only says that the connection to another process broke."""
    text = str(error)
    return any(words in text for words in ("closed by peer", "reset by peer", "Broken pipe"))


def parallel(model: nn.Module) -> nn.Module:
    """Wrap a model such that its gradients are means over all processes.

    All processes start with the parameters and buffers of process 0. Buffers are not synchronised
    before each step, since batch norms do not read their running statistics in training (see
    `broadcast_buffers`).
    """
    if world_size() == 1:
        return model
    model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    # The argument of the constructor would also skip the synchronisation at the start.
    model.broadcast_buffers = False
    return model


def broadcast_buffers(model: nn.Module) -> None:
    """Copy the buffers of process 0 (running statistics of batch norms) to all processes.

    They drift apart during training; afterwards every process evaluates the model that is saved.
    """
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


@contextmanager
def first_on_machine() -> Iterator[None]:
    """Let one process per machine run the block before the others, for instance to fill a cache."""
    if local_rank() != 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()
