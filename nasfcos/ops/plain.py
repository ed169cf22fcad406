"""The operators in plain PyTorch and torchvision.

They serve wherever ``csrc/`` has no compiled kernel, and are what the compiled kernels are tested
against. Signatures are those of the schemas in :mod:`.library`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Any sample this many pixels out reads as zero whatever the image; torchvision's CPU kernel reads
# outside its memory for offsets that are not finite or do not fit an int.
_FAR = 1e6


def nms(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, iou_threshold: float, legacy: bool
) -> Tensor:
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
    if boxes.device.type != "cpu":
        # One round trip instead of one synchronisation a box.
        host = (None if t is None else t.cpu() for t in (boxes, labels, counts))
        return torch.ops.nasfcos.nms_mask(*host, iou_threshold, legacy).to(boxes.device)

    keep = torch.zeros(boxes.shape[:2], dtype=torch.bool)
    for image, kept in enumerate(keep):
        count = len(kept) if counts is None else int(counts[image])
        own = None if labels is None else labels[image, :count]
        kept[:count] = _unsuppressed(boxes[image, :count], own, iou_threshold, legacy)
    return keep


def _unsuppressed(
    boxes: Tensor, labels: Tensor | None, iou_threshold: float, legacy: bool
) -> Tensor:
    """`nms_mask` of one image."""
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    extra = 1 if legacy else 0
    x0, y0, x1, y1 = boxes.unbind(1)
    area = (x1 - x0 + extra) * (y1 - y0 + extra)
    # The threshold takes the boxes' precision for the legacy comparison and stays double for the
    # ordinary one: that decides boxes exactly at the threshold as the two origins do.
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
    n, channels, height, width = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    scale, shift, weight = (t[:, None, None].to(dtype) for t in (scale, shift, weight))
    pairs = (torch.cat((x, y), dim=1).to(dtype) * scale + shift).relu() * weight
    output = pairs.view(n, channels, 2, height, width).sum(2).to(x.dtype)
    return output.contiguous(memory_format=torch.channels_last)


def sigmoid_focal_loss(
    logits: Tensor, targets: Tensor, gamma: float, alpha: float, reduce: bool
) -> Tensor:
    z, weight, _ = _focal_terms(logits, targets, alpha)
    loss = weight * z.sigmoid() ** gamma * _softplus(z)
    loss = loss.masked_fill((targets < 0)[:, None], 0.0)
    return loss.sum() if reduce else loss.to(logits.dtype)


def sigmoid_focal_loss_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, gamma: float, alpha: float
) -> Tensor:
    z, weight, sign = _focal_terms(logits, targets, alpha)
    p = z.sigmoid()
    rest = (-z).sigmoid()
    # rest vanishes faster than the logarithm grows, also where that is infinite
    tail = torch.where(rest == 0, 0.0, rest * _softplus(z))
    grad_logits = grad * sign * weight * p**gamma * (gamma * tail + p)
    return grad_logits.masked_fill((targets < 0)[:, None], 0.0).to(logits.dtype)


def _focal_terms(logits: Tensor, targets: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """z, the logit of being wrong; the alpha weight; dz / dlogit."""
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
    output = F.conv2d(input.relu(), weight, groups=weight.shape[0])
    return output.contiguous(memory_format=memory_format(input))


def rectified_pairs_backward(
    grad: Tensor, input: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    n, channels, height, width = grad.shape
    pairs = input.reshape(n, channels, 2, height, width)
    grad_input = grad[:, :, None] * weight.view(channels, 2, 1, 1)
    grad_input = grad_input.masked_fill(pairs <= 0, 0).view(input.shape)
    grad_weight = (grad[:, :, None] * pairs.relu()).sum((0, 3, 4)).view(weight.shape)
    grad_input = grad_input.contiguous(memory_format=memory_format(input))
    return grad_input, torch.empty_like(weight).copy_(grad_weight)


def batch_norm_relu(
    input: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x = input.to(weight.dtype)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    output = _normed(x, weight, bias, mean, var, eps).relu().to(input.dtype)
    return output.contiguous(memory_format=memory_format(input)), mean, var


def batch_norm_relu_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad.masked_fill(_normed(input, weight, bias, mean, variance, eps) <= 0, 0)
    inverse = (variance + eps).rsqrt()
    centred = (input - mean[:, None, None]) * inverse[:, None, None]
    grad_weight, grad_bias = (grad * centred).sum((0, 2, 3)), grad.sum((0, 2, 3))
    count = input.numel() // len(weight)
    means = [(t / count)[:, None, None] for t in (grad_weight, grad_bias)]
    grad_input = (weight * inverse)[:, None, None] * (grad - means[1] - centred * means[0])
    return grad_input.contiguous(memory_format=memory_format(input)), grad_weight, grad_bias


def batch_norm_concat(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, factor: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    maps = torch.cat((x, y), dim=1).to(weight.dtype)
    output, mean, variance = batch_norm_relu(maps, weight, bias, eps)
    output = rectified_pairs(output, factor).to(x.dtype)
    return output.contiguous(memory_format=memory_format(x)), mean, variance


def batch_norm_concat_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    factor: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    maps = torch.cat((x, y), dim=1)
    normed = _normed(maps, weight, bias, mean, variance, eps)
    grad, grad_factor = rectified_pairs_backward(grad, normed, factor)
    grads, *grad_terms = batch_norm_relu_backward(grad, maps, weight, bias, mean, variance, eps)
    grad_x, grad_y = (
        part.contiguous(memory_format=memory_format(map))
        for part, map in zip(grads.split(x.shape[1], dim=1), (x, y), strict=True)
    )
    return grad_x, grad_y, *grad_terms, grad_factor


def _normed(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> Tensor:
    scale = weight * (variance + eps).rsqrt()
    return x * scale[:, None, None] + (bias - mean * scale)[:, None, None]


def group_norm_relu(
    input: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    parts = input.to(weight.dtype).unflatten(1, (groups, -1))
    var, mean = torch.var_mean(parts, (2, 3, 4), correction=0)
    output = _group_normed(input.to(weight.dtype), weight, bias, mean, var, eps).relu()
    return output.to(input.dtype).contiguous(memory_format=memory_format(input)), mean, var


def group_norm_relu_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad.masked_fill(_group_normed(input, weight, bias, mean, variance, eps) <= 0, 0)
    ones, zeros = torch.ones_like(weight), torch.zeros_like(bias)
    centred = _group_normed(input, ones, zeros, mean, variance, eps)
    grad_weight, grad_bias = (grad * centred).sum((0, 2, 3)), grad.sum((0, 2, 3))

    def less_means(x: Tensor, direction: Tensor) -> Tensor:
        """Less the mean of each group, and its mean along another tensor."""
        x, direction = (t.unflatten(1, (mean.shape[1], -1)) for t in (x, direction))
        along = (x * direction).mean((2, 3, 4), keepdim=True)
        return (x - x.mean((2, 3, 4), keepdim=True) - direction * along).flatten(1, 2)

    inverse = (variance + eps).rsqrt().repeat_interleave(len(weight) // mean.shape[1], dim=1)
    grad_input = less_means(grad * weight[:, None, None], centred) * inverse[:, :, None, None]
    return grad_input.contiguous(memory_format=memory_format(input)), grad_weight, grad_bias


def _group_normed(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> Tensor:
    width = len(weight) // mean.shape[1]
    scale = weight * (variance + eps).rsqrt().repeat_interleave(width, dim=1)
    shift = bias - mean.repeat_interleave(width, dim=1) * scale
    return x * scale[:, :, None, None] + shift[:, :, None, None]


def weighted_sum(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    # Maps are converted before: together with the product it takes a CPU three times as long.
    output = (x.to(a.dtype) * a).addcmul(y.to(a.dtype), b).to(x.dtype)
    return output.contiguous(memory_format=memory_format(x))


def weighted_sum_backward(
    grad: Tensor, x: Tensor, y: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_y = (
        (grad * factor).contiguous(memory_format=memory_format(map))
        for factor, map in ((a, x), (b, y))
    )
    grad_a, grad_b = ((grad * map).sum((0, 2, 3))[:, None, None] for map in (x, y))
    return grad_x, grad_y, grad_a, grad_b


def conv3x3(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    output = F.conv2d(input, weight, bias, padding=1)
    if relu:
        output = output.relu()  # not in place, which exporters want of what they see through
    return output.contiguous(memory_format=memory_format(input))


def conv3x3_input_backward(grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    grad_input = torch.nn.grad.conv2d_input(input.shape, weight, grad, padding=1)
    return grad_input.contiguous(memory_format=memory_format(input))


def conv3x3_weight_backward(grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    grad_weight = torch.nn.grad.conv2d_weight(input, weight.shape, grad, padding=1)
    return torch.empty_like(weight).copy_(grad_weight)


def depthwise_conv2d(input: Tensor, weight: Tensor, dilation: int) -> Tensor:
    padding = dilation * (weight.shape[2] // 2)
    output = F.conv2d(
        input, weight, padding=padding, dilation=dilation, groups=weight.shape[0]
    )
    return output.contiguous(memory_format=memory_format(input))


def depthwise_conv2d_backward(
    grad: Tensor, input: Tensor, weight: Tensor, dilation: int
) -> tuple[Tensor, Tensor]:
    padding = dilation * (weight.shape[2] // 2)
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, input, weight, None, [1, 1], [padding] * 2, [dilation] * 2, False, [0, 0],
        weight.shape[0], [True, True, False],
    )  # fmt: skip
    grad_input = grad_input.contiguous(memory_format=memory_format(input))
    return grad_input, torch.empty_like(weight).copy_(grad_weight)


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
    offset, mask = _tame(offset, mask)
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
    tame_offset, tame_mask = _tame(offset, mask)
    bias = weight.new_zeros(weight.shape[0])
    grad_input, grad_weight, grad_offset, grad_mask, _ = (
        _torchvision()._deform_conv2d_backward(
            grad.contiguous(), input, weight, tame_offset, tame_mask, bias,
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
    """Its operators. They are there once it is imported, which takes a second: only who has no
    compiled operator waits for it."""
    import torchvision  # noqa: F401

    return torch.ops.torchvision


def memory_format(maps: Tensor) -> torch.memory_format:
    """The memory format [N, C, H, W] that maps have, which may be some channels of others; it is
    what our operators give to their results."""
    last = maps.shape[1] > 1 and maps.stride(1) == 1 and not maps.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def like(maps: Tensor) -> Tensor:
    """An empty tensor of the same shape, dtype and `memory_format`."""
    return torch.empty_like(maps, memory_format=memory_format(maps))


def _tame(offset: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets that torchvision survives; a NaN among them moves to its mask."""
    n, taps, height, width = mask.shape
    lost = offset.isnan().reshape(n, taps, 2, height, width).any(dim=2)
    return offset.nan_to_num(_FAR, _FAR, -_FAR).clamp(-_FAR, _FAR), mask.masked_fill(
        lost, torch.nan
    )
