"""Reference implementations of the operators in PyTorch and torchvision.

They are the fallback where ``csrc/`` has no compiled kernel, the decompositions for ONNX, and what
the compiled kernels are tested against. Signatures are those of the schemas in :mod:`.library`.
Autograd differentiates them, except for the focal loss, whose gradient needs care for large logits,
and the deformable convolution, whose gradient is torchvision's: those have ``*_backward`` as well.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import memory_format

# Samples this many pixels away are outside any image and read as zero. torchvision's CPU kernel
# reads invalid memory for offsets that are not finite or do not fit an int.
_FAR = 1e6


def nms(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, iou_threshold: float, legacy: bool
) -> Tensor:
    """Greedy NMS; boxes [N, 4], scores [N] and labels [N] (or None) to the kept indices."""
    order = scores.argsort(descending=True, stable=True)
    labels = None if labels is None else labels[None, order]
    keep = nms_mask(boxes[None, order], labels, None, iou_threshold, legacy)
    return order[keep[0]]


def nms_mask(
    boxes: Tensor,
    labels: Tensor | None,
    counts: Tensor | None,
    iou_threshold: float,
    legacy: bool,
) -> Tensor:
    """NMS of sorted boxes [N, K, 4], with labels [N, K] and counts [N] or None, to [N, K] bool."""
    if boxes.device.type != "cpu":
        # One transfer to the CPU and back, instead of one synchronisation per box.
        host = (None if t is None else t.cpu() for t in (boxes, labels, counts))
        return torch.ops.nasfcos.nms_mask(*host, iou_threshold, legacy).to(boxes.device)

    keep = torch.zeros(boxes.shape[:2], dtype=torch.bool)
    for image, kept in enumerate(keep):
        count = len(kept) if counts is None else int(counts[image])
        classes = None if labels is None else labels[image, :count]
        kept[:count] = _unsuppressed(boxes[image, :count], classes, iou_threshold, legacy)
    return keep


def _unsuppressed(
    boxes: Tensor, labels: Tensor | None, iou_threshold: float, legacy: bool
) -> Tensor:
    """`nms_mask` for one image: boxes [K, 4] and labels [K] to [K] bool."""
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    extra = 1 if legacy else 0
    x0, y0, x1, y1 = boxes.unbind(1)
    area = (x1 - x0 + extra) * (y1 - y0 + extra)
    # The legacy comparison rounds the threshold to the boxes' precision, the ordinary one compares
    # in double. This decides boxes exactly at the threshold as the two original codes do.
    threshold = torch.tensor(iou_threshold, dtype=boxes.dtype if legacy else torch.float64)
    suppressed = torch.zeros_like(x0, dtype=torch.bool)
    for i in range(len(boxes)):
        if suppressed[i]:
            continue
        w = (torch.minimum(x1[i], x1) - torch.maximum(x0[i], x0) + extra).clamp(min=0)
        h = (torch.minimum(y1[i], y1) - torch.maximum(y0[i], y0) + extra).clamp(min=0)
        iou = w * h / (area[i] + area - w * h)
        hit = iou >= threshold if legacy else iou.double() > threshold
        hit[: i + 1] = False
        suppressed |= hit if labels is None else hit & (labels == labels[i])
    return ~suppressed


def fused_concat(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
    """x and y [N, C, H, W] with terms [2 * C] to [N, C, H, W], channels-last."""
    n, channels, height, width = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    scale, shift, weight = (t[:, None, None].to(dtype) for t in (scale, shift, weight))
    pairs = (torch.cat((x, y), dim=1).to(dtype) * scale + shift).relu() * weight
    output = pairs.view(n, channels, 2, height, width).sum(2).to(x.dtype)
    return output.contiguous(memory_format=torch.channels_last)


def sigmoid_focal_loss(
    logits: Tensor, targets: Tensor, gamma: float, alpha: float, reduce: bool
) -> Tensor:
    """Logits [N, C] and targets [N] to a scalar (`reduce`) or [N, C]."""
    z, weight, _ = _focal_terms(logits, targets, alpha)
    loss = weight * z.sigmoid() ** gamma * _softplus(z)
    loss = loss.masked_fill((targets < 0)[:, None], 0.0)
    return loss.sum() if reduce else loss.to(logits.dtype)


def sigmoid_focal_loss_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, gamma: float, alpha: float
) -> Tensor:
    """The gradient [N, C] of the logits; `grad` is a scalar or [N, C]."""
    z, weight, sign = _focal_terms(logits, targets, alpha)
    p = z.sigmoid()
    rest = (-z).sigmoid()
    # The limit of rest * softplus(z) for large z is 0, also where softplus(z) overflows.
    tail = torch.where(rest == 0, 0.0, rest * _softplus(z))
    grad_logits = grad * sign * weight * p**gamma * (gamma * tail + p)
    return grad_logits.masked_fill((targets < 0)[:, None], 0.0).to(logits.dtype)


def _focal_terms(logits: Tensor, targets: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """The logit z of a wrong prediction (the logit itself for other classes, its negative for the
    target class), the alpha weight, and the sign dz / dlogit; [N, C] each."""
    classes = logits.shape[1]
    if targets.device.type == "cpu" and targets.numel():
        low, high = (int(bound) for bound in targets.aminmax())
        if low < -1 or high > classes:
            raise ValueError(
                f"sigmoid_focal_loss: targets must lie in -1..{classes} (the number of classes), "
                f"got {low if low < -1 else high}"
            )
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    positive = targets[:, None] == torch.arange(1, classes + 1, device=targets.device)
    sign = torch.where(positive, -1.0, 1.0).to(x.dtype)
    weight = torch.where(positive, alpha, 1 - alpha).to(x.dtype)
    return sign * x, weight, sign


def _softplus(z: Tensor) -> Tensor:
    return torch.logaddexp(z, torch.zeros_like(z))


def rectified_pairs(input: Tensor, weight: Tensor) -> Tensor:
    """Maps [N, 2 * C, H, W] and weight [C, 2, 1, 1] to [N, C, H, W]."""
    output = F.conv2d(input.relu(), weight, groups=weight.shape[0])
    return output.contiguous(memory_format=memory_format(input))


def batch_norm_relu(
    input: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Maps [N, C, H, W] to maps of the same shape, means [C] and variances [C]."""
    x = input.to(weight.dtype)
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    scale = weight * (variance + eps).rsqrt()
    shift = bias - mean * scale
    output = (x * scale[:, None, None] + shift[:, None, None]).relu().to(input.dtype)
    return output.contiguous(memory_format=memory_format(input)), mean, variance


