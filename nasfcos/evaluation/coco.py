"""The twelve COCO metrics and the AP of every class.

Computed by faster-coco-eval, which gives the numbers of pycocotools in a fraction of the time.
"""

import logging
from collections.abc import Iterable, Sequence

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from ..data.coco import find_fault, is_number

logger = logging.getLogger(__name__)

# Metrics by name: ("precision" or "recall", IoU threshold or None for the mean over
# 0.5:0.05:0.95, area range, detections per image).
METRICS = {
    "AP": ("precision", None, "all", 100),
    "AP50": ("precision", 0.5, "all", 100),
    "AP75": ("precision", 0.75, "all", 100),
    "APs": ("precision", None, "small", 100),
    "APm": ("precision", None, "medium", 100),
    "APl": ("precision", None, "large", 100),
    "AR1": ("recall", None, "all", 1),
    "AR10": ("recall", None, "all", 10),
    "AR100": ("recall", None, "all", 100),
    "ARs": ("recall", None, "small", 100),
    "ARm": ("recall", None, "medium", 100),
    "ARl": ("recall", None, "large", 100),
}
CLASS_METRICS = ("AP", "AP50", "AP75")


def complete_annotations(annotations: Iterable[dict]) -> list[dict]:
    """Copies of COCO annotations with the keys that evaluation needs and real files often lack.

    A missing `iscrowd` becomes 0, and an `area` that is not a number the area of the box.
    Annotations with a fault (`data.coco.find_fault`), which data sets drop too, are left out. Ids
    are kept, so that the metrics are those of pycocotools on the same file, unless some of them
    cannot be used (missing, repeated, or not integers in 0..2^63 - 1): then all are renumbered.
    """
    completed = []
    for annotation in annotations:
        if find_fault(annotation):
            continue
        box = annotation["bbox"]
        area = annotation.get("area")
        completed.append(
            {
                "id": annotation.get("id"),
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "bbox": box,
                "area": area if is_number(area) else box[2] * box[3],
                "iscrowd": int(annotation.get("iscrowd") or 0),
            }
        )
    # Valid ids only: others may not be hashable.
    ids = {annotation["id"] for annotation in completed if _is_id(annotation["id"])}
    if len(ids) < len(completed):
        logger.warning(
            "Annotation ids are missing, not unique or not integers in 0..2^63 - 1: numbered "
            "anew for evaluation."
        )
        for number, annotation in enumerate(completed, start=1):
            annotation["id"] = number
    elif 0 in ids:
        logger.warning(
            "An annotation has the id 0, which COCO's evaluation takes for 'not found', so its "
            "object counts as missed. Number the annotations from 1."
        )
    return completed


def _is_id(value: object) -> bool:
    """Whether faster-coco-eval can use a value as an id: it marks matches by signed 64-bit ids."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def coco_metrics(
    image_ids: Sequence[int],
    annotations: Iterable[dict],
    results: Sequence[dict],
    category_ids: Sequence[int],
    class_names: Sequence[str],
) -> dict[str, float | dict[str, dict[str, float]]]:
    """Average precision and recall of boxes as COCO defines them.

    Args:
        image_ids: ids of the images to evaluate, with or without detections.
        annotations: COCO annotations; see `complete_annotations` for what may be missing.
        results: COCO results: `image_id`, `category_id`, `bbox` (x, y, width, height) and `score`.
        category_ids: ids of the categories to evaluate, in the order of `class_names`.
        class_names: names of the categories.

    Returns:
        The twelve `METRICS`, each in 0..1, and `per_class` with the `CLASS_METRICS` of each class.
        A metric without ground truth (a class without objects, no small objects, ...) is nan,
        where pycocotools says -1.
    """
    # Renumbered in the order of their ids, which COCO's code follows, because faster_coco_eval
    # handles ids as floating-point numbers and confuses neighbouring ones beyond 2^53.
    images = {image_id: n for n, image_id in enumerate(sorted(set(image_ids)), start=1)}
    categories = {category_id: n for n, category_id in enumerate(sorted(category_ids), start=1)}
    detections = [
        {
            **result,
            "id": number,
            "area": result["bbox"][2] * result["bbox"][3],
            "iscrowd": 0,
        }
        for number, result in enumerate(results, start=1)
    ]
    evaluation = COCOeval_faster(
        _index(images, complete_annotations(annotations), categories),
        _index(images, detections, categories),
        iouType="bbox",
    )
    evaluation.evaluate()
    evaluation.accumulate()

    tables = {name: np.asarray(evaluation.eval[name]) for name in ("precision", "recall")}
    parameters = evaluation.params
    metrics: dict = {
        metric: _metric(tables, parameters, *definition) for metric, definition in METRICS.items()
    }
    metrics["per_class"] = {
        name: {
            metric: _metric(tables, parameters, *METRICS[metric], category=number - 1)
            for metric in CLASS_METRICS
        }
        for name, number in zip(class_names, map(categories.get, category_ids), strict=True)
    }
    return metrics


def _index(images: dict[int, int], annotations: list[dict], categories: dict[int, int]) -> COCO:
    """A COCO index of the annotations whose image and category are evaluated.

    `images` and `categories` map ids to their numbers, which replace the ids in the annotations.
    """
    counted = []
    for annotation in annotations:
        image = images.get(annotation["image_id"])
        category = categories.get(annotation["category_id"])
        if image and category:
            annotation["image_id"], annotation["category_id"] = image, category
            counted.append(annotation)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": number} for number in images.values()],
        "annotations": counted,
        "categories": [{"id": number} for number in categories.values()],
    }
    coco.createIndex()
    return coco


def _metric(
    tables: dict[str, np.ndarray],
    parameters,
    kind: str,
    iou_threshold: float | None,
    area: str,
    max_detections: int,
    category: int | None = None,
) -> float:
    """Mean over a part of the precisions [T, R, K, A, M] or recalls [T, K, A, M], ignoring -1.

    T are IoU thresholds, R recall levels, K categories, A area ranges, M detection limits.
    """
    values = tables[kind][
        ..., parameters.areaRngLbl.index(area), parameters.maxDets.index(max_detections)
    ]
    if iou_threshold is not None:
        values = values[np.isclose(parameters.iouThrs, iou_threshold)]
    if category is not None:
        values = values[..., category]
    values = values[values > -1]
    return float(values.mean()) if values.size else float("nan")
