"""The twelve COCO figures and the AP of every class.

The counting is faster-coco-eval's, which gives pycocotools' numbers in a fraction of its time.
"""

import logging
from collections.abc import Iterable, Sequence

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from ..data.coco import find_fault, is_number

logger = logging.getLogger(__name__)

# The figures by name: ("precision" or "recall", IoU threshold or None for the mean over
# 0.5:0.05:0.95, area range, detections per image).
FIGURES = {
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
CLASS_FIGURES = ("AP", "AP50", "AP75")


def complete_annotations(annotations: Iterable[dict]) -> list[dict]:
    """Copies of COCO annotations with what counting boxes needs and real files often lack.

    `iscrowd` becomes 0 and `area` width times height where they are missing (or `area` is not a
    number). What a data set drops (`data.coco.find_fault`) is left out: there is nothing in it to
    find. Ids are kept, so that the figures are those of pycocotools on the same file, unless they
    cannot serve as ids at all (missing, used twice, or no whole numbers in 0..2^63 - 1): then all
    are numbered anew.
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
    # Not a set of all at once: a list, for one, could not be in it.
    ids = {annotation["id"] for annotation in completed if _is_id(annotation["id"])}
    if len(ids) < len(completed):
        logger.warning(
            "Annotation ids are missing, not unique or no whole numbers in 0..2^63 - 1: numbered "
            "anew for evaluation."
        )
        for number, annotation in enumerate(completed, start=1):
            annotation["id"] = number
    elif 0 in ids:
        logger.warning(
            "An annotation has the id 0, which COCO's evaluation takes for 'not found': its object "
            "counts as missed. Number the annotations from 1."
        )
    return completed


def _is_id(value: object) -> bool:
    """Whether the counting, which marks what is found by signed 64-bit ids, can do with it."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def coco_metrics(
    image_ids: Sequence[int],
    annotations: Iterable[dict],
    results: Sequence[dict],
    category_ids: Sequence[int],
    class_names: Sequence[str],
) -> dict[str, float | dict[str, dict[str, float]]]:
    """Average precision and recall as COCO defines them, for boxes.

    Args:
        image_ids: the images that count, whether anything was detected in them or not.
        annotations: COCO annotations; see `complete_annotations` for what may be missing.
        results: COCO results: `image_id`, `category_id`, `bbox` (x, y, width, height) and `score`.
        category_ids: the categories that count, in the order of `class_names`.
        class_names: their names.

    Returns:
        The twelve `FIGURES`, each in 0..1, and `per_class`: for each class its `CLASS_FIGURES`. A
        figure that no ground truth supports (a class without objects, no small objects, ...) is
        nan, where pycocotools says -1.
    """
    # In the order of their ids, as COCO's code takes them; but faster_coco_eval counts in floating
    # point, which takes neighbouring ids beyond 2^53 for one.
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
        figure: _figure(tables, parameters, *definition) for figure, definition in FIGURES.items()
    }
    metrics["per_class"] = {
        name: {
            figure: _figure(tables, parameters, *FIGURES[figure], category=number - 1)
            for figure in CLASS_FIGURES
        }
        for name, number in zip(class_names, map(categories.get, category_ids), strict=True)
    }
    return metrics


def _index(images: dict[int, int], annotations: list[dict], categories: dict[int, int]) -> COCO:
    """What counts of the annotations, which get the numbers of their images and categories as
    ids."""
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


def _figure(
    tables: dict[str, np.ndarray],
    parameters,
    kind: str,
    iou_threshold: float | None,
    area: str,
    max_detections: int,
    category: int | None = None,
) -> float:
    """Mean over a part of the precisions [T, R, K, A, M] or recalls [T, K, A, M]; -1 is no value.

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
