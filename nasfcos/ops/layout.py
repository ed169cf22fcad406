"""Memory format and data type of the operators' results."""

import torch
from torch import Tensor


def memory_format(maps: Tensor) -> torch.memory_format:
    """The memory format of maps [N, C, H, W], which may be a slice of the channels of other maps.
    The operators' results have the format of their input."""
    last = maps.shape[1] > 1 and maps.stride(1) == 1 and not maps.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def empty_like(maps: Tensor) -> Tensor:
    """An uninitialised tensor with the shape, dtype and `memory_format` of maps [N, C, H, W]."""
    return torch.empty_like(maps, memory_format=memory_format(maps))


def cpu_dtype(maps: Tensor) -> torch.dtype:
    """The dtype in which the CPU computes on these maps: it has no kernels for float16."""
    return torch.float32 if maps.dtype == torch.float16 else maps.dtype
