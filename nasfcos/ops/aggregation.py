"""The aggregations of the searched necks (paper, section 3.2): weighted sum and concatenation.

The concatenation of training, with its norm, is :func:`.norm.batch_norm_concat`.
"""

import torch
from torch import Tensor

from . import reference
from .layout import cpu_dtype, memory_format
from .library import operators_for


def weighted_sum(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a * x + b * y`` with one factor per channel. One compiled pass for channels-last maps on
    the CPU, otherwise PyTorch's operators.

    Args:
        x, y: [N, C, H, W].
        a, b: [C, 1, 1].

    Returns:
        [N, C, H, W] in the wider dtype of the maps, channels-last if `x` is. For maps of half
        precision it is computed in float32 and rounded once if the factors are float32 or the
        compiled operator is used.

    Raises:
        ValueError: the shapes do not match.
    """
    if x.dim() != 4 or x.shape != y.shape:
        raise ValueError(
            "weighted_sum: x and y must be [N, C, H, W] of one shape, "
            f"got {list(x.shape)} and {list(y.shape)}"
        )
    for factor in (a, b):
        if factor.shape != (x.shape[1], 1, 1):
            raise ValueError(
                f"weighted_sum: factors must be [{x.shape[1]}, 1, 1], got {list(factor.shape)}"
            )
    output_dtype = torch.promote_types(x.dtype, y.dtype)
    if x.device.type != "cpu" or memory_format(x) != torch.channels_last:
        output = (a * x + b * y).to(output_dtype)
        return output.contiguous(memory_format=memory_format(x))
    dtype = torch.promote_types(cpu_dtype(x), cpu_dtype(y))
    a, b = (t.to(torch.promote_types(dtype, torch.float32)) for t in (a, b))
    output = operators_for(x).weighted_sum(x.to(dtype), y.to(dtype), a, b)
    return output.to(output_dtype)


def rectified_pairs(input: Tensor, weight: Tensor) -> Tensor:
    """ReLU and a grouped 1x1 convolution with two input channels per output channel: the end of the
    searched concatenation. One compiled pass on the CPU, otherwise PyTorch's operators.

    Args:
        input: [N, 2 * C, H, W].
        weight: [C, 2, 1, 1]; converted to the dtype of `input`.

    Returns:
        [N, C, H, W] in the dtype of `input` (under autocast on a GPU, in autocast's), channels-last
        if `input` is.

    Raises:
        ValueError: the shapes do not match.
    """
    if input.dim() != 4 or weight.shape != (input.shape[1] // 2, 2, 1, 1) or input.shape[1] % 2:
        raise ValueError(
            "rectified_pairs: input must be [N, 2 * C, H, W] and weight [C, 2, 1, 1], "
            f"got {list(input.shape)} and {list(weight.shape)}"
        )
    if input.device.type != "cpu":
        return reference.rectified_pairs(input, weight.to(input.dtype))
    dtype = cpu_dtype(input)
    output = operators_for(input).rectified_pairs(input.to(dtype), weight.to(dtype))
    return output.to(input.dtype)


def fused_concat(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
    """The searched concatenation for inference: concatenates the maps, multiplies them by `scale`,
    adds `shift`, and applies ReLU and a grouped 1x1 convolution with two input channels per output
    channel. It has no gradient. One compiled pass on the CPU, otherwise PyTorch's operators.

    Args:
        x, y: [N, C, H, W], C even.
        scale, shift, weight: [2 * C] in the dtype of the maps, or in float32 for maps of half
            precision.

    Returns:
        [N, C, H, W] in the dtype of the maps, channels-last.

    Raises:
        ValueError: the shapes do not match.
    """
    if x.dim() != 4 or x.shape != y.shape or x.shape[1] % 2:
        raise ValueError(
            "fused_concat: x and y must be [N, C, H, W] with an even C, "
            f"got {list(x.shape)} and {list(y.shape)}"
        )
    for name, terms in (("scale", scale), ("shift", shift), ("weight", weight)):
        if terms.shape != (2 * x.shape[1],):
            raise ValueError(
                f"fused_concat: {name} must be [{2 * x.shape[1]}], got {list(terms.shape)}"
            )
    return operators_for(x).fused_concat(x, y, scale, shift, weight)
