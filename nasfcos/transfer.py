"""Copies of tensors between devices, without unnecessary waiting."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; the host does not wait for a GPU."""
    # Not while exporting: there the tensor is a constant, and pinning is not supported.
    if device.type == "cuda" and x.device.type == "cpu" and not torch.compiler.is_compiling():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def free_gpu_memory() -> None:
    """Release the unused GPU memory that PyTorch caches, so that other processes can use it."""
    gc.collect()
    torch.cuda.empty_cache()


def to_cpu(results: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Copy the results of each image to the CPU; the host waits for a GPU once, not per tensor."""
    copies = [
        {name: x.to("cpu", non_blocking=True) for name, x in result.items()} for result in results
    ]
    devices = {x.device for result in results for x in result.values() if x.is_cuda}
    if not devices:
        return copies
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    # Non-blocking copies are in pinned memory, which is too precious to keep.
    return [{name: x.clone() for name, x in copy.items()} for copy in copies]
