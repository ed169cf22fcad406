"""The layers that backbones, necks and heads are made of."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import (
    batch_norm_relu,
    conv3x3,
    depthwise_conv2d,
    group_norm_relu,
    memory_format,
    modulated_deform_conv2d,
)
from ..ops.library import has_compiled

# Whether our operators for norms are at hand.
_OWN_NORMS = has_compiled("batch_norm_relu", "cpu")
# Values from which they are faster than PyTorch's norm with a ReLU, which has less overhead.
_MANY_FOR_BATCH_NORM = 2**17
_MANY_FOR_GROUP_NORM = 2**15

Norm = Callable[[int], nn.Module]
"""Makes the normalisation layer for a number of channels."""


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups; fewer in layers so narrow that a group would be one channel."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 2)), channels)


class FrozenBatchNorm2d(nn.Module):
    """Batch norm with constant statistics and affine terms, all buffers, and no epsilon.

    The released ResNets divide by ``sqrt(running_var)`` alone.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float16, torch.bfloat16):  # under autocast
            # Its factors stay float32: rounded, they would change each channel as a whole. Some
            # versions of PyTorch refuse an epsilon of zero; this one adds nothing either.
            mean, var, eps = self.running_mean, self.running_var, torch.finfo(torch.float32).tiny
            return F.batch_norm(x, mean, var, self.weight, self.bias, training=False, eps=eps)
        scale = self.weight * self.running_var.rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


def own_batch_norm_serves(norm: nn.Module, x: Tensor) -> bool:
    """Whether a norm is a batch norm that will take the statistics of these maps, channels-last on
    the CPU, and has all its parts: for that our operators are faster than PyTorch's."""
    return (
        type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and _suit_own_norms(norm, x)
        and x.numel() > x.shape[1]  # else PyTorch has an error for it
    )


def _suit_own_norms(norm: nn.Module, x: Tensor) -> bool:
    """Whether our operators take these maps and the parameters of an affine norm."""
    return (
        norm.weight.dtype == torch.promote_types(x.dtype, torch.float32)
        and x.device.type == "cpu"
        and memory_format(x) == torch.channels_last
        and _OWN_NORMS
    )


@torch.no_grad()
def update_statistics(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """Move a batch norm's running statistics to those [C] of a batch of `count` values a channel,
    as it does itself in training."""
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)


def norm_relu(norm: nn.Module, x: Tensor) -> Tensor:
    """ReLU of the norm of `x`, which may be overwritten. Where our operator serves, neither the
    norm itself is called nor its hooks are."""
    # Sizes are asked for last: what is exported must not depend on them without need.
    if type(norm) is nn.GroupNorm and norm.affine and _suit_own_norms(norm, x):
        count = x.numel()  # no number in an export for any size
        if not isinstance(count, int) or count >= _MANY_FOR_GROUP_NORM:
            return group_norm_relu(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    if own_batch_norm_serves(norm, x) and x.numel() >= _MANY_FOR_BATCH_NORM:
        output, mean, variance = batch_norm_relu(x, norm.weight, norm.bias, norm.eps)
        update_statistics(norm, mean, variance, x.numel() // x.shape[1])
        return output
    return F.relu(norm(x), inplace=True)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution of stride one; the map's size stays. Its geometry is fixed: changing its
    stride, padding, dilation or groups has no effect. Maps are [N, C, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return conv3x3(x, self.weight, self.bias)


class ConvNormAct(nn.Module):
    """Convolution ("same" padding), optional norm, ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, norm: Norm | None, bias: bool
    ) -> None:
        super().__init__()
        if kernel_size == 3:
            self.conv = Conv3x3(in_channels, out_channels, bias)
        else:
            self.conv = nn.Conv2d(
                in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias
            )
        self.norm = norm(out_channels) if norm is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return norm_relu(self.norm, self.conv(x))


class DepthwiseConv(nn.Conv2d):
    """A convolution of each channel by itself (no bias); the map's size stays."""

    def __init__(self, channels: int, kernel_size: int, dilation: int) -> None:
        super().__init__(
            channels,
            channels,
            kernel_size,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            groups=channels,
            bias=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight, self.dilation[0])


class SeparableConv(nn.Module):
    """Depthwise conv, 1x1 conv (neither with bias), norm, ReLU; the map's size stays."""

    def __init__(self, channels: int, kernel_size: int, dilation: int, norm: Norm) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv(channels, kernel_size, dilation)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return norm_relu(self.norm, self.pointwise(self.depthwise(x)))


class ModulatedDeformConv(nn.Module):
    """Deformable convolution v2, 3x3, whose offsets and mask come from a conv on the same input.

    That conv puts out 27 channels per offset group: first the offsets of all groups (y, x for each
    tap), then the masks of all groups before their sigmoid. It starts at zero: no offset, and a
    mask of one half.
    """

    KERNEL = 3
    OFFSET_GROUPS = 2

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        kernel = self.KERNEL
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.conv_offset_mask = Conv3x3(in_channels, self.OFFSET_GROUPS * 3 * kernel * kernel)
        bound = (in_channels * kernel * kernel) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.conv_offset_mask.weight)
        nn.init.zeros_(self.conv_offset_mask.bias)

    def forward(self, x: Tensor) -> Tensor:
        taps = self.OFFSET_GROUPS * self.KERNEL**2
        offset, mask = self.conv_offset_mask(x).split((2 * taps, taps), dim=1)
        return modulated_deform_conv2d(
            x,
            offset,
            mask.sigmoid(),
            self.weight,
            self.bias,
            padding=self.KERNEL // 2,
            offset_groups=self.OFFSET_GROUPS,
        )


class DeformConv(nn.Module):
    """Modulated deformable 3x3 conv (with bias), norm, ReLU."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.conv = ModulatedDeformConv(channels, channels)
        self.norm = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return norm_relu(self.norm, self.conv(x))


OPERATIONS: dict[str, Callable[[int, Norm], nn.Module]] = {
    "conv1x1": lambda c, norm: ConvNormAct(c, c, 1, norm, bias=False),
    "conv3x3": lambda c, norm: ConvNormAct(c, c, 3, norm, bias=False),
    "sep_conv_3x3": lambda c, norm: SeparableConv(c, 3, 1, norm),
    "sep_conv_3x3_dil3": lambda c, norm: SeparableConv(c, 3, 3, norm),
    "sep_conv_5x5_dil6": lambda c, norm: SeparableConv(c, 5, 6, norm),
    "skip_connect": lambda c, norm: nn.Identity(),
    "def_conv_3x3": DeformConv,
}
"""The searched operations by name (see `nasfcos.genotype`), each keeping a map's size and width."""


class Scale(nn.Module):
    """A learned scalar factor, starting at one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def resize_to(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [N, C, H, W] resized bilinearly to `size` (height, width)."""
    if x.shape[-2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
