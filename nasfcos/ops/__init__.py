"""The compiled operators of ``csrc/`` and their public faces.

Each operator is ``torch.ops.nasfcos.<name>``; ``torch.compile``, ``torch.export`` and autocast work
through it. Where no compiled kernel exists (no compiler at installation, or a device that ``csrc/``
does not serve) a plain PyTorch version of the same operator takes over, see :mod:`.library`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import library as _library  # noqa: F401  (defines torch.ops.nasfcos)
from . import plain as _plain
from .plain import memory_format

# The half precisions that our deformable convolution takes, where it is compiled.
_NARROW = {
    device: dtypes
    for device, dtypes in (("cpu", (torch.bfloat16,)), ("cuda", (torch.bfloat16, torch.float16)))
    if _library.has_compiled("modulated_deform_conv2d", device)
}

_OWN_CONV3X3 = _library.has_compiled("conv3x3", "cpu")

__all__ = [
    "batch_norm_concat",
    "batch_norm_relu",
    "batched_nms",
    "conv3x3",
    "depthwise_conv2d",
    "fused_concat",
    "group_norm_relu",
    "memory_format",
    "modulated_deform_conv2d",
    "nms",
    "nms_mask",
    "rectified_pairs",
    "sigmoid_focal_loss",
    "weighted_sum",
]


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, legacy: bool = False) -> Tensor:
    """Greedy non-maximum suppression.

    Args:
        boxes: [N, 4] floating point, xyxy, pixels.
        scores: [N] floating point.
        iou_threshold: a box is suppressed when its IoU with a kept box of higher score is above
            this (with ``legacy``: above or equal).
        legacy: the released models' convention, in which both corners belong to the box and its
            width is ``x1 - x0 + 1``. Otherwise torchvision's, ``x1 - x0``.

    Returns:
        int64 indices of the kept boxes by descending score; equal scores keep their input order.

    Raises:
        ValueError: shapes that do not fit.
    """
    return _nms(boxes, scores, None, iou_threshold, legacy)


def batched_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, legacy: bool = False
) -> Tensor:
    """:func:`nms` within each class: boxes of different ``labels`` ([N] integer) never suppress
    each other. Box coordinates are used as they are (not shifted apart by class), so the result is
    exactly that of one :func:`nms` a class.
    """
    return _nms(boxes, scores, labels, iou_threshold, legacy)


def _nms(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, iou_threshold: float, legacy: bool
) -> Tensor:
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"nms: boxes must be [N, 4], got {list(boxes.shape)}")
    for name, tensor in (("scores", scores), ("labels", labels)):
        if tensor is not None and (tensor.dim() != 1 or tensor.shape[0] != boxes.shape[0]):
            raise ValueError(
                f"nms: {name} must be [N] with the N of boxes {list(boxes.shape)}, "
                f"got {list(tensor.shape)}"
            )
    return torch.ops.nasfcos.nms(boxes, scores, labels, float(iou_threshold), legacy)


def nms_mask(
    boxes: Tensor,
    labels: Tensor | None,
    counts: Tensor | None,
    iou_threshold: float,
    legacy: bool = False,
) -> Tensor:
    """:func:`batched_nms` of several images at once, whose boxes are in order already. The result's
    shape follows from the shapes alone, so that nothing waits for a GPU.

    Args:
        boxes: [N, K, 4] floating point, xyxy, pixels; those of each image by descending score.
        labels: [N, K] integer, or None: all of one class.
        counts: [N] integer, how many of an image's boxes there are (the others suppress none and
            are not kept), or None: all K.
        iou_threshold, legacy: as of :func:`nms`.

    Returns:
        [N, K] bool, whether a box is kept.

    Raises:
        ValueError: shapes that do not fit.
    """
    if boxes.dim() != 3 or boxes.shape[2] != 4:
        raise ValueError(f"nms_mask: boxes must be [N, K, 4], got {list(boxes.shape)}")
    for name, tensor, shape in (
        ("labels", labels, boxes.shape[:2]),
        ("counts", counts, boxes.shape[:1]),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"nms_mask: {name} must be {list(shape)} for boxes {list(boxes.shape)}, "
                f"got {list(tensor.shape)}"
            )
    return torch.ops.nasfcos.nms_mask(boxes, labels, counts, float(iou_threshold), legacy)


def sigmoid_focal_loss(
    logits: Tensor,
    targets: Tensor,
    gamma: float = 2.0,
    alpha: float = 0.25,
    reduction: str = "sum",
) -> Tensor:
    """Sigmoid focal loss for one-vs-rest classification (Lin et al., "Focal Loss for Dense Object
    Detection", ICCV 2017, equation 5).

    Args:
        logits: [N, C] floating point, any size of value: the loss and its gradient never overflow
            unless a logit itself is infinite.
        targets: [N] integer; 0 is background, 1..C the class, -1 a row to ignore (no loss, no
            gradient).
        gamma: focusing exponent, >= 0.
        alpha: weight of the positive terms, ``1 - alpha`` that of the negative ones.
        reduction: "sum" (a scalar; nothing of the logits' size is stored besides the logits) or
            "none" ([N, C], in the logits' dtype).

    Returns:
        The sum in float32 for float16 and bfloat16 logits, otherwise in the logits' dtype.

    Raises:
        ValueError: shapes or reduction that do not fit; on the CPU, a target outside -1..C. The
            kernel for CUDA asserts that on the device, as PyTorch's losses do.
    """
    if logits.dim() != 2 or targets.dim() != 1 or logits.shape[0] != targets.shape[0]:
        raise ValueError(
            "sigmoid_focal_loss: logits must be [N, C] and targets [N], "
            f"got {list(logits.shape)} and {list(targets.shape)}"
        )
    if reduction not in ("sum", "none"):
        raise ValueError(
            f"sigmoid_focal_loss: reduction must be 'sum' or 'none', got {reduction!r}"
        )
    return torch.ops.nasfcos.sigmoid_focal_loss(
        logits, targets, float(gamma), float(alpha), reduction == "sum"
    )


def fused_concat(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
    """The searched concatenation for inference, in one pass: the maps one after the other, times
    `scale` plus `shift`, ReLU, and a 1x1 convolution with a group of two channels for each output
    channel. It has no gradient. On the CPU it is one pass of ours, elsewhere PyTorch's operators.

    Args:
        x, y: [N, C, H, W], C even.
        scale, shift, weight: [2 * C] in the maps' dtype, or in float32 for maps of half precision.

    Returns:
        [N, C, H, W] in the maps' dtype, channels-last.

    Raises:
        ValueError: shapes that do not fit.
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
    if x.device.type != "cpu":
        return _plain.fused_concat(x, y, scale, shift, weight)
    return torch.ops.nasfcos.fused_concat(x, y, scale, shift, weight)


def rectified_pairs(input: Tensor, weight: Tensor) -> Tensor:
    """ReLU, and a 1x1 convolution with a group of two input channels for each output channel: the
    end of the searched concatenation (paper, section 3.2). On the CPU it is one pass of ours,
    elsewhere PyTorch's operators.

    Args:
        input: [N, 2 * C, H, W].
        weight: [C, 2, 1, 1]; taken in the dtype of ``input``.

    Returns:
        [N, C, H, W] in the dtype of ``input`` (under autocast on a GPU, in autocast's),
        channels-last where ``input`` is.

    Raises:
        ValueError: shapes that do not fit.
    """
    if input.dim() != 4 or weight.shape != (input.shape[1] // 2, 2, 1, 1) or input.shape[1] % 2:
        raise ValueError(
            "rectified_pairs: input must be [N, 2 * C, H, W] and weight [C, 2, 1, 1], "
            f"got {list(input.shape)} and {list(weight.shape)}"
        )
    if input.device.type != "cpu":
        return _plain.rectified_pairs(input, weight.to(input.dtype))
    dtype = _cpu_dtype(input)
    output = torch.ops.nasfcos.rectified_pairs(input.to(dtype), weight.to(dtype))
    return output.to(input.dtype)


def batch_norm_relu(
    input: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm with the statistics of the batch itself, and ReLU: for training on the CPU, where
    it takes half as many passes over the maps as PyTorch's operators.

    Args:
        input: [N, C, H, W].
        weight, bias: [C]; float32 for maps of half precision, else in the maps' dtype.
        eps: is added to the variances.

    Returns:
        [N, C, H, W] in the dtype of ``input``, channels-last where that is; then the
        means and the variances (of the batch as a population) [C], without gradient.

    Raises:
        ValueError: shapes that do not fit, or no pixel.
    """
    _check_norm("batch_norm_relu", (input,), (weight, bias))
    dtype = _cpu_dtype(input)
    output, mean, variance = torch.ops.nasfcos.batch_norm_relu(
        input.to(dtype), weight, bias, eps
    )
    return output.to(input.dtype), mean.detach(), variance.detach()


def batch_norm_concat(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, factor: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The searched concatenation in training (paper, section 3.2): the channels of `x` and those of
    `y`, batch norm with the statistics of the batch itself, ReLU, and a 1x1 convolution with a
    group of two channels for each output channel. For the CPU, as :func:`batch_norm_relu`.

    Args:
        x, y: [N, C, H, W], C even; in the wider dtype of the two.
        weight, bias: [2 * C], of the norm; float32 for maps of half precision.
        factor: [C, 2, 1, 1], of the convolution.
        eps: is added to the variances.

    Returns:
        [N, C, H, W] in the dtype of the maps, channels-last where ``x`` is; then means and
        variances [2 * C] as of :func:`batch_norm_relu`.

    Raises:
        ValueError: shapes that do not fit, or no pixel.
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
    _check_norm("batch_norm_concat", (x, y), (weight, bias))
    wanted = torch.promote_types(x.dtype, y.dtype)
    dtype = torch.promote_types(_cpu_dtype(x), _cpu_dtype(y))
    output, mean, variance = torch.ops.nasfcos.batch_norm_concat(
        x.to(dtype), y.to(dtype), weight, bias, factor.to(weight.dtype), eps
    )
    return output.to(wanted), mean.detach(), variance.detach()


def group_norm_relu(
    input: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tensor:
    """Group norm and ReLU. On the CPU it is ours, with fewer passes over the maps than PyTorch's
    operators, elsewhere these.

    Args:
        input: [N, C, H, W].
        weight, bias: [C]; in half precision they are computed with in float32.
        groups: of consecutive channels; they divide C.
        eps: is added to the variances.

    Returns:
        [N, C, H, W] in the dtype of ``input``, channels-last where that is.

    Raises:
        ValueError: shapes that do not fit, or no pixel.
    """
    _check_norm("group_norm_relu", (input,), (weight, bias))
    if groups < 1 or input.shape[1] % groups:
        raise ValueError(
            f"group_norm_relu: {groups} groups do not divide {input.shape[1]} channels"
        )
    weight, bias = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (weight, bias))
    if input.device.type != "cpu":
        normed = F.group_norm(input.to(weight.dtype), groups, weight, bias, eps)
        output = F.relu(normed, inplace=True).to(input.dtype)
        return output.contiguous(memory_format=memory_format(input))
    x = input.to(_cpu_dtype(input))
    return torch.ops.nasfcos.group_norm_relu(x, weight, bias, groups, eps)[0].to(input.dtype)


def weighted_sum(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a * x + b * y`` with factors for each channel: the searched aggregation (paper, section
    3.2). For channels-last maps on the CPU it is one pass of ours, else PyTorch's operators.

    Args:
        x, y: [N, C, H, W]; in the wider dtype of the two.
        a, b: [C, 1, 1].

    Returns:
        [N, C, H, W] in the dtype of the maps, channels-last where ``x`` is. Of maps of half
        precision it is computed in float32 and rounded once, if the factors are float32 or the
        operator is ours.

    Raises:
        ValueError: shapes that do not fit.
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
    wanted = torch.promote_types(x.dtype, y.dtype)
    if x.device.type != "cpu" or memory_format(x) != torch.channels_last:
        output = (a * x + b * y).to(wanted)
        return output.contiguous(memory_format=memory_format(x))
    dtype = torch.promote_types(_cpu_dtype(x), _cpu_dtype(y))
    a, b = (t.to(torch.promote_types(dtype, torch.float32)) for t in (a, b))
    return torch.ops.nasfcos.weighted_sum(x.to(dtype), y.to(dtype), a, b).to(wanted)


def _check_norm(name: str, maps: tuple[Tensor, ...], parameters: tuple[Tensor, ...]) -> None:
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


def conv3x3(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False
) -> Tensor:
    """Convolution 3x3 of stride one with as much padding as keeps a map's size, and ReLU if wanted.
    For channels-last maps of single or double precision on the CPU it is ours, unless autocast
    lowers the precision: Winograd's minimal filtering, with a quarter of the multiplications and
    about twice the rounding error of the direct sum, differentiable once in reverse mode. Else, and
    for few pixels or channels, it is PyTorch's.

    Args:
        input: [N, C, H, W].
        weight: [Cout, C, 3, 3].
        bias: [Cout] or None.

    Returns:
        [N, Cout, H, W] in the dtype of ``input`` (under autocast, in autocast's), channels-last
        where ``input`` is. What is not finite reaches the outputs that a convolution takes it to,
        and may reach others no more than three pixels from it.

    Raises:
        ValueError: shapes that do not fit.
    """
    if input.dim() != 4 or weight.shape[1:] != (input.shape[1], 3, 3):
        raise ValueError(
            "conv3x3: input must be [N, C, H, W] and weight [Cout, C, 3, 3], "
            f"got {list(input.shape)} and {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"conv3x3: bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    if (
        _OWN_CONV3X3
        and input.device.type == "cpu"
        and input.dtype == weight.dtype
        and input.dtype in (torch.float32, torch.float64)
        and memory_format(input) == torch.channels_last
        and not torch.is_autocast_enabled("cpu")
    ):
        return torch.ops.nasfcos.conv3x3(input, weight, bias, relu)
    output = F.conv2d(input, weight, bias, padding=1)
    return F.relu(output, inplace=True) if relu else output


def depthwise_conv2d(input: Tensor, weight: Tensor, dilation: int = 1) -> Tensor:
    """Convolution of each channel with a kernel of its own, with stride one and as much padding as
    keeps a map's size. On the CPU it is ours, since oneDNN's is slow where it is dilated; elsewhere
    it is PyTorch's.

    Args:
        input: [N, C, H, W].
        weight: [C, 1, k, k] with an odd k; taken in the dtype of ``input``.
        dilation: in pixels, both ways.

    Returns:
        [N, C, H, W] in the dtype of ``input`` (under autocast on a GPU, in autocast's),
        channels-last where ``input`` is.

    Raises:
        ValueError: shapes that do not fit.
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
        return _plain.depthwise_conv2d(input, weight.to(input.dtype), dilation)
    dtype = _cpu_dtype(input)
    output = torch.ops.nasfcos.depthwise_conv2d(input.to(dtype), weight.to(dtype), dilation)
    return output.to(input.dtype)


def _cpu_dtype(input: Tensor) -> torch.dtype:
    """What the CPU computes in: float16 has no kernels there."""
    return torch.float32 if input.dtype == torch.float16 else input.dtype


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

    Args:
        input: [N, C, H, W].
        offset: [N, 2 * offset_groups * kh * kw, Ho, Wo] in input pixels: y, x for each tap, group
            after group (torchvision's order).
        mask: [N, offset_groups * kh * kw, Ho, Wo], the factor of each tap's sample (after any
            sigmoid).
        weight: [Cout, C, kh, kw].
        bias: [Cout] or None.
        stride, padding, dilation: as in ``conv2d``; one integer or (y, x).
        offset_groups: how many consecutive groups of input channels have offsets and masks of
            their own.

    Returns:
        [N, Cout, Ho, Wo] in the dtype of ``input`` (under autocast on a GPU, in autocast's),
        channels-last where ``input`` is. The arithmetic is float64 for a float64 input and float32
        otherwise: half precision is too coarse for pixel positions. Compiled, it keeps bfloat16
        (for CUDA also float16) for samples and weights, not for their sums, positions and masks;
        gradients are float32 until they are done. The product follows PyTorch's settings for
        convolutions, so that a GPU may use TF32 (``torch.backends.cudnn.allow_tf32``). On CUDA the
        backward pass adds in no certain order, which ``torch.use_deterministic_algorithms``
        refuses.

    A sample outside the image (an infinite offset included) reads as zero. A NaN offset or mask
    makes the outputs that use it NaN; gradients there are NaN or zero.

    Raises:
        ValueError: shapes that do not fit.
    """
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    _check_deform_shapes(
        input, offset, mask, weight, bias, stride, padding, dilation, offset_groups
    )
    device, wanted = input.device.type, input.dtype
    exact = torch.float64 if wanted == torch.float64 else torch.float32
    if device == "cuda" and wanted != torch.float64 and torch.is_autocast_enabled(device):
        wanted = torch.get_autocast_dtype(device)  # as in a convolution of PyTorch
    dtype = wanted if wanted in _NARROW.get(device, ()) else exact
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
    return output.to(wanted)


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
    size = _library.deform_output_size(height, width, kh, kw, stride, padding, dilation)
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
