"""Average precision as PASCAL VOC defines it.

Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV 2010, section 4.2 (the
11-point metric of VOC 2007), and the VOC 2010 development kit (the area under the curve).
"""

from dataclasses import dataclass

import numpy as np

from ..boxes import legacy_areas, legacy_sizes


@dataclass(frozen=True)
class Boxes:
    """Boxes of many images in flat arrays.

    Attributes:
        image: [N] int, image id of each box.
        label: [N] int, label of each box.
        box: [N, 4] float64, xyxy with both corners inclusive (width = x1 - x0 + 1).
        score: [N] float, for detections.
        difficult: [N] bool, for ground truth.
    """

    image: np.ndarray
    label: np.ndarray
    box: np.ndarray
    score: np.ndarray | None = None
    difficult: np.ndarray | None = None


def voc_average_precision(
    ground_truth: Boxes, detections: Boxes, num_classes: int, iou_threshold: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """AP of each class 1..num_classes by both of VOC's metrics.

    A detection is matched to the object of its class and image that it overlaps most. If their IoU
    reaches the threshold, the first (best scored) detection of an object is a true positive and
    later ones are false positives, except that detections of difficult objects count as neither. A
    detection below the threshold is a false positive. Difficult objects need not be found.

    Returns:
        (eleven_point, area), each [num_classes] float; nan for a class without objects other than
        difficult ones.
    """
    order = np.argsort(-detections.score, kind="stable")
    label = detections.label[order]
    best_iou, best_object = _best_overlap(
        ground_truth, detections.image[order], label, detections.box[order]
    )

    hit = best_iou >= iou_threshold
    on_difficult = np.zeros_like(hit)
    on_difficult[hit] = ground_truth.difficult[best_object[hit]]
    first = np.zeros_like(hit)
    hits = np.flatnonzero(hit)
    first[hits[np.unique(best_object[hits], return_index=True)[1]]] = True
    right = first & ~on_difficult

    eleven_point = np.full(num_classes, np.nan)
    area = np.full(num_classes, np.nan)
    for index in range(num_classes):
        objects = np.count_nonzero((ground_truth.label == index + 1) & ~ground_truth.difficult)
        if objects:
            curve = np.cumsum(right[(label == index + 1) & ~on_difficult])
            eleven_point[index], area[index] = _average(curve, objects)
    return eleven_point, area


def _best_overlap(
    ground_truth: Boxes, image: np.ndarray, label: np.ndarray, box: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The largest IoU of each detection with an object of its class and image, and that object.

    Both [N]; -inf and -1 where there is no such object. The first object wins a tie. All pairs of a
    detection and a candidate object lie in one flat array, which avoids a loop over images.
    """
    best_iou = np.full(len(image), -np.inf)
    best_object = np.full(len(image), -1)
    classes = 1 + max(label.max(initial=0), ground_truth.label.max(initial=0))
    object_key = ground_truth.image.astype(np.int64) * classes + ground_truth.label
    by_key = np.argsort(object_key, kind="stable")
    key = image.astype(np.int64) * classes + label
    start = np.searchsorted(object_key[by_key], key, side="left")
    count = np.searchsorted(object_key[by_key], key, side="right") - start

    with_candidates = np.flatnonzero(count)
    if len(with_candidates) == 0:
        return best_iou, best_object
    start, count = start[with_candidates], count[with_candidates]
    first_pair = np.cumsum(count) - count
    pair_detection = np.repeat(with_candidates, count)
    within = np.arange(len(pair_detection)) - np.repeat(first_pair, count)
    pair_object = by_key[np.repeat(start, count) + within]
    iou = _paired_iou(box[pair_detection], ground_truth.box[pair_object])

    best = np.maximum.reduceat(iou, first_pair)
    tops = np.flatnonzero(iou == np.repeat(best, count))
    _, top_of_detection = np.unique(pair_detection[tops], return_index=True)
    best_iou[with_candidates] = best
    best_object[with_candidates] = pair_object[tops[top_of_detection]]
    return best_iou, best_object


def _paired_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU [N] of a[i] and b[i], [N, 4] each, both corners inclusive."""
    top_left = np.maximum(a[:, :2], b[:, :2])
    bottom_right = np.minimum(a[:, 2:], b[:, 2:])
    # The functions of `nasfcos.boxes` work on arrays as on tensors.
    width, height = legacy_sizes(np.concatenate((top_left, bottom_right), axis=1))
    intersection = width.clip(min=0) * height.clip(min=0)
    return intersection / (legacy_areas(a) + legacy_areas(b) - intersection)


def _average(right: np.ndarray, objects: int) -> tuple[float, float]:
    """The 11-point and the area metric of one class.

    Args:
        right: [D] int, true positives among the 1, 2, ..., D best-scored detections.
        objects: number of objects to find, at least one.
    """
    precision = right / np.arange(1, len(right) + 1)
    # The precision at a recall is the best precision at that recall or above.
    precision = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    # In integers, so that a recall of exactly 3/10 reaches the level 0.3.
    levels = np.searchsorted(10 * right, objects * np.arange(11), side="left")
    gained = np.diff(right, prepend=0)
    return float(precision[levels].mean()), float((gained * precision[:-1]).sum() / objects)
