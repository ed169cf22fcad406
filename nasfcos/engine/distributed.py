"""Several processes, one per GPU or share of the CPU cores: starting, talking, ending.

The launcher (torchrun or ``python -m torch.distributed.launch``) describes the job in environment
variables. In a job of one process every function here does what it says without communicating.
Tensors on GPUs travel by NCCL; tensors on the CPU, and Python objects, by gloo.
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

# A process waits this long for the others: longer than one of them may take for the evaluation of
# a large data set, so that only a process that is gone lets the others give up.
TIMEOUT = timedelta(minutes=30)

# The group of the last session. After an error, DistributedDataParallel would be the last to let go
# of it, and does so holding the lock of Python's interpreter that the group's threads may still
# need to end: both then wait for ever (seen with gloo, in a process that had to end at once).
_group: dist.ProcessGroup | None = None


def rank() -> int:
    """This process's number in the whole job, from 0. Process 0 writes files and the log."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes in the job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process's number on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Number of the job's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def resolve_device(name: str) -> torch.device:
    """The device of this process for MODEL.DEVICE `name`.

    "auto" and "cuda" give each process of a machine its own GPU.

    Raises:
        ConfigError: there is no such device, or fewer GPUs than processes on this machine.
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
    """Join the job that the launcher describes, if any; gives this process's device.

    The processes leave together when the block ends. When it ends by an exception this process
    leaves alone: the launcher ends the others, or their connection to this one breaks.
    """
    device = resolve_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif local_world_size() > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        # Launchers give each process one thread if nobody has said how many; share out the cores.
        torch.set_num_threads(max(1, available_cores() // local_world_size()))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
        global _group
        _group = dist.group.WORLD
    try:
        yield device
    except BaseException:
        # Peers may be in the middle of a collective: nothing to be waited for.
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
    """Wait until every process is here."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))


def mean(tensor: Tensor) -> Tensor:
    """The mean over all processes, on the tensor's device; NaN and infinity in one come through."""
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
    """Whether `error` only tells that the connection to another process broke."""
    text = str(error)
    return any(words in text for words in ("closed by peer", "reset by peer", "Broken pipe"))


def parallel(model: nn.Module) -> nn.Module:
    """The model, whose gradients are from now on the means over the processes of a job.

    All start with the parameters and buffers of process 0. Buffers are not sent again before each
    step: in training, batch norms do not read their statistics (see `broadcast_buffers`).
    """
    if world_size() == 1:
        return model
    model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    # Not by the argument, which would leave them out at the start as well.
    model.broadcast_buffers = False
    return model


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process the buffers of process 0 (the running statistics of batch norms).

    In training steps each process moves its own away from them; this makes what is evaluated, on
    any process, what is saved.
    """
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


@contextmanager
def first_on_machine() -> Iterator[None]:
    """Let one process of each machine through the block before the others (it fills the cache)."""
    if local_rank() != 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()
