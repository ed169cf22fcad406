"""Convolutions: 3x3 by Winograd's algorithm, depthwise, and modulated deformable."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .layout import cpu_dtype, memory_format
from .library import deform_output_size, has_compiled, operators_for, runs_on_cpu_kernels

# The half precisions for which our deformable convolution has kernels, where it is compiled.
_DEFORM_HALF_DTYPES = {
    device: dtypes
    for device, dtypes in (("cpu", (torch.bfloat16,)), ("cuda", (torch.bfloat16, torch.float16)))
    if has_compiled("modulated_deform_conv2d", device)
}


def conv3x3(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False
) -> Tensor:
    """3x3 convolution of stride 1 that preserves the size of the maps, optionally followed by ReLU.

    Channels-last maps of single or double precision on the CPU, outside autocast, take the compiled
    operator: Winograd's minimal filtering, with a quarter of the multiplications and about twice
    the rounding error of direct summation, and differentiable once. Everything else, as well as
    maps of few pixels or channels, takes PyTorch's convolution.

    Args:
        input: [N, C, H, W].
        weight: [Cout, C, 3, 3].
        bias: [Cout] or None.
        relu: apply ReLU to the output.

    Returns:
        [N, Cout, H, W] in the dtype of `input` (under autocast, in autocast's), channels-last if
        `input` is. NaN and infinity spread to whole 4x4 output tiles, at most three pixels further
        than in a direct convolution.

    Raises:
        ValueError: the shapes do not match.
    """
    if input.dim() != 4 or weight.shape[1:] != (input.shape[1], 3, 3):
        raise ValueError(
            "conv3x3: input must be [N, C, H, W] and weight [Cout, C, 3, 3], "
            f"got {list(input.shape)} and {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"conv3x3: bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    if (
        runs_on_cpu_kernels(input)
        and input.dtype == weight.dtype
        and input.dtype in (torch.float32, torch.float64)
        and memory_format(input) == torch.channels_last
        and not torch.is_autocast_enabled("cpu")
    ):
        return torch.ops.nasfcos.conv3x3(input, weight, bias, relu)
    output = F.conv2d(input, weight, bias, padding=1)
    return F.relu(output, inplace=True) if relu else output


def depthwise_conv2d(input: Tensor, weight: Tensor, dilation: int = 1) -> Tensor:
    """Depthwise convolution of stride 1 that preserves the size of the maps. Compiled for the CPU,
    where oneDNN is slow for dilated kernels; elsewhere PyTorch's convolution is used.

    Args:
        input: [N, C, H, W].
        weight: [C, 1, k, k] with an odd k; converted to the dtype of `input`.
        dilation: spacing of the taps in pixels, along both axes.

    Returns:
        [N, C, H, W] in the dtype of `input` (under autocast on a GPU, in autocast's), channels-last
        if `input` is.

    Raises:
        ValueError: the shapes do not match, or the dilation is not positive.
    """
    if input.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            "depthwise_conv2d: input and weight must have four dimensions, "
            f"got {list(input.shape)} and {list(weight.shape)}"
        )
    kernel = weight.shape[2]
    if weight.shape != (input.shape[1], 1, kernel, kernel) or kernel % 2 == 0:
        raise ValueError(
            f"depthwise_conv2d: weight must be [{input.shape[1]}, 1, k, k] with an odd k, "
            f"got {list(weight.shape)}"
        )
    if dilation < 1:
        raise ValueError(f"depthwise_conv2d: dilation {dilation} must be positive")
    if input.device.type != "cpu":
        return reference.depthwise_conv2d(input, weight.to(input.dtype), dilation)
    dtype = cpu_dtype(input)
    output = operators_for(input).depthwise_conv2d(input.to(dtype), weight.to(dtype), dilation)
    return output.to(input.dtype)


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    offset_groups: int = 1,
) -> Tensor:
    """Modulated deformable convolution (Zhu et al., "Deformable ConvNets v2", CVPR 2019).

    Samples outside the image, including those at an infinite offset, read as zero. A NaN offset or
    mask makes the outputs that use it NaN; gradients there are NaN or zero.

    The arithmetic is float64 for float64 input and float32 otherwise, because half precision is too
    coarse for pixel positions. The compiled kernels keep bfloat16 (on CUDA also float16) for
    samples and weights, but not for sums, positions, masks and gradients. The matrix product
    follows PyTorch's settings for convolutions, so that a GPU may use TF32
    (``torch.backends.cudnn.allow_tf32``). The backward pass on CUDA adds in no fixed order, which
    ``torch.use_deterministic_algorithms`` refuses.

    Args:
        input: [N, C, H, W].
        offset: [N, 2 * offset_groups * kh * kw, Ho, Wo] in input pixels: (y, x) for each tap, one
            group after the other (torchvision's order).
        mask: [N, offset_groups * kh * kw, Ho, Wo], the factor of each tap's sample (after the
            sigmoid, if any).
        weight: [Cout, C, kh, kw].
        bias: [Cout] or None.
        stride, padding, dilation: as in ``conv2d``; one integer or (y, x).
        offset_groups: number of groups of consecutive input channels with their own offsets and
            masks.

    Returns:
        [N, Cout, Ho, Wo] in the dtype of `input` (under autocast on a GPU, in autocast's),
        channels-last if `input` is.

    Raises:
        ValueError: the shapes do not match.
    """
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    _check_deform_shapes(
        input, offset, mask, weight, bias, stride, padding, dilation, offset_groups
    )
    device, output_dtype = input.device.type, input.dtype
    exact = torch.float64 if output_dtype == torch.float64 else torch.float32
    if device == "cuda" and output_dtype != torch.float64 and torch.is_autocast_enabled(device):
        output_dtype = torch.get_autocast_dtype(device)  # as in a convolution of PyTorch
    dtype = output_dtype if output_dtype in _DEFORM_HALF_DTYPES.get(device, ()) else exact
    output = torch.ops.nasfcos.modulated_deform_conv2d(
        input.to(dtype),
        offset.to(exact),
        mask.to(exact),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        stride,
        padding,
        dilation,
        offset_groups,
    )
    return output.to(output_dtype)


def _pair(value: int | tuple[int, int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _check_deform_shapes(
    input, offset, mask, weight, bias, stride, padding, dilation, offset_groups
) -> None:
    def wrong(message: str) -> ValueError:
        return ValueError(f"modulated_deform_conv2d: {message}")

    if input.dim() != 4:
        raise wrong(f"input must be [N, C, H, W], got {list(input.shape)}")
    if weight.dim() != 4:
        raise wrong(f"weight must be [Cout, C, kh, kw], got {list(weight.shape)}")
    n, channels, height, width = input.shape
    out_channels, weight_channels, kh, kw = weight.shape
    if weight_channels != channels:
        raise wrong(f"weight is for {weight_channels} input channels, input has {channels}")
    if offset_groups < 1 or channels % offset_groups != 0:
        raise wrong(f"{channels} input channels do not divide into {offset_groups} offset_groups")
    if min(*stride, *dilation) < 1:
        raise wrong(f"stride {stride} and dilation {dilation} must be positive")
    if min(padding) < 0:
        raise wrong(f"padding {padding} must not be negative")
    size = deform_output_size(height, width, kh, kw, stride, padding, dilation)
    if size[0] < 1 or size[1] < 1:
        raise wrong(f"a {height}x{width} input is too small for the {kh}x{kw} kernel")
    taps = offset_groups * kh * kw
    for name, tensor, want in (
        ("offset", offset, (n, 2 * taps, *size)),
        ("mask", mask, (n, taps, *size)),
    ):
        if tensor.shape != want:
            raise wrong(f"{name} must be {list(want)}, got {list(tensor.shape)}")
    if bias is not None and bias.shape != (out_channels,):
        raise wrong(f"bias must be [{out_channels}], got {list(bias.shape)}")