def batch_norm_concat(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, factor: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Maps x and y [N, C, H, W] to [N, C, H, W], means and variances [2 * C]."""
    maps = torch.cat((x, y), dim=1).to(weight.dtype)
    output, mean, variance = batch_norm_relu(maps, weight, bias, eps)
    output = rectified_pairs(output, factor).to(x.dtype)
    return output.contiguous(memory_format=memory_format(x)), mean, variance


def group_norm_relu(
    input: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Maps [N, C, H, W] to maps of that shape, means and variances [N, groups]."""
    x = input.to(weight.dtype)
    variance, mean = torch.var_mean(x.unflatten(1, (groups, -1)), (2, 3, 4), correction=0)
    width = len(weight) // groups
    scale = weight * (variance + eps).rsqrt().repeat_interleave(width, dim=1)
    shift = bias - mean.repeat_interleave(width, dim=1) * scale
    output = (x * scale[:, :, None, None] + shift[:, :, None, None]).relu().to(input.dtype)
    return output.contiguous(memory_format=memory_format(input)), mean, variance


def weighted_sum(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Maps x and y [N, C, H, W] with factors [C, 1, 1] to [N, C, H, W]."""
    # Converting the maps first is three times as fast on a CPU as a product of mixed dtypes.
    output = (x.to(a.dtype) * a).addcmul(y.to(a.dtype), b).to(x.dtype)
    return output.contiguous(memory_format=memory_format(x))


def conv3x3(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """Maps [N, C, H, W] and weight [Cout, C, 3, 3] to [N, Cout, H, W]."""
    output = F.conv2d(input, weight, bias, padding=1)
    if relu:
        output = output.relu()  # not in place: exporters decompose the operator into this
    return output.contiguous(memory_format=memory_format(input))


def depthwise_conv2d(input: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """Maps [N, C, H, W] and weight [C, 1, k, k] to [N, C, H, W]."""
    padding = dilation * (weight.shape[2] // 2)
    output = F.conv2d(
        input, weight, padding=padding, dilation=dilation, groups=weight.shape[0]
    )
    return output.contiguous(memory_format=memory_format(input))


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    offset_groups: int,
) -> Tensor:
    """Maps [N, C, H, W] to [N, Cout, Ho, Wo]; see `nasfcos.ops`."""
    if min(*stride, *dilation) < 1:  # torchvision divides by them
        raise ValueError("modulated_deform_conv2d: strides and dilations must be positive")
    offset, mask = _finite(offset, mask)
    if bias is None:
        bias = weight.new_zeros(weight.shape[0])
    output = _torchvision().deform_conv2d(
        input, weight, offset, mask, bias, *stride, *padding, *dilation, 1, offset_groups, True
    )
    return output.contiguous(memory_format=memory_format(input))


def modulated_deform_conv2d_backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    offset_groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of input, offset, mask and weight."""
    finite_offset, masked = _finite(offset, mask)
    bias = weight.new_zeros(weight.shape[0])
    grad_input, grad_weight, grad_offset, grad_mask, _ = (
        _torchvision()._deform_conv2d_backward(
            grad.contiguous(), input, weight, finite_offset, masked, bias,
            *stride, *padding, *dilation, 1, offset_groups, True,
        )
    )  # fmt: skip
    return tuple(
        gradient.contiguous(memory_format=memory_format(tensor))
        for gradient, tensor in (
            (grad_input, input), (grad_offset, offset), (grad_mask, mask), (grad_weight, weight),
        )
    )  # fmt: skip


def _torchvision():
    """torchvision's operators. They are registered by importing it, which takes a second, so that
    happens only where the compiled operator is missing."""
    import torchvision  # noqa: F401

    return torch.ops.torchvision


def _finite(offset: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets that are safe for torchvision, and the mask, NaN where an offset was NaN."""
    n, taps, height, width = mask.shape
    undefined = offset.isnan().reshape(n, taps, 2, height, width).any(dim=2)
    offset = offset.nan_to_num(_FAR, _FAR, -_FAR).clamp(-_FAR, _FAR)
    return offset, mask.masked_fill(undefined, torch.nan)
