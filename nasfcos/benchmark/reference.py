"""Post-processing as it was written in 2019: loops over images, levels and classes.

Slow, but easy to verify.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..boxes import clip_boxes
from ..models.heads.anchors import decode_boxes
from ..models.heads.locations import STRIDES
from ..models.heads.post_process import Detections, PostProcess
from ..models.heads.retinanet import RetinaNetHead
from ..ops import nms


def fcos_detections(
    outputs: tuple[list[Tensor], list[Tensor], list[Tensor]],
    sizes: Sequence[tuple[int, int]],
    post_process: PostProcess,
) -> list[Detections]:
    """The detections of `FCOSHead.detect`, except for the choice and order among equal scores."""
    logits, distances, centerness = outputs
    detections = []
    for image, size in enumerate(sizes):
        found = []
        for stride, logit, distance, centre in zip(
            STRIDES, logits, distances, centerness, strict=True
        ):
            classes, _, width = logit.shape[1:]
            probability = logit[image].permute(1, 2, 0).reshape(-1, classes).sigmoid()
            side = distance[image].permute(1, 2, 0).reshape(-1, 4)
            factor = centre[image].flatten().sigmoid()

            def boxes_at(place: Tensor, side=side, stride=stride, width=width) -> Tensor:
                point = torch.stack((place % width, place // width), dim=1)
                point = point.float() * stride + stride // 2
                return torch.cat((point - side[place][:, :2], point + side[place][:, 2:]), dim=1)

            found.append(_level(probability, factor, boxes_at, post_process))
        detections.append(_image(found, size, post_process))
    return detections


def retinanet_detections(
    head: RetinaNetHead,
    outputs: tuple[list[Tensor], list[Tensor]],
    sizes: Sequence[tuple[int, int]],
) -> list[Detections]:
    """The detections of `RetinaNetHead.detect`, up to choice and order among equal scores."""
    logits, codes = outputs
    anchors = head.anchors([tuple(x.shape[-2:]) for x in logits])
    detections = []
    for image, size in enumerate(sizes):
        found = []
        for logit, code, anchor in zip(logits, codes, anchors, strict=True):
            probability = logit[image].permute(1, 2, 0).reshape(-1, head.num_classes).sigmoid()
            code = code[image].permute(1, 2, 0).reshape(-1, 4)

            def boxes_at(place: Tensor, code=code, anchor=anchor) -> Tensor:
                return decode_boxes(code[place], anchor[place])

            found.append(_level(probability, None, boxes_at, head.post_process))
        detections.append(_image(found, size, head.post_process))
    return detections


def _level(
    probability: Tensor,
    factor: Tensor | None,
    boxes_at: Callable[[Tensor], Tensor],
    post_process: PostProcess,
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and labels of the best candidates of a level.

    Args:
        probability: class probabilities [L, C] at the level's L locations or anchors.
        factor: [L] to multiply the scores with, or None.
        boxes_at: returns the boxes [K, 4] at the indices [K] of locations or anchors.
        post_process: threshold and number of candidates.
    """
    boxes, scores, labels = [], [], []
    for label in range(probability.shape[1]):
        place = (probability[:, label] > post_process.score_threshold).nonzero().squeeze(1)
        if len(place) == 0:
            continue
        score = probability[place, label]
        boxes.append(boxes_at(place))
        scores.append(score if factor is None else score * factor[place])
        labels.append(torch.full_like(place, label + 1))
    if not boxes:
        none = probability.new_zeros(0)
        return none.reshape(0, 4), none, none.long()
    scores = torch.cat(scores)
    scores, best = scores.topk(min(post_process.pre_nms_top_n, len(scores)))
    return torch.cat(boxes)[best], scores, torch.cat(labels)[best]


def _image(
    levels: list[tuple[Tensor, Tensor, Tensor]], size: tuple[int, int], post_process: PostProcess
) -> Detections:
    """The detections of an image from the candidates (boxes, scores, labels) of its levels."""
    boxes, scores, labels = (torch.cat(part) for part in zip(*levels, strict=True))
    boxes = clip_boxes(boxes, *size)
    kept = []
    for label in labels.unique().tolist():
        own = (labels == label).nonzero().squeeze(1)
        kept.append(own[nms(boxes[own], scores[own], post_process.nms_iou, legacy=True)])
    keep = torch.cat(kept) if kept else labels.new_zeros(0)
    keep = keep[scores[keep].argsort(descending=True)]
    if len(keep) > post_process.detections_per_image:
        last = scores[keep[post_process.detections_per_image - 1]]
        keep = keep[scores[keep] >= last]
    return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}
