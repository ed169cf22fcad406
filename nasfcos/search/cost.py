"""The cost of a module, in multiply-adds and milliseconds, and its penalty on the reward."""

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
    """What a strategy maximises: the reward minus ``weight * max(0, cost / target - 1)``.

    Attributes:
        cost: "none", "flops" or "latency" (see `TrialResult` for the units).
        target: cost above which there is a penalty.
        weight: factor of the penalty.
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
        """What these costs take off the reward; nan if the one that counts was not measured."""
        if self.cost == "none":
            return 0.0
        cost = {"flops": flops, "latency": latency}[self.cost]
        if math.isnan(cost):  # max(0.0, nan) is 0.0
            return math.nan
        return self.weight * max(0.0, cost / self.target - 1)


def build_objective(cfg: CfgNode, stage: str) -> Objective:
    """The objective that SEARCH.OBJECTIVE sets for a stage, "fpn" or "head"."""
    settings = cfg.SEARCH.OBJECTIVE
    target = settings.TARGET_HEAD if stage == "head" else settings.TARGET
    return Objective(settings.COST, target, settings.WEIGHT)


def _deform_flops(input_shape, offset_shape, mask_shape, weight_shape, *args, **kwargs) -> int:
    """FLOPs of a modulated deformable convolution, two per multiply-add.

    Each output value sums taps * channels products, as in an ordinary convolution. Sampling adds,
    for every tap, output position and input channel, the blend of four neighbours and the factor
    of the mask.
    """
    batch, _, height, width = offset_shape
    out_channels, channels, kernel_h, kernel_w = weight_shape
    samples = batch * height * width * kernel_h * kernel_w * channels
    return 2 * samples * (out_channels + 5)


def _conv_flops(input_shape, weight_shape, *args, out_shape, **kwargs) -> int:
    """FLOPs of the direct sum, two per multiply-add, whichever algorithm the operator uses."""
    _, per_group, kernel_h, kernel_w = weight_shape
    return 2 * math.prod(out_shape) * per_group * kernel_h * kernel_w


_FORMULAS = {
    torch.ops.nasfcos.modulated_deform_conv2d: _deform_flops,
    torch.ops.nasfcos.conv3x3: _conv_flops,
    torch.ops.nasfcos.depthwise_conv2d: _conv_flops,
    torch.ops.nasfcos.rectified_pairs: _conv_flops,
}


def multiply_adds(module: nn.Module, inputs: Sequence[Tensor] | Tensor) -> float:
    """Multiply-adds of ``module(inputs)``, in G: those of its convolutions and matrix products.

    Norms, activations, sums and resizing are not counted, as is usual. The sampling of deformable
    convolutions is, with five multiply-adds per sample (four neighbours and the mask).

    Args:
        module: is copied and left unchanged; the copy runs once, in evaluation mode.
        inputs: argument of its forward pass; only shapes matter. If the inputs and the module are
            on the meta device, nothing is computed (which takes longer if the maps are small).
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
    """Milliseconds of ``module(inputs)`` without gradients, in the mode and on the device of the
    module: the shortest of `repetitions` runs, since other load on the machine only adds to the
    time, after three runs to warm up."""
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
