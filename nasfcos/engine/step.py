"""One training step: gradients of a batch, and what the optimizer does with them."""

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
    """Add the gradients of a process's share of a step, computed in `parts` of equal size.

    Each part normalises its losses by itself, as each process does; the step takes the mean over
    parts and processes. So P processes in K parts give the gradients of one process in P * K.

    Returns:
        The loss terms, mean over the parts, without graph.
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
    """Take a step along the gradients, clipped to a norm of `clip_norm` unless that is 0."""
    if clip_norm > 0:
        scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, clip_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
