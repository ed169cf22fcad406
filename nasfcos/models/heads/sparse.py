"""Detection on the CPU: only the predictions above the score threshold are looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...boxes import clip_boxes
from ...ops import batched_nms
from .locations import locations_above, nonzero, values_at
from .post_process import Detections, PostProcess

if TYPE_CHECKING:
    from .dense import DenseHead


class Candidates(NamedTuple):
    """Predictions of several images that NMS chooses from.

    Attributes:
        image: [P] int64, index of the image.
        boxes: [P, 4] xyxy in pixels.
        scores: [P] float32.
        labels: [P] int64 from 1.
    """

    image: Tensor
    boxes: Tensor
    scores: Tensor
    labels: Tensor


def detect(
    head: DenseHead, outputs: tuple[list[Tensor], ...], sizes: Sequence[tuple[int, int]]
) -> list[Detections]:
    """Each image's detections from a head's outputs on the CPU; see `DenseHead.detect`."""
    return suppress(find_candidates(head, outputs, len(sizes)), sizes, head.post_process)


def find_candidates(
    head: DenseHead, outputs: tuple[list[Tensor], ...], images: int
) -> Candidates:
    """The candidates among the predictions for a number of images.

    The class logits are read once, in whatever layout they have. At most locations no class is
    above the threshold; only the other locations are looked at more closely.
    """
    logits, box_maps, *factor_maps = outputs
    settings = head.post_process
    limit = settings.max_dropped_logit
    locations = locations_above(logits, limit)
    classes = values_at(logits, locations, head.num_classes)
    found = nonzero((classes > limit).flatten())
    row, label = found // head.num_classes, found % head.num_classes
    scores = classes.flatten()[found].sigmoid()
    for maps in factor_maps:
        scores = scores * values_at(maps, locations, 1).flatten()[row].sigmoid()
    valid = nonzero(scores >= 0)
    if len(valid) < len(scores):  # a factor is NaN
        row, label, scores = (x[valid] for x in (row, label, scores))
    priors_per_location = logits[0].shape[1] // head.num_classes
    location = row // priors_per_location
    image, level = locations.image[location], locations.level[location]
    selected = top_per_level(
        scores, level * images + image, len(logits) * images, settings.pre_nms_top_n
    )
    if selected is not None:
        image, row, label, scores = (x[selected] for x in (image, row, label, scores))
    boxes = head.decode(values_at(box_maps, locations, 4)[row], head.priors(locations)[row])
    return Candidates(image, boxes, scores, label + 1)


def top_per_level(scores: Tensor, group: Tensor, groups: int, count: int) -> Tensor | None:
    """The `count` best candidates of each level of each image.

    Args:
        scores: [P].
        group: [P] int64, ascending: each candidate's level and image as one number.
        groups: number of groups.
        count: number of candidates that each group keeps at most.

    Returns:
        ascending indices into P, or None where every candidate is kept.
    """
    if len(scores) <= count:
        return None
    sizes = torch.bincount(group, minlength=groups).tolist()
    if max(sizes) <= count:
        return None
    selected, start = [], 0
    for part, size in zip(scores.split(sizes), sizes, strict=True):
        if size > count:
            best = part.topk(count, sorted=False).indices.sort().values
        else:
            best = torch.arange(size)
        selected.append(best + start)
        start += size
    return torch.cat(selected)


def suppress(
    candidates: Candidates, sizes: Sequence[tuple[int, int]], settings: PostProcess
) -> list[Detections]:
    """The detections that NMS leaves of the candidates; `sizes` are the images' (height, width)."""
    image, boxes, scores, labels = candidates
    if len(scores) == 0:
        return [{"boxes": boxes, "scores": scores, "labels": labels} for _ in sizes]
    height, width = torch.tensor(sizes)[image].unbind(1)
    boxes = clip_boxes(boxes, height, width)
    class_of_image = image * 2**32 + labels
    keep = batched_nms(boxes, scores, class_of_image, settings.nms_iou, legacy=True)
    results = []
    for index in range(len(sizes)):
        best = keep[image[keep] == index]
        if len(best) > settings.detections_per_image:
            best = best[scores[best] >= scores[best[settings.detections_per_image - 1]]]
        results.append({"boxes": boxes[best], "scores": scores[best], "labels": labels[best]})
    return results
