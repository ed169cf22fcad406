"""The optimizer and the learning-rate schedule, as the published models were trained."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from yacs.config import CfgNode


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """SGD or AdamW over the trainable parameters of `model`, in two groups: weights and biases.

    A parameter with "bias" in its name has its own factor on the learning rate and its own weight
    decay (the released models: twice the rate, no decay). The groups know the parameters' names
    (PyTorch's ``param_names``), by which moments find theirs again (see `restore_solver`).
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
    # Fewer passes over the parameters, and with fp16 no waiting for the loss scaler's verdict.
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
    """Give an optimizer that has made no step its momentum, all zeros, which changes no step.

    PyTorch's fused SGD makes it in its first step without setting it, and leaves it so where that
    step is one to be skipped, as the first ones with fp16 usually are.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LambdaLR:
    """A scheduler to step after each iteration; the first iteration has its rate from the start."""
    solver = cfg.SOLVER
    if solver.SCHEDULE == "step":
        decay = step_decay(solver.STEPS, solver.GAMMA)
    else:
        decay = cosine_decay(solver.MAX_ITER)
    warmup = warmup_factor(solver.WARMUP_METHOD, solver.WARMUP_FACTOR, solver.WARMUP_ITERS)
    # LambdaLR counts the steps already made; the schedule counts iterations from 1.
    return LambdaLR(optimizer, lambda done: warmup(done + 1) * decay(done + 1))


def step_decay(steps: Sequence[int], gamma: float) -> Callable[[int], float]:
    """Factor at iteration t: `gamma` to the power of the number of `steps` <= t."""
    ordered = sorted(steps)
    return lambda t: gamma ** bisect_right(ordered, t)


def cosine_decay(max_iter: int) -> Callable[[int], float]:
    """Factor at iteration t: half a cosine from 1 down to 0 at `max_iter` (and 0 after it)."""
    return lambda t: 0.5 * (1 + math.cos(math.pi * min(t, max_iter) / max_iter))


def warmup_factor(method: str, factor: float, iterations: int) -> Callable[[int], float]:
    """Factor at iteration t < `iterations`: constantly `factor`, or rising from it to 1."""

    def at(t: int) -> float:
        if t >= iterations:
            return 1.0
        if method == "constant":
            return factor
        return factor + (1 - factor) * t / iterations

    return at
