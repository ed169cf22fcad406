"""Box arithmetic. Boxes are xyxy in pixels.

The released models count both corners as inside a box: its width is ``x1 - x0 + 1`` ("legacy
width"). Sizes, areas and overlaps by that convention are computed here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def legacy_sizes(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Legacy widths and heights, each [...], of boxes [..., 4]."""
    return boxes[..., 2] - boxes[..., 0] + 1, boxes[..., 3] - boxes[..., 1] + 1


def legacy_areas(boxes: Tensor) -> Tensor:
    """Legacy areas [...] of boxes [..., 4], in square pixels."""
    width, height = legacy_sizes(boxes)
    return width * height


def legacy_iou(a: Tensor, b: Tensor) -> Tensor:
    """Legacy intersection over union [N, M] of boxes [N, 4] and [M, 4]."""
    x0, y0, x1, y1 = a.t()[..., None]
    left, top, right, bottom = b.t().contiguous()  # in one piece each is read far faster
    width = torch.minimum(x1, right).sub_(torch.maximum(x0, left)).add_(1).clamp_(min=0)
    height = torch.minimum(y1, bottom).sub_(torch.maximum(y0, top)).add_(1).clamp_(min=0)
    intersection = width * height
    return intersection / (legacy_areas(a)[:, None] + legacy_areas(b)).sub_(intersection)


def clip_boxes(boxes: Tensor, height: int | Tensor, width: int | Tensor) -> Tensor:
    """Boxes [..., 4] with their corners moved into the pixels 0..width-1, 0..height-1; sizes of
    each box by itself are [...]."""
    x_end, y_end = (
        side[..., None] - 1 if isinstance(side, Tensor) else side - 1 for side in (width, height)
    )
    x = boxes[..., 0::2].clamp(min=0).clamp(max=x_end)
    y = boxes[..., 1::2].clamp(min=0).clamp(max=y_end)
    return torch.stack((x[..., 0], y[..., 0], x[..., 1], y[..., 1]), dim=-1)


def legacy_to_xywh(boxes: Tensor) -> Tensor:
    """COCO's (x, y, width, height) [..., 4] of legacy boxes [..., 4]."""
    width, height = legacy_sizes(boxes)
    return torch.stack((boxes[..., 0], boxes[..., 1], width, height), dim=-1)
