"""What a module costs, in multiply-adds and milliseconds, and what that takes off its reward."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from yacs.config import CfgNode

from .. import ops as _ops  # noqa: F401  (defines torch.ops.nasfcos)
from .records import FAILED, TrialResult


@dataclass(frozen=True)
class Objective:
    """What a strategy maximises: the reward, less ``weight * max(0, cost / target - 1)``.

    Attributes:
        cost: "none", "flops" or "latency" (see `TrialResult`).
        target: cost above which there is a penalty.
        weight: of the penalty.
    """

    cost: str = "none"
    target: float = 1.0
    weight: float = 0.0

    def __call__(self, result: TrialResult) -> float:
        """The objective of a result; nan for a failed trial."""
        if result.status == FAILED:
            return result.reward
        return result.reward - self.penalty(result.flops, result.latency)

    def penalty(self, flops: float, latency: float) -> float:
        """What these costs take off the reward."""
        if self.cost == "none":
            return 0.0
        cost = {"flops": flops, "latency": latency}[self.cost]
        return self.weight * max(0.0, cost / self.target - 1)


def build_objective(cfg: CfgNode, stage: str) -> Objective:
    """The objective of SEARCH.OBJECTIVE for a stage, "fpn" or "head"."""
    settings = cfg.SEARCH.OBJECTIVE
    target = settings.TARGET_HEAD if stage == "head" else settings.TARGET
    return Objective(settings.COST, target, settings.WEIGHT)


def _deform_flops(input_shape, offset_shape, mask_shape, weight_shape, *args, **kwargs) -> int:
    """Of a modulated deformable convolution, at two a multiply-add.

    Each output value sums taps * channels products, as in an ordinary convolution. Sampling adds,
    for every tap, place and input channel, a blend of four neighbours and the mask's factor.
    """
    batch, _, height, width = offset_shape
    out_channels, channels, kernel_h, kernel_w = weight_shape
    samples = batch * height * width * kernel_h * kernel_w * channels
    return 2 * samples * (out_channels + 5)


def _conv_flops(input_shape, weight_shape, *args, out_shape, **kwargs) -> int:
    """At two a multiply-add of the direct sum, however the operator computes it."""
    _, per_group, kernel_h, kernel_w = weight_shape
    return 2 * math.prod(out_shape) * per_group * kernel_h * kernel_w


_FORMULAS = {
    torch.ops.nasfcos.modulated_deform_conv2d: _deform_flops,
    torch.ops.nasfcos.conv3x3: _conv_flops,
    torch.ops.nasfcos.depthwise_conv2d: _conv_flops,
    torch.ops.nasfcos.rectified_pairs: _conv_flops,
}


def multiply_adds(module: nn.Module, inputs: Sequence[Tensor] | Tensor) -> float:
    """Multiply-adds, in G, of ``module(inputs)``: those of its convolutions and matrix products.

    Norms, activations, sums and resizing are not counted, as is usual; the sampling of deformable
    convolutions is, at five a sample (four neighbours and the mask). `inputs` matter by their
    shapes only. A copy runs on them once, in evaluation mode, or on the meta device, where they and
    the module lie there, computes nothing (which takes longer where maps are small).
    """
    twin = copy.deepcopy(module).eval()
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with torch.no_grad(), counter:
        twin(inputs)
    return counter.get_total_flops() / 2 / 1e9


@torch.no_grad()
def latency_ms(
    module: nn.Module, inputs: Sequence[Tensor] | Tensor, repetitions: int = 20
) -> float:
    """Milliseconds of ``module(inputs)`` without gradients: the least of `repetitions`, since what
    else runs on the machine only adds to it, after three to warm up. The module runs in the mode
    and on the device that it is in."""
    devices = {p.device for p in module.parameters() if p.is_cuda}

    def once() -> float:
        started = time.perf_counter()
        module(inputs)
        for device in devices:
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    for _ in range(3):
        once()
    return 1000 * min(once() for _ in range(repetitions))
