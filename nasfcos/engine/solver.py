"""The optimizer and the learning-rate schedule: building them, and restoring a checkpoint's.

The defaults of SOLVER are those of the published ResNet-50 models (paper, section 4).
"""

from __future__ import annotations

import itertools
import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from yacs.config import CfgNode

from .checkpoint import CheckpointError

logger = logging.getLogger(__name__)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """SGD or AdamW over the trainable parameters of `model`, in two groups: weights and biases.

    Parameters with "bias" in their name have their own factor on the learning rate and their own
    weight decay (in the released models twice the rate, and no decay). The groups hold the names of
    the parameters (PyTorch's ``param_names``), by which `restore_solver` assigns saved moments.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    solver = cfg.SOLVER
    groups = [
        {
            "params": [p for name, p in trainable if "bias" not in name],
            "param_names": [name for name, _ in trainable if "bias" not in name],
            "lr": solver.BASE_LR,
            "weight_decay": solver.WEIGHT_DECAY,
        },
        {
            "params": [p for name, p in trainable if "bias" in name],
            "param_names": [name for name, _ in trainable if "bias" in name],
            "lr": solver.BASE_LR * solver.BIAS_LR_FACTOR,
            "weight_decay": solver.WEIGHT_DECAY_BIAS,
        },
    ]
    # Fused: fewer passes over the parameters, and with fp16 no waiting for the loss scaler.
    devices = {p.device.type for _, p in trainable}
    if solver.OPTIMIZER != "sgd":
        betas = (solver.MOMENTUM, solver.BETA2)
        fused = devices in ({"cpu"}, {"cuda"})
        return AdamW(groups, lr=solver.BASE_LR, betas=betas, fused=fused)
    fused = devices == {"cuda"}
    optimizer = SGD(groups, lr=solver.BASE_LR, momentum=solver.MOMENTUM, fused=fused)
    if fused:
        zero_momentum(optimizer)
    return optimizer


def zero_momentum(optimizer: SGD) -> None:
    """Create the momentum buffers of an optimizer before its first step, filled with zeros.

    This changes no step. PyTorch's fused SGD allocates the buffers in its first step, and leaves
    them uninitialised if the loss scaler skips that step, as it usually does at the start of fp16
    training.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LambdaLR:
    """The learning-rate schedule of SOLVER, to be stepped after each iteration.

    On return, the optimizer already has the rate of the first iteration.
    """
    solver = cfg.SOLVER
    if solver.SCHEDULE == "step":
        decay = step_decay(solver.STEPS, solver.GAMMA)
    else:
        decay = cosine_decay(solver.MAX_ITER)
    warmup = warmup_factor(solver.WARMUP_METHOD, solver.WARMUP_FACTOR, solver.WARMUP_ITERS)
    # LambdaLR counts the steps already made; the schedule counts iterations from 1.
    return LambdaLR(optimizer, lambda done: warmup(done + 1) * decay(done + 1))


def step_decay(steps: Sequence[int], gamma: float) -> Callable[[int], float]:
    """Factor on the learning rate at iteration t: `gamma` ** (number of `steps` <= t)."""
    ordered = sorted(steps)
    return lambda t: gamma ** bisect_right(ordered, t)


def cosine_decay(max_iter: int) -> Callable[[int], float]:
    """Factor on the learning rate at iteration t: half a cosine, from 1 to 0 at `max_iter`."""
    return lambda t: 0.5 * (1 + math.cos(math.pi * min(t, max_iter) / max_iter))


def warmup_factor(method: str, factor: float, iterations: int) -> Callable[[int], float]:
    """Factor on the learning rate at iteration t: `factor` ("constant"), or rising linearly from it
    to 1, during the first `iterations`; then 1."""

    def at(t: int) -> float:
        if t >= iterations:
            return 1.0
        if method == "constant":
            return factor
        return factor + (1 - factor) * t / iterations

    return at


def restore_solver(
    optimizer: Optimizer, scheduler: LambdaLR, state: dict[str, Any], iteration: int
) -> None:
    """Continue after `iteration` with a checkpoint's moments and the current config's settings.

    Learning rate, momentum and weight decay follow the config that optimizer and scheduler were
    built from, so that a changed config takes effect (and an unchanged one gives the same numbers).
    So does the choice of trained parameters: those that were frozen before start without moments.

    Args:
        optimizer: freshly built, by `build_optimizer`.
        scheduler: freshly built for it, by `build_lr_scheduler`.
        state: content of the checkpoint.
        iteration: number of finished iterations.

    Raises:
        CheckpointError: the saved moments do not fit the parameters, or do not name theirs.
    """
    own = optimizer.state_dict()
    moments = _moments(optimizer, own, state["optimizer"])
    # Parameters without saved moments (all of them before the first step) keep the fresh ones.
    optimizer.load_state_dict({**own, "state": own["state"] | moments})
    base = scheduler.base_lrs
    rates = [rate * at(iteration) for rate, at in zip(base, scheduler.lr_lambdas, strict=True)]
    scheduler.load_state_dict({**state["scheduler"], "base_lrs": base, "_last_lr": rates})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _moments(
    optimizer: Optimizer, own: dict[str, Any], saved: dict[str, Any]
) -> dict[int, dict[str, Any]]:
    """The saved moments by the parameters' current numbers, in the parameters' memory layout.

    Fused optimizers check neither shapes nor strides.
    """
    names, saved_names = _numbers_by_name(own), _numbers_by_name(saved)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {}
    for name, number in names.items():
        entry = saved["state"].get(saved_names.get(name), {})
        parameter = parameters[number]
        for key, value in entry.items():
            if value is None or value.dim() == 0:  # momentum not allocated yet, or a step count
                continue
            if value.shape != parameter.shape:
                raise CheckpointError(
                    f"the checkpoint to resume from has {key} of {list(value.shape)} for parameter "
                    f"{name} of {list(parameter.shape)}: it trained other parameters"
                )
            entry = {**entry, key: torch.empty_like(parameter, dtype=value.dtype).copy_(value)}
        if entry:
            moments[number] = entry
    if saved["state"] and (fresh := [name for name in names if name not in saved_names]):
        logger.warning(
            "%d parameters were not trained until now and start without moments: %s%s",
            len(fresh), fresh[0], ", ..." if len(fresh) > 1 else "",
        )  # fmt: skip
    return moments


def _numbers_by_name(optimizer_state: dict[str, Any]) -> dict[str, int]:
    groups = optimizer_state["param_groups"]
    if not all("param_names" in group for group in groups):
        raise CheckpointError(
            "the checkpoint to resume from does not name the parameters that it trained: start "
            "anew from it by MODEL.WEIGHT"
        )
    pairs = (zip(group["param_names"], group["params"], strict=True) for group in groups)
    return dict(itertools.chain(*pairs))
