"""How predictions become detections: thresholds, the best of each level, NMS, the best of all.

There are two ways to the same detections. On the CPU only the few predictions above the threshold
are looked at (`PostProcess.select`, `PostProcess.finish`). On a GPU the host would have to wait for
every number of these; there as many predictions as could be needed are carried along, those that
are not there with a score of `ABSENT` (`PostProcess.best_of_levels`, `PostProcess.rank`).
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...boxes import clip_boxes
from ...ops import batched_nms, nms_mask
from .cells import take

Detections = dict[str, Tensor]
"""``boxes`` [N, 4] legacy xyxy in pixels, ``scores`` [N], ``labels`` [N] from 1; best first."""

ABSENT = -1.0
"""The score of a prediction that is there for the shape's sake only."""

MOST_IN_NMS = 2**14
"""Predictions of an image that NMS is given whether they are there or not: on a GPU it takes memory
by their square (here 32 MiB)."""


class Candidates(NamedTuple):
    """Predictions of some images that may become detections.

    Attributes:
        image: [P] int64, the image of each.
        boxes: [P, 4] xyxy in pixels.
        scores: [P].
        labels: [P] int64 from 1.
    """

    image: Tensor
    boxes: Tensor
    scores: Tensor
    labels: Tensor


class Ranked(NamedTuple):
    """Predictions of N images, as many of each, by descending score; absent ones are the last.

    Attributes:
        boxes: [N, K, 4] xyxy in pixels.
        scores: [N, K].
        labels: [N, K] int64 from 1.
        kept: [N, K] bool, which ones are detections.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    kept: Tensor

    def first(self, most: int) -> Ranked:
        """The same with those that are detections before all others, and at most so many."""
        order = self.kept.sort(dim=1, descending=True, stable=True).indices[:, :most]
        return Ranked(take(self.boxes, order), *(x.gather(1, order) for x in self[1:]))

    def detections(self) -> list[Detections]:
        """Each image's detections. A GPU is waited for once, however many images there are."""
        counts = self.kept.sum(1).tolist()
        boxes, scores, labels, _ = self.first(max(counts))
        found = {"boxes": boxes, "scores": scores, "labels": labels}
        return [
            {name: x[image, :count].clone() for name, x in found.items()}
            for image, count in enumerate(counts)
        ]


