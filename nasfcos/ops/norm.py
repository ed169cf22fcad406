"""Batch and group norm, fused with what follows them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import cpu_dtype, memory_format
from .library import operators_for


def batch_norm_relu(
    input: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm with the statistics of the batch itself, and ReLU: for training on the CPU, where
    it takes half as many passes over the maps as PyTorch's operators.

    Args:
        input: [N, C, H, W].
        weight, bias: [C]; float32 for maps of half precision, otherwise in the dtype of the maps.
        eps: added to the variances.

    Returns:
        The output, [N, C, H, W] in the dtype of `input`, channels-last if `input` is; and the means
        and (population) variances of the batch, [C] each, without gradient.

    Raises:
        ValueError: the shapes do not match, or there is no pixel.
    """
    _check("batch_norm_relu", (input,), (weight, bias))
    dtype = cpu_dtype(input)
    output, mean, variance = operators_for(input).batch_norm_relu(
        input.to(dtype), weight, bias, eps
    )
    return output.to(input.dtype), mean.detach(), variance.detach()


def batch_norm_concat(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, factor: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The searched concatenation in training (paper, section 3.2): the channels of `x` followed by
    those of `y`, batch norm with the statistics of the batch itself, ReLU, and a grouped 1x1
    convolution with two input channels per output channel. For the CPU, as
    :func:`batch_norm_relu`.

    Args:
        x, y: [N, C, H, W], C even.
        weight, bias: [2 * C], of the norm; float32 for maps of half precision.
        factor: [C, 2, 1, 1], the weight of the convolution.
        eps: added to the variances.

    Returns:
        The output, [N, C, H, W] in the wider dtype of the maps, channels-last if `x` is; and means
        and variances [2 * C] as from :func:`batch_norm_relu`.

    Raises:
        ValueError: the shapes do not match, or there is no pixel.
    """
    if x.shape != y.shape or x.dim() == 4 and x.shape[1] % 2:
        raise ValueError(
            "batch_norm_concat: x and y must be of one shape with an even number of channels, "
            f"got {list(x.shape)} and {list(y.shape)}"
        )
    if factor.shape != (x.shape[1], 2, 1, 1):
        raise ValueError(
            f"batch_norm_concat: factor must be [{x.shape[1]}, 2, 1, 1], got {list(factor.shape)}"
        )
    _check("batch_norm_concat", (x, y), (weight, bias))
    output_dtype = torch.promote_types(x.dtype, y.dtype)
    dtype = torch.promote_types(cpu_dtype(x), cpu_dtype(y))
    output, mean, variance = operators_for(x).batch_norm_concat(
        x.to(dtype), y.to(dtype), weight, bias, factor.to(weight.dtype), eps
    )
    return output.to(output_dtype), mean.detach(), variance.detach()


def group_norm_relu(
    input: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tensor:
    """Group norm and ReLU. The compiled operator takes fewer passes over the maps on the CPU;
    elsewhere PyTorch's operators are used.

    Args:
        input: [N, C, H, W].
        weight, bias: [C]; if in half precision, converted to float32.
        groups: number of groups of consecutive channels; it divides C.
        eps: added to the variances.

    Returns:
        [N, C, H, W] in the dtype of `input`, channels-last if `input` is.

    Raises:
        ValueError: the shapes do not match, or there is no pixel.
    """
    _check("group_norm_relu", (input,), (weight, bias))
    if groups < 1 or input.shape[1] % groups:
        raise ValueError(
            f"group_norm_relu: {groups} groups do not divide {input.shape[1]} channels"
        )
    weight, bias = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (weight, bias))
    if input.device.type != "cpu":
        normed = F.group_norm(input.to(weight.dtype), groups, weight, bias, eps)
        output = F.relu(normed, inplace=True).to(input.dtype)
        return output.contiguous(memory_format=memory_format(input))
    maps = input.to(cpu_dtype(input))
    output, _, _ = operators_for(maps).group_norm_relu(maps, weight, bias, groups, eps)
    return output.to(input.dtype)


def _check(name: str, maps: tuple[Tensor, ...], parameters: tuple[Tensor, ...]) -> None:
    if maps[0].dim() != 4 or not maps[0].numel():
        raise ValueError(
            f"{name}: maps must be [N, C, H, W] and not empty, got {list(maps[0].shape)}"
        )
    channels = len(maps) * maps[0].shape[1]
    for parameter in parameters:
        if parameter.shape != (channels,):
            raise ValueError(
                f"{name}: parameters must have {channels} values, got {list(parameter.shape)}"
            )
