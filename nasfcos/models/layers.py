"""Layers shared by backbones, necks and heads. Maps are [N, C, H, W]."""

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

# Whether the fused kernels for norms are compiled.
_FUSED_NORMS = has_compiled("batch_norm_relu", "cpu")
# Number of values in a map from which they beat PyTorch's norm and ReLU, which have less overhead.
_MIN_FOR_BATCH_NORM = 2**17
_MIN_FOR_GROUP_NORM = 2**15

Norm = Callable[[int], nn.Module]
"""Creates a normalisation layer for the given number of channels."""


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups; for other widths than multiples of 64, with as many as divide both
    32 and half of the channels."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 2)), channels)


class FrozenBatchNorm2d(nn.Module):
    """Batch norm with constant statistics and affine parameters, all of them buffers.

    There is no epsilon: the released ResNets divide by ``sqrt(running_var)``.

    Args:
        channels: number of channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """A map [N, C, H, W] to one of the same shape and dtype."""
        if x.dtype in (torch.float16, torch.bfloat16):  # under autocast
            # The factors stay float32: rounded, they would change whole channels. Some versions of
            # PyTorch refuse an epsilon of zero; adding the smallest number changes nothing either.
            mean, var, eps = self.running_mean, self.running_var, torch.finfo(torch.float32).tiny
            return F.batch_norm(x, mean, var, self.weight, self.bias, training=False, eps=eps)
        scale = self.weight * self.running_var.rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


def fused_batch_norm_applies(norm: nn.Module, x: Tensor) -> bool:
    """Whether the fused CPU kernel applies: an affine `nn.BatchNorm2d` in training mode with
    running statistics, on channels-last CPU maps."""
    return (
        type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and _fused_norms_accept(norm, x)
        and x.numel() > x.shape[1]  # otherwise PyTorch raises its error
    )


def _fused_norms_accept(norm: nn.Module, x: Tensor) -> bool:
    """Whether the fused kernels accept these maps and the parameters of an affine norm."""
    return (
        norm.weight.dtype == torch.promote_types(x.dtype, torch.float32)
        and x.device.type == "cpu"
        and memory_format(x) == torch.channels_last
        and _FUSED_NORMS
    )


@torch.no_grad()
def update_statistics(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """Update a batch norm's running statistics as it does itself in training.

    Args:
        norm: the batch norm.
        mean, variance: [C], the (biased) statistics of the batch.
        count: number of values per channel that they were computed from, at least two.
    """
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)


def norm_relu(norm: nn.Module, x: Tensor) -> Tensor:
    """ReLU of the norm of `x` [N, C, H, W], which may be overwritten.

    Where a fused kernel applies, the norm module and its hooks are not called.
    """
    # Sizes are checked last, so that exported programs do not depend on them needlessly.
    if type(norm) is nn.GroupNorm and norm.affine and _fused_norms_accept(norm, x):
        count = x.numel()  # symbolic in an export for any size
        if not isinstance(count, int) or count >= _MIN_FOR_GROUP_NORM:
            return group_norm_relu(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    if fused_batch_norm_applies(norm, x) and x.numel() >= _MIN_FOR_BATCH_NORM:
        output, mean, variance = batch_norm_relu(x, norm.weight, norm.bias, norm.eps)
        update_statistics(norm, mean, variance, x.numel() // x.shape[1])
        return output
    return F.relu(norm(x), inplace=True)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with stride one that keeps the size of the map.

    Its geometry is fixed: changing its stride, padding, dilation or groups has no effect.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C', H, W]."""
        return conv3x3(x, self.weight, self.bias)


class ConvNormAct(nn.Module):
    """Convolution of stride one that keeps the size of the map, optional norm, ReLU."""

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
        """[N, C, H, W] to [N, C', H, W]."""
        return norm_relu(self.norm, self.conv(x))


class DepthwiseConv(nn.Conv2d):
    """A depthwise convolution without bias that keeps the size of the map."""

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
        """A map [N, C, H, W] to one of the same shape."""
        return depthwise_conv2d(x, self.weight, self.dilation[0])


class SeparableConv(nn.Module):
    """Depthwise conv and 1x1 conv without bias, norm, ReLU."""

    def __init__(self, channels: int, kernel_size: int, dilation: int, norm: Norm) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv(channels, kernel_size, dilation)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """A map [N, C, H, W] to one of the same shape."""
        return norm_relu(self.norm, self.pointwise(self.depthwise(x)))


class ModulatedDeformConv(nn.Module):
    """3x3 deformable convolution v2 (Zhu et al., 2019).

    A conv on the same input predicts offsets and mask, 27 channels per offset group: first the
    offsets of all groups in pixels of the map (y, x for each tap), then the masks of all groups
    before their sigmoid. It is initialised with zeros: no offset, and a mask of one half.
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
        """[N, C, H, W] to [N, C', H, W]."""
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
        """A map [N, C, H, W] to one of the same shape."""
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
"""The searched operations by name (see `nasfcos.genotype`); they keep the shape of a map."""


class Scale(nn.Module):
    """A learned scalar factor, initially one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """A tensor to one of the same shape."""
        return x * self.scale


def resize_to(x: Tensor, size: tuple[int, int]) -> Tensor:
    """A map [N, C, H, W] resized bilinearly to `size` (height, width)."""
    if x.shape[-2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
