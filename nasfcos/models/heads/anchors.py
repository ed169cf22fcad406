"""Anchors of RetinaNet: their shapes, their matching to boxes, and box codes relative to them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...boxes import legacy_iou, legacy_sizes
from .locations import STRIDES

CENTRE_WEIGHT, SIZE_WEIGHT = 10.0, 5.0  # of box codes
MAX_LOG_SCALE = math.log(1000 / 16)

UNMATCHED, AMBIGUOUS = -1, -2
"""In place of a box index: an anchor that is background, and one that is not trained."""

# A CPU's caches hold the overlaps of few boxes; a GPU is kept busy by many in one kernel.
BOXES_AT_ONCE_ON_CPU, BOXES_AT_ONCE_ELSEWHERE = 4, 64


def pyramid_anchors(
    size: float, scales_per_octave: int, aspect_ratios: Sequence[float]
) -> list[Tensor]:
    """The `base_anchors` of each level P3..P7.

    Args:
        size: side of P3's smallest square anchor in pixels; it doubles from level to level.
        scales_per_octave: number of sizes per level, evenly spaced in the logarithm.
        aspect_ratios: height / width.
    """
    return [
        base_anchors(
            stride,
            [size * 2 ** (level + n / scales_per_octave) for n in range(scales_per_octave)],
            aspect_ratios,
        )
        for level, stride in enumerate(STRIDES)
    ]


def base_anchors(stride: int, sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """The anchors [ratios * sizes, 4] of the location at the origin, as legacy boxes, ratio-major.

    As in the release, for each ratio (height / width) a window with the area of the stride is
    rounded to whole pixels and then scaled to each size (pixels).
    """
    centre = (stride - 1) / 2
    anchors = []
    for ratio in aspect_ratios:
        width = np.round(np.sqrt(stride**2 / ratio))
        height = np.round(width * ratio)
        for size in sizes:
            half = (np.array([width, height]) * (size / stride) - 1) / 2
            anchors.append([*(centre - half), *(centre + half)])
    return torch.tensor(np.array(anchors), dtype=torch.float32)


def match_anchors(anchors: Tensor, boxes: Tensor, fg_iou: float, bg_iou: float) -> Tensor:
    """The box that each anchor is trained on (RetinaNet, section 4, "Anchors").

    An anchor is matched to the box with which its legacy IoU is largest (the first of several). In
    addition to the paper, and as in Faster R-CNN, every anchor that attains the best IoU of some
    box is matched whatever that IoU is, though to the anchor's own best box.

    Memory does not grow with the number of boxes.

    Args:
        anchors: [A, 4] legacy boxes.
        boxes: [M, 4] legacy boxes; M may be 0.
        fg_iou: IoU from which an anchor is matched.
        bg_iou: IoU below which an anchor is background.

    Returns:
        [A] int64 indices into M, `UNMATCHED` (below `bg_iou`) or `AMBIGUOUS` (between the two).
    """
    on_cpu = anchors.device.type == "cpu"
    at_once = BOXES_AT_ONCE_ON_CPU if on_cpu else BOXES_AT_ONCE_ELSEWHERE
    anchors = anchors.t().contiguous().t()  # once, not again in each `legacy_iou`
    best_iou = torch.full_like(anchors[:, 0], -1)
    best_box = torch.full_like(best_iou, UNMATCHED, dtype=torch.int64)
    closest = torch.zeros_like(best_iou, dtype=torch.bool)
    for first in range(0, len(boxes), at_once):
        iou = legacy_iou(boxes[first : first + at_once], anchors)
        largest = iou.amax(dim=1)
        attained = torch.where(largest > 0, largest, torch.inf)
        closest |= (iou == attained[:, None]).any(dim=0)
        top, which = iou.max(dim=0)  # the first of several
        best_box = torch.where(top > best_iou, which + first, best_box)
        best_iou = torch.maximum(best_iou, top)
    match = torch.where(best_iou < fg_iou, AMBIGUOUS, best_box)
    match = torch.where(best_iou < bg_iou, UNMATCHED, match)
    return torch.where(closest, best_box, match)


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Box codes [..., 4] of legacy boxes relative to anchors [..., 4].

    The shift of the centre relative to the anchor's size and the logarithm of the size ratio
    (Faster R-CNN, Ren et al., 2015, equation 2), times `CENTRE_WEIGHT` and `SIZE_WEIGHT`.
    """
    centre, size = _centres(boxes)
    anchor_centre, anchor_size = _centres(anchors)
    shift = (centre - anchor_centre) / anchor_size * CENTRE_WEIGHT
    return torch.cat((shift, torch.log(size / anchor_size) * SIZE_WEIGHT), dim=-1)


def decode_boxes(codes: Tensor, anchors: Tensor) -> Tensor:
    """Legacy boxes [..., 4] of codes [..., 4], the inverse of `encode_boxes`.

    A box is at most 62.5 times as wide or high as its anchor, as in the release.
    """
    anchor_centre, anchor_size = _centres(anchors)
    centre = codes[..., :2] / CENTRE_WEIGHT * anchor_size + anchor_centre
    scale = (codes[..., 2:] / SIZE_WEIGHT).clamp(max=MAX_LOG_SCALE).exp()
    half = 0.5 * scale * anchor_size
    return torch.cat((centre - half, centre + half - 1), dim=-1)


def _centres(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and sizes, each [..., 2] (x, y) in pixels, of legacy boxes [..., 4]."""
    sizes = torch.stack(legacy_sizes(boxes), dim=-1)
    return boxes[..., :2] + 0.5 * sizes, sizes
