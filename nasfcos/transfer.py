"""Tensors on their way to a device and back."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on another device; the host does not wait for a GPU."""
    # In a graph that is being exported, it is a constant, and pinning is unknown there.
    if device.type == "cuda" and x.device.type == "cpu" and not torch.compiler.is_compiling():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def free_gpu_memory() -> None:
    """Give back what PyTorch keeps of the GPUs for later use: it then counts as free, and other
    processes may have it."""
    gc.collect()
    torch.cuda.empty_cache()


def to_cpu(results: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Each image's results on the CPU; the host waits for a GPU once, not for every tensor."""
    copies = [
        {name: x.to("cpu", non_blocking=True) for name, x in result.items()} for result in results
    ]
    devices = {x.device for result in results for x in result.values() if x.is_cuda}
    if not devices:
        return copies
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    # What arrives without waiting is in pinned memory, which is dear to keep.
    return [{name: x.clone() for name, x in copy.items()} for copy in copies]
