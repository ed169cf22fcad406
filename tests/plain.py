"""The arithmetic of the models in PyTorch's and torchvision's own operators.

With two threads it rounds exactly as in the golden values, if the processor does.
"""

import torch
import torch.nn.functional as F

from nasfcos.models import layers
from nasfcos.models.necks import nas_fpn
from nasfcos.ops import reference


def use_plain_operators(monkeypatch):
    """Make models compute without our operators for the rest of the test."""
    monkeypatch.setattr(layers, "_FUSED_NORMS", False)
    monkeypatch.setattr(layers, "modulated_deform_conv2d", _deform_conv)
    monkeypatch.setattr(layers, "conv3x3", _conv3x3)
    monkeypatch.setattr(layers, "depthwise_conv2d", reference.depthwise_conv2d)
    monkeypatch.setattr(nas_fpn, "rectified_pairs", reference.rectified_pairs)
    monkeypatch.setattr(nas_fpn, "weighted_sum", lambda x, y, a, b: a * x + b * y)


def _conv3x3(input, weight, bias):
    return F.conv2d(input, weight, bias, padding=1)


def _deform_conv(input, offset, mask, weight, bias, padding, offset_groups):
    return reference.modulated_deform_conv2d(
        input, offset, mask, weight, bias, [1, 1], [padding] * 2, [1, 1], offset_groups
    )


def plain_focal_loss(logits, labels, gamma, alpha):
    """The sum of the focal losses of logits [N, C] with labels [N], 0 for background."""
    p = logits.sigmoid()
    is_class = labels[:, None] == torch.arange(1, logits.shape[1] + 1)
    is_other = ~is_class & (labels >= 0)[:, None]
    hit = is_class * ((1 - p) ** gamma * p.log()) * alpha
    miss = is_other * (p**gamma * (1 - p).log()) * (1 - alpha)
    return (-hit - miss).sum()


def plain_losses(head, outputs, targets):
    """The losses of either head, with the locations of objects picked out of all levels."""
    assignment = head.assign([tuple(x.shape[-2:]) for x in outputs[0]], targets)
    counts = [x[0].numel() // head.num_classes for x in outputs[0]]
    flat = [
        torch.cat([x.permute(0, 2, 3, 1).reshape(-1, width) for x in maps])
        for maps, width in zip(outputs, (head.num_classes, 4, 1), strict=False)
    ]
    labels = torch.cat([x.flatten() for x in assignment.labels.split(counts, 1)])
    wanted = torch.cat([x.flatten(0, 1) for x in assignment.box_targets.split(counts, 1)])
    positive = labels > 0
    count = positive.sum().item()
    predicted, wanted = flat[1][positive], wanted[positive].to(flat[1].dtype)
    classes = plain_focal_loss(flat[0], labels, gamma=2.0, alpha=0.25)
    losses = {"loss_cls": classes / (count + len(targets))}
    if len(flat) == 2:
        smooth = F.smooth_l1_loss(predicted, wanted, beta=0.11, reduction="sum")
        return losses | {"loss_box": smooth / (4 * count)}
    left, top, right, bottom = wanted.unbind(1)
    target = (
        (torch.minimum(left, right) / torch.maximum(left, right))
        * (torch.minimum(top, bottom) / torch.maximum(top, bottom))
    ).sqrt()
    shared, *areas = (
        (x[:, 0] + x[:, 2]) * (x[:, 1] + x[:, 3])
        for x in (torch.minimum(predicted, wanted), predicted, wanted)
    )
    box = -torch.log((shared + 1) / (sum(areas) - shared + 1))
    return losses | {
        "loss_box": (box * target).sum() / target.sum(),
        "loss_centerness": F.binary_cross_entropy_with_logits(flat[2][positive].squeeze(1), target),
    }
