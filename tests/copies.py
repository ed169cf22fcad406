"""Watching what travels between devices, on a GPU that need not be there."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Copies(TorchDispatchMode):
    """Records what is copied between devices, and whether the host waits for it."""

    def __init__(self):
        super().__init__()
        self.waiting, self.all = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[func is torch.ops.aten.copy_.default]
            if source.device != result.device:
                self.all += 1
                asked = kwargs.get("non_blocking") or True in args[2:]
                # Memory that is not pinned is copied in the host's own time all the same.
                if not asked or (source.device.type == "cpu" and not hasattr(source, "pinned")):
                    self.waiting.append((source.device, result.device, list(source.shape)))
        return result


def pin(x):
    x = x.clone()
    x.pinned = True
    return x