@dataclass(frozen=True)
class PostProcess:
    """How predictions become detections.

    Attributes:
        score_threshold: class probabilities at or below this are dropped.
        pre_nms_top_n: candidates that each level passes on.
        nms_iou: legacy IoU at which NMS suppresses within a class.
        detections_per_image: the best that are kept; ties with the last of them stay too.
    """

    score_threshold: float
    pre_nms_top_n: int
    nms_iou: float
    detections_per_image: int

    @property
    def limit(self) -> float:
        """The largest class logit that is dropped."""
        return threshold_logit(self.score_threshold)

    def select(self, scores: Tensor, group: Tensor, groups: int) -> Tensor | None:
        """The candidates that are passed on: the best of each level of each image.

        Args:
            scores: [P] of the candidates.
            group: [P] int64, ascending: level and image of each candidate as one number.
            groups: how many such numbers there are.

        Returns:
            ascending indices, or None where all are passed on.
        """
        if len(scores) <= self.pre_nms_top_n:
            return None
        counts = torch.bincount(group, minlength=groups).tolist()
        if max(counts) <= self.pre_nms_top_n:
            return None
        selected, start = [], 0
        for part, count in zip(scores.split(counts), counts, strict=True):
            if count > self.pre_nms_top_n:
                best = part.topk(self.pre_nms_top_n, sorted=False).indices.sort().values
            else:
                best = torch.arange(count)
            selected.append(best + start)
            start += count
        return torch.cat(selected)

    def finish(
        self, candidates: Candidates, sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """The detections among all images' candidates; `sizes` are the images' (height, width)."""
        image, boxes, scores, labels = candidates
        if len(scores) == 0:
            return [{"boxes": boxes, "scores": scores, "labels": labels} for _ in sizes]
        height, width = torch.tensor(sizes)[image].unbind(1)
        boxes = clip_boxes(boxes, height, width)
        class_of_image = image * 2**32 + labels
        keep = batched_nms(boxes, scores, class_of_image, self.nms_iou, legacy=True)
        results = []
        for index in range(len(sizes)):
            best = keep[image[keep] == index]
            if len(best) > self.detections_per_image:
                best = best[scores[best] >= scores[best[self.detections_per_image - 1]]]
            results.append({"boxes": boxes[best], "scores": scores[best], "labels": labels[best]})
        return results

    def best_of_levels(
        self, logits: Tensor, factor: Tensor, counts: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best predictions of each level of each image. Nothing waits for a GPU.

        Args:
            logits: [N, L, C] of all levels' places, one level after the other.
            factor: [N, L] of the scores.
            counts: places of each level.

        Returns:
            the places, classes (from 0) and scores [N, K] of predictions: at most `pre_nms_top_n`
            of each level, in the order of the places and classes.
        """
        best = logits.amax(dim=2).float()
        score = best.sigmoid() * factor
        score = torch.where((best > self.limit) & (score >= 0), score, ABSENT)  # NaN is absent
        most = counts[0]  # P3 has more than the others
        if not isinstance(most, int):  # in an export for any size: K must not depend on it
            most = torch.sym_max(most, self.pre_nms_top_n)
        by_level = torch.stack(
            [F.pad(x, (0, most - x.shape[1]), value=ABSENT) for x in score.split(counts, dim=1)],
            dim=1,
        )
        # The best predictions are among those of the places whose best one is best.
        index = best_indices(by_level, self.pre_nms_top_n)
        present = by_level.gather(2, index) >= 0
        starts = itertools.accumulate(counts[:-1], initial=0)
        place = torch.stack([index[:, level] + start for level, start in enumerate(starts)], dim=1)
        place = place.clamp(max=logits.shape[1] - 1)  # padding of the last level

        classes = logits.shape[2]
        every = place.flatten(1)
        rows = take(logits, every).float()
        score = rows.sigmoid() * factor.gather(1, every)[..., None]
        score = torch.where((rows > self.limit) & present.flatten(1)[..., None], score, ABSENT)
        score = score.reshape(*place.shape[:2], -1)
        index = best_indices(score, self.pre_nms_top_n)
        place = place.gather(2, index // classes)
        return place.flatten(1), (index % classes).flatten(1), score.gather(2, index).flatten(1)

    def rank(self, boxes: Tensor, scores: Tensor, labels: Tensor, sizes: Tensor) -> Ranked:
        """The detections among as many predictions of each image. Nothing waits for a GPU, unless
        there may be so many predictions that it is better to count them first.

        Args:
            boxes, scores, labels: [N, K, 4], [N, K] and [N, K], as in `Ranked` but in any order.
            sizes: [N, 2], the images' (height, width).
        """
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        if scores.shape[1] > MOST_IN_NMS:
            most = max(1, int((scores >= 0).sum(1).max()))
            scores, order = scores[:, :most], order[:, :most]
        boxes = clip_boxes(take(boxes, order), *sizes[..., None].unbind(1))
        labels = labels.gather(1, order)
        kept = nms_mask(boxes, labels, (scores >= 0).sum(1), self.nms_iou, legacy=True)
        surely = kept & (kept.cumsum(1) <= self.detections_per_image)
        last = torch.where(surely, scores, torch.inf).amin(dim=1, keepdim=True)
        return Ranked(boxes, scores, labels, kept & (scores >= last))


def best_indices(scores: Tensor, count: int) -> Tensor:
    """Ascending indices [..., count] of the largest of scores [..., K], or of all where K is
    less."""
    count = min(count, scores.shape[-1])
    return scores.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values


@functools.cache
def threshold_logit(probability: float) -> float:
    """The largest float32 logit whose probability (in float32) is not above this one."""

    def logit(index: int) -> float:  # all float32 numbers in ascending order, 0 at 0
        return math.copysign(np.int32(abs(index)).view(np.float32), index)

    def is_above(index: int) -> bool:
        power = math.exp(-abs(logit(index)))
        return np.float32((power if index < 0 else 1) / (1 + power)) > np.float32(probability)

    infinity = int(np.float32(np.inf).view(np.int32))
    first = bisect.bisect_left(range(-infinity, infinity + 1), True, key=is_above) - infinity
    return logit(first - 1) if first > -infinity else -math.inf
