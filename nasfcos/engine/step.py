"""One training step: the gradients of a batch, and the update of the optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


def forward_backward(
    model: nn.Module,
    images: Sequence[Tensor],
    targets: Sequence[dict[str, Any]],
    scaler: torch.amp.GradScaler,
    parts: int = 1,
    amp: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Accumulate the gradients of this process's images, in `parts` of equal size.

    Each part normalises its own losses, as each process does, and the step uses the mean over parts
    and processes. So P processes with K parts give the same gradients as one process with P * K.

    Args:
        model: the detector, or its `DistributedDataParallel` wrapper.
        images: this process's images, [3, H, W] each.
        targets: their targets.
        scaler: loss scaler for fp16; disabled otherwise.
        parts: number of gradient-accumulation steps; divides the number of images.
        amp: data type of mixed precision; None: off.

    Returns:
        The mean of each loss term over the parts, detached.
    """
    size = len(images) // parts
    means: dict[str, Tensor] = {}
    for part in range(parts):
        these = slice(part * size, (part + 1) * size)
        waits = isinstance(model, DistributedDataParallel) and part < parts - 1
        with model.no_sync() if waits else contextlib.nullcontext():
            with torch.autocast(images[0].device.type, dtype=amp, enabled=amp is not None):
                losses = model(images[these], targets[these])
            scaler.scale(sum(losses.values()) / parts).backward()
        for name, value in losses.items():
            means[name] = means.get(name, 0) + value.detach().float() / parts
    return means


def update(optimizer: Optimizer, scaler: torch.amp.GradScaler, clip_norm: float = 0.0) -> None:
    """Clip the gradients to a norm of `clip_norm` (0: no clipping), step, and clear them."""
    if clip_norm > 0:
        scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, clip_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
