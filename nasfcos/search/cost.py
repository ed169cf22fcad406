"""What a module costs: multiply-adds and milliseconds."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .. import ops as _ops  # noqa: F401  (defines torch.ops.nasfcos)


def _deform_flops(input_shape, offset_shape, mask_shape, weight_shape, *args, **kwargs) -> int:
    """Of a modulated deformable convolution, at two a multiply-add.

    Each output value sums taps * channels products, as in an ordinary convolution. Sampling adds,
    for every tap, place and input channel, a blend of four neighbours and the mask's factor.
    """
    batch, _, height, width = offset_shape
    out_channels, channels, kernel_h, kernel_w = weight_shape
    samples = batch * height * width * kernel_h * kernel_w * channels
    return 2 * samples * (out_channels + 5)


def multiply_adds(module: nn.Module, inputs: Sequence[Tensor] | Tensor) -> float:
    """Multiply-adds, in G, of ``module(inputs)``: those of its convolutions and matrix products.

    Norms, activations, sums and resizing are not counted, as is usual; the sampling of deformable
    convolutions is, at five a sample (four neighbours and the mask). Nothing is computed: shapes
    travel through a copy on the meta device. `inputs` matter by their shapes only, and neither
    they nor the module are changed.
    """
    twin = copy.deepcopy(module).to("meta").eval()
    if isinstance(inputs, Tensor):
        shapes = inputs.to("meta")
    else:
        shapes = [x.to("meta") for x in inputs]
    formulas = {torch.ops.nasfcos.modulated_deform_conv2d: _deform_flops}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with torch.no_grad(), counter:
        twin(shapes)
    return counter.get_total_flops() / 2 / 1e9


@torch.no_grad()
def latency_ms(
    module: nn.Module, inputs: Sequence[Tensor] | Tensor, repetitions: int = 20
) -> float:
    """Milliseconds of ``module(inputs)`` without gradients: the median of `repetitions`, after
    three to warm up. The module runs in the mode and on the device that it is in."""
    devices = {p.device for p in module.parameters() if p.is_cuda}

    def once() -> float:
        started = time.perf_counter()
        module(inputs)
        for device in devices:
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    for _ in range(3):
        once()
    return 1000 * median(once() for _ in range(repetitions))
