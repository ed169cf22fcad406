"""Measurement of the memory that a call needs."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_HIGH_WATER = "5"

RESOLUTION = 2**18
"""Bytes below which `peak_bytes` is not reliable: the kernel counts pages in batches."""


def bytes_in_use(device: torch.device) -> int | None:
    """Bytes of memory in use.

    On CUDA, the tensors allocated by PyTorch. On the CPU, the resident memory of the process, after
    the allocator has returned freed memory to the system; None if the system does not tell (only
    Linux with glibc does).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return _status_bytes("VmRSS")
    except OSError:
        return None


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Peak memory in use (see `bytes_in_use`) during `call()` minus the memory in use before it.

    Since the allocator returns freed memory first, everything that the call needs makes the process
    grow, and the kernel's high-water mark tells by how much. None if the system does not tell.
    """
    before = bytes_in_use(device)
    if before is None:
        return None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    try:
        _CLEAR_REFS.write_text(_RESET_HIGH_WATER)
    except OSError:
        return None
    result = call()
    peak = _status_bytes("VmHWM")
    del result
    return max(0, peak - before)


def tensor_bytes(module: nn.Module, optimizer: Optimizer | None = None) -> int:
    """Bytes of a module's parameters and buffers and of its optimizer's state."""
    tensors = [*module.parameters(), *module.buffers()]
    if optimizer is not None:
        tensors += [
            value
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
    return storage_bytes(tensors)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors; a shared storage counts once."""
    sizes = {}
    for x in tensors:
        if x.layout == torch.strided:
            storage = x.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        else:
            sizes[id(x)] = x.numel() * x.element_size()
    return sum(sizes.values())


def _status_bytes(key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{_STATUS} has no {key}")
    return 1024 * int(match[1])
