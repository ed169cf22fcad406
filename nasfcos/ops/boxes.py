"""Non-maximum suppression."""

import torch
from torch import Tensor

from . import library as _library  # noqa: F401  (defines torch.ops.nasfcos)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, legacy: bool = False) -> Tensor:
    """Greedy non-maximum suppression.

    Args:
        boxes: [N, 4] floating point, xyxy, pixels.
        scores: [N] floating point.
        iou_threshold: a box is suppressed if its IoU with a kept box of higher score exceeds this
            (with `legacy`: exceeds or equals it).
        legacy: use the convention of the released models, in which a box includes both corner
            pixels and its width is ``x1 - x0 + 1``; otherwise torchvision's, ``x1 - x0``.

    Returns:
        int64 indices of the kept boxes by descending score; equal scores keep their input order.

    Raises:
        ValueError: the shapes do not match.
    """
    return _nms(boxes, scores, None, iou_threshold, legacy)


def batched_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, legacy: bool = False
) -> Tensor:
    """:func:`nms` per class: boxes with different `labels` ([N] integer) never suppress each other.

    Box coordinates are used as they are, not shifted apart by class, so the result is exactly that
    of one :func:`nms` per class.
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
    """:func:`batched_nms` for several images at once, with boxes that are already sorted.

    The shape of the result depends only on the shapes of the arguments, so the host never waits for
    a GPU.

    Args:
        boxes: [N, K, 4] floating point, xyxy, pixels; each image's boxes by descending score.
        labels: [N, K] integer class labels; None: all boxes have the same class.
        counts: [N] integer, the number of valid boxes of each image; the boxes after them neither
            suppress others nor are kept. None: all K are valid.
        iou_threshold, legacy: as for :func:`nms`.

    Returns:
        [N, K] bool, True for the boxes that are kept.

    Raises:
        ValueError: the shapes do not match.
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
