"""Detection in shapes that do not depend on values, for a GPU and for export.

As many predictions as could be needed are carried along; missing ones have the score `ABSENT`.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...boxes import clip_boxes
from ...ops import nms_mask
from .locations import all_locations, flatten_levels, take
from .post_process import Detections, PostProcess

if TYPE_CHECKING:
    from .dense import DenseHead

ABSENT = -1.0
"""Score of an entry that only fills up the shape."""

MAX_NMS_BOXES = 2**14
"""Boxes per image that NMS is given without counting the present ones first: on a GPU its memory
grows with their square (here 32 MiB)."""


class PaddedDetections(NamedTuple):
    """The same number K of predictions for each of N images, by descending score, absent ones last.

    Attributes:
        boxes: [N, K, 4] xyxy in pixels.
        scores: [N, K] float32.
        labels: [N, K] int64 from 1.
        kept: [N, K] bool, whether the prediction is a detection.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    kept: Tensor

    def top(self, count: int) -> PaddedDetections:
        """The first `count` entries, with the detections before all others."""
        order = self.kept.sort(dim=1, descending=True, stable=True).indices[:, :count]
        return PaddedDetections(take(self.boxes, order), *(x.gather(1, order) for x in self[1:]))

    def to_list(self) -> list[Detections]:
        """Each image's detections. The host waits for a GPU once, however many images there are."""
        counts = self.kept.sum(1).tolist()
        boxes, scores, labels, _ = self.top(max(counts))
        found = {"boxes": boxes, "scores": scores, "labels": labels}
        return [
            {name: x[image, :count].clone() for name, x in found.items()}
            for image, count in enumerate(counts)
        ]


def detect(head: DenseHead, outputs: tuple[list[Tensor], ...], sizes: Tensor) -> PaddedDetections:
    """All images' detections from a head's outputs, without waiting for a GPU (see `suppress`).

    Args:
        head: the head that gave the outputs.
        outputs: raw outputs as `DenseHead.forward` returns them.
        sizes: [N, 2] int64, the images' (height, width) before padding, on the same device.
    """
    logits, box_maps, *factor_maps = outputs
    settings = head.post_process
    counts = [x[0].numel() // head.num_classes for x in logits]
    flat = flatten_levels(logits, head.num_classes)
    factor = torch.ones_like(flat[..., 0], dtype=torch.float32)
    for maps in factor_maps:
        factor = factor * flatten_levels(maps, 1).squeeze(2).float().sigmoid()
    index, label, scores = top_per_level(flat, factor, counts, settings)
    predictions = take(flatten_levels(box_maps, 4), index)
    priors = head.priors(all_locations([tuple(x.shape[-2:]) for x in logits], index.device))
    boxes = head.decode(predictions.float(), priors[index])
    return suppress(boxes, scores, label + 1, sizes, settings)


def top_per_level(
    logits: Tensor, factor: Tensor, counts: list[int], settings: PostProcess
) -> tuple[Tensor, Tensor, Tensor]:
    """The best predictions of each level of each image.

    Args:
        logits: [N, L, C] of the priors of all levels, one level after the other.
        factor: [N, L], factor of the scores.
        counts: number of priors of each level.
        settings: threshold, and the number of predictions that a level passes on at most.

    Returns:
        prior index, class (from 0) and score, [N, K] each, ordered by prior and class.
    """
    limit = settings.max_dropped_logit
    best = logits.amax(dim=2).float()
    score = best.sigmoid() * factor
    score = torch.where((best > limit) & (score >= 0), score, ABSENT)  # NaN is absent
    longest = counts[0]  # P3 has the most priors
    if not isinstance(longest, int):  # symbolic in an export: K must not depend on it
        longest = torch.sym_max(longest, settings.pre_nms_top_n)
    by_level = torch.stack(
        [F.pad(x, (0, longest - x.shape[1]), value=ABSENT) for x in score.split(counts, dim=1)],
        dim=1,
    )
    # The n best predictions belong to the n priors with the best top class.
    top = best_indices(by_level, settings.pre_nms_top_n)
    present = by_level.gather(2, top) >= 0
    starts = itertools.accumulate(counts[:-1], initial=0)
    prior = torch.stack([top[:, level] + start for level, start in enumerate(starts)], dim=1)
    prior = prior.clamp(max=logits.shape[1] - 1)  # padding of the last level

    classes = logits.shape[2]
    chosen = prior.flatten(1)
    rows = take(logits, chosen).float()
    score = rows.sigmoid() * factor.gather(1, chosen)[..., None]
    score = torch.where((rows > limit) & present.flatten(1)[..., None], score, ABSENT)
    score = score.reshape(*prior.shape[:2], -1)
    top = best_indices(score, settings.pre_nms_top_n)
    prior = prior.gather(2, top // classes)
    return prior.flatten(1), (top % classes).flatten(1), score.gather(2, top).flatten(1)


def suppress(
    boxes: Tensor, scores: Tensor, labels: Tensor, sizes: Tensor, settings: PostProcess
) -> PaddedDetections:
    """Mark the detections that NMS leaves.

    The host does not wait for a GPU, unless there are more than `MAX_NMS_BOXES` entries per image:
    then the present ones are counted first.

    Args:
        boxes, scores, labels: [N, K, 4], [N, K] and [N, K], as in `PaddedDetections` but in any
            order.
        sizes: [N, 2] int64, the images' (height, width).
        settings: IoU of NMS, and the number of detections per image.
    """
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    if scores.shape[1] > MAX_NMS_BOXES:
        most = max(1, int((scores >= 0).sum(1).max()))
        scores, order = scores[:, :most], order[:, :most]
    boxes = clip_boxes(take(boxes, order), *sizes[..., None].unbind(1))
    labels = labels.gather(1, order)
    kept = nms_mask(boxes, labels, (scores >= 0).sum(1), settings.nms_iou, legacy=True)
    within = kept & (kept.cumsum(1) <= settings.detections_per_image)
    last = torch.where(within, scores, torch.inf).amin(dim=1, keepdim=True)
    return PaddedDetections(boxes, scores, labels, kept & (scores >= last))


def best_indices(scores: Tensor, count: int) -> Tensor:
    """Ascending indices [..., count] of the largest of scores [..., K]; all K where K < count."""
    count = min(count, scores.shape[-1])
    return scores.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
